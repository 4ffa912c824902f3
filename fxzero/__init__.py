"""fxzero: the compiler for the training step."""

from fxzero.errors import FxzeroError
from fxzero.plan import Plan

__version__ = "0.1.0"
__all__ = ["FxzeroError", "Plan"]
