"""What runs a step: state on this rank, agreement between ranks, and the executor of a lowered graph."""
