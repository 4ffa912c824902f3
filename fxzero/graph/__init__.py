"""The step graph: one FX graph of a whole training step, its table of state, its text and its verifier."""

from fxzero.graph.step_graph import (
    PHASES,
    AuxiliaryState,
    Result,
    Sharding,
    StateEntry,
    StepGraph,
)

__all__ = ["PHASES", "AuxiliaryState", "Result", "Sharding", "StateEntry", "StepGraph"]
