"""Decisions by predicted time and memory: what is kept, what is had again and what rests elsewhere, for a budget."""

from fxzero.decide.decision import Decision, Group
from fxzero.decide.search import check_budget, decide, decided_recipe, leaves_open

__all__ = ["Decision", "Group", "check_budget", "decide", "decided_recipe", "leaves_open"]
