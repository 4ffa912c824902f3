"""fxzero: the compiler for the training step."""

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
]
