"""Gradient clipping as part of the traced step, between backward and update.

The arithmetic is that of `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`, without their host-side branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def apply(self, gradients: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """New gradients, and their norm before they were scaled (a scalar; None where none is asked for)."""
        if self.value is not None:
            gradients = {name: g.clamp(min=-self.value, max=self.value) for name, g in gradients.items()}
        if self.norm is None or not gradients:
            return gradients, None
        norms = [torch.linalg.vector_norm(g, self.p) for g in gradients.values()]
        total = torch.linalg.vector_norm(torch.stack(norms), self.p)
        factor = torch.clamp(self.norm / (total + 1e-6), max=1.0)
        return {name: g * factor for name, g in gradients.items()}, total
