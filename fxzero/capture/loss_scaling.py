"""Loss scaling as part of the traced step: the loss grows before backward, the gradients shrink before the update.

Gradients in float16 underflow below 6e-8; scaled ones overflow now and then, and that step is then skipped. What is
done with the scale is what `torch.amp.GradScaler` does, bit for bit; but whether to skip is never asked by the host:
the step computes its update and selects, element by element, what was before it.

Source: Mixed Precision Training (Micikevicius et al., 2018), section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fxzero.capture.equal_calls import EqualCalls
from fxzero.errors import CaptureError
from fxzero.graph import AuxiliaryState, ops
from fxzero.graph.step_graph import StateEntry

SCALE, GROWTH_TRACKER = "scaler.scale", "scaler.growth_tracker"
SKIPPED, OVERFLOWED = "scaler.skipped", "scaler.overflowed"
METRICS = ("loss_scale", "overflow")  # what a scaled step reports: the scale it used, 1.0 where it was skipped

State = Mapping[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class LossScaling:
    """How the loss is scaled.

    Args:
        initial: the scale of the first step; 0: the loss is not scaled at all.
        dynamic: the scale halves at an overflow, doubles after `growth_interval` steps without one.
        growth_interval: number of steps.
    """

    initial: float = 0.0
    dynamic: bool = True
    growth_interval: int = 2000

    growth_factor = 2.0
    backoff_factor = 0.5

    @property
    def states(self) -> tuple[AuxiliaryState, ...]:
        """What is kept from step to step: nothing where the loss is not scaled.

        Beside the scale, and the steps since it last changed: how many steps in a row were skipped, and the number
        of the first gradient (in the optimizer's order) that overflowed in the last one skipped; -1: none yet.
        """
        if not self.initial:
            return ()
        return (
            AuxiliaryState(SCALE, initial=self.initial),
            AuxiliaryState(GROWTH_TRACKER, dtype=torch.int32),
            AuxiliaryState(SKIPPED, dtype=torch.int32),
            AuxiliaryState(OVERFLOWED, dtype=torch.int32, initial=-1),
        )

    def scaled(self, loss: torch.Tensor, state: State) -> torch.Tensor:
        """The loss to differentiate."""
        return loss * state[("auxiliary", SCALE)] if self.initial else loss

    def overflow(self, gradients: Mapping[str, torch.Tensor], calls: EqualCalls) -> Overflow | None:
        """Which scaled gradients are not finite; None where the loss is not scaled."""
        if not self.initial or not gradients:
            return None
        flags = calls.each(ops.nonfinite, {name: (gradient,) for name, gradient in gradients.items()})
        return Overflow(torch.stack(list(flags.values())))

    def unscaled(self, gradients: dict[str, torch.Tensor], state: State, calls: EqualCalls) -> dict[str, torch.Tensor]:
        """The gradients of the loss itself."""
        if not self.initial:
            return gradients
        inverse = state[("auxiliary", SCALE)].double().reciprocal().float()
        return calls.each(torch.mul, {name: (gradient,) for name, gradient in gradients.items()}, common=(inverse,))

    def next(self, state: State, overflow: Overflow) -> dict[tuple[str, str], torch.Tensor]:
        """The scaler's state after the step; equal to `torch._amp_update_scale_`."""
        scale, tracker, skipped, overflowed = (state[("auxiliary", s.name)] for s in self.states)
        found = overflow.found
        out = {SKIPPED: torch.where(found, skipped + 1, torch.zeros_like(skipped))}
        out[OVERFLOWED] = torch.where(found, overflow.first, overflowed)
        if self.dynamic:
            steps = tracker + 1
            grows = steps == self.growth_interval
            grown = scale * self.growth_factor
            kept = torch.where(grows & torch.isfinite(grown), grown, scale)
            out[SCALE] = torch.where(found, scale * self.backoff_factor, kept)
            out[GROWTH_TRACKER] = torch.where(found | grows, torch.zeros_like(steps), steps)
        return {("auxiliary", name): value for name, value in out.items()}


class Overflow:
    """What became of the gradients of one step.

    Args:
        flags: one number a gradient, above 0 where it is not finite.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self.found = flags.amax() > 0
        self.first = (flags > 0).int().argmax().int()  # the first of several equal ones

    def select(
        self,
        before: Mapping[tuple[str, str], torch.Tensor],
        after: Mapping[tuple[str, str], torch.Tensor],
        calls: EqualCalls,
    ) -> dict[tuple[str, str], torch.Tensor]:
        """The state after the step: as before it, where a gradient has overflowed."""
        pairs = {key: (before[key], value) for key, value in after.items()}
        return calls.each(_chosen, pairs, common=(self.found,))


def _chosen(before: torch.Tensor, after: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    return torch.where(skipped, before, after)


def check_can_be_skipped(entry: StateEntry, value: object, device_type: str) -> None:
    """Raise CaptureError for optimizer state that a step cannot leave as it is without asking the device."""
    if isinstance(value, torch.Tensor) and value.device.type in (device_type, "meta"):
        return
    kind = f"a tensor on {value.device.type}" if isinstance(value, torch.Tensor) else f"a Python {type(value).__name__}"
    raise CaptureError.of(
        where=f"optimizer state {entry.name}, with loss_scale",
        expected=f"a tensor on {device_type}, where it is known whether the step is skipped",
        got=kind,
        fix="build the optimizer with capturable=True, or use one that keeps its state in tensors",
    )
