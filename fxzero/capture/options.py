"""What a plan says of the captured step itself, before any pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fxzero.capture.accumulation import Accumulation
from fxzero.capture.clipping import Clipping
from fxzero.capture.loss_scaling import LossScaling
from fxzero.capture.precision import Precision


@dataclass(frozen=True)
class CaptureOptions:
    """How a step computes; by default as model, loss and optimizer say it.

    Args:
        precision: the dtypes of forward and backward.
        clipping: how gradients are bounded before the update.
        scaling: how the loss is scaled.
        accumulation: which of several microbatches it is.
        device: where the step runs, wherever its state rests; None: where the parameters are.
    """

    precision: Precision = field(default_factory=Precision)
    clipping: Clipping = field(default_factory=Clipping)
    scaling: LossScaling = field(default_factory=LossScaling)
    accumulation: Accumulation = field(default_factory=Accumulation)
    device: torch.device | None = None
