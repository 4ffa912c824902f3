"""What a schedule takes: so far a picture of its memory; the timeline comes with the scheduler."""
