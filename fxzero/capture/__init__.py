"""Capture: model, optimizer, loss and one batch in, one StepGraph with single-device meaning out."""

from fxzero.capture.guards import Guards
from fxzero.capture.inventory import Inventory
from fxzero.capture.options import CaptureOptions
from fxzero.capture.signature import Signature
from fxzero.capture.symbolic import SymbolicStep
from fxzero.capture.trace import Capture, capture_step

__all__ = ["Capture", "CaptureOptions", "Guards", "Inventory", "Signature", "SymbolicStep", "capture_step"]
