"""Lowering: the regions of a program become compiled functions, each distinct one once."""
