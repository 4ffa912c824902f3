"""Gradient clipping as part of the traced step, between backward and update.

The arithmetic is that of `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, without their host-side branches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fxzero.capture.equal_calls import EqualCalls


@dataclass(frozen=True)
class Clipping:
    """How gradients are bounded before the update.

    Args:
        norm: greatest norm of all gradients together; None: any.
        p: the order of that norm; inf takes the greatest element.
        value: greatest absolute value of an element, applied first; None: any.
    """

    norm: float | None = None
    p: float = 2.0
    value: float | None = None

    def apply(
        self, gradients: dict[str, torch.Tensor], calls: EqualCalls
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """New gradients, and their norm before they were scaled (a scalar; None where none is asked for)."""
        if self.value is not None:
            clamp = functools.partial(torch.clamp, min=-self.value, max=self.value)
            gradients = calls.each(clamp, {name: (g,) for name, g in gradients.items()})
        if self.norm is None or not gradients:
            return gradients, None
        norm = functools.partial(torch.linalg.vector_norm, ord=self.p)
        norms = calls.each(norm, {name: (g,) for name, g in gradients.items()})
        total = norm(torch.stack(list(norms.values())))
        factor = torch.clamp(self.norm / (total + 1e-6), max=1.0)
        return calls.each(torch.mul, {name: (g,) for name, g in gradients.items()}, common=(factor,)), total
