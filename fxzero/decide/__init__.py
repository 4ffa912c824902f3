"""Decisions by predicted time and memory: which activations are kept from forward to backward, for a budget."""

from fxzero.decide.decision import Decision, Group, check_budget, decide, decided_recipe

__all__ = ["Decision", "Group", "check_budget", "decide", "decided_recipe"]
