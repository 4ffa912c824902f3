"""What a step costs: memory now; time with the scheduler."""
