"""fxzero: the compiler for the training step."""

from typing import TYPE_CHECKING, Any

from fxzero.compile import TrainStep, compile
from fxzero.errors import (
    CaptureError,
    FxzeroError,
    GradientOverflowError,
    PipelineError,
    PlanError,
    RankMismatchError,
    RewriteError,
    VerifyError,
)
from fxzero.graph import StepGraph
from fxzero.plan import Plan

if TYPE_CHECKING:
    from fxzero.backend import shard

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "FxzeroError",
    "GradientOverflowError",
    "PipelineError",
    "Plan",
    "PlanError",
    "RankMismatchError",
    "RewriteError",
    "StepGraph",
    "TrainStep",
    "VerifyError",
    "compile",
    "shard",
]


def __getattr__(name: str) -> Any:
    """What belongs to torch.compile's door is imported when it is asked for."""
    if name != "shard":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fxzero.backend import shard

    return shard
