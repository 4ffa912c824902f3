"""Training that only skips steps comes to an end, though the host never waits for the device to say so."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxzero.errors import GradientOverflowError

_AT_MOST = 1.0  # a dynamic scale above this may still come down to one that works


class SkippedSteps:
    """Looks at the scaler's state after each step, as soon as that costs no waiting.

    On the CPU that is at once; on an accelerator the numbers are copied to the host behind the step, and looked at
    in the first later step that finds them there.

    Args:
        limit: so many skipped steps in a row are too many.
        dynamic: whether the scale may still fall.
    """

    def __init__(self, *, limit: int, dynamic: bool) -> None:
        self.limit = limit
        self.dynamic = dynamic
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None, tuple[str, ...]] | None = None

    def note(self, numbers: torch.Tensor, names: Sequence[str]) -> None:
        """A step has been launched, which leaves these numbers.

        Args:
            numbers: the scaler's scale, skipped and overflowed (see `fxzero.capture.loss_scaling`), float64.
            names: the parameters that `overflowed` counts.
        """
        if self._pending is not None and not self._arrived():
            return  # one look at a time; the next step's will do
        if numbers.device.type != "cuda":
            self._pending = (numbers, None, tuple(names))
            self.check()
            return
        host = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (host, event, tuple(names))

    def check(self) -> None:
        """Raise GradientOverflowError if too many steps in a row are known to have been skipped."""
        if self._pending is None or not self._arrived():
            return
        numbers, _, names = self._pending
        self._pending = None
        scale, skipped, overflowed = numbers.tolist()
        if skipped >= self.limit and (scale <= _AT_MOST or not self.dynamic):
            raise GradientOverflowError.of(
                where=f"gradient of {names[int(overflowed)]}",
                expected=f"a finite one in {self.limit} steps",
                got=f"infinities or NaN in each, with a loss scale of {scale:g}; {int(skipped)} steps were skipped",
                fix="look at the loss of these batches and at that parameter's module; parameters and optimizer state "
                "are as the last good step left them",
            )

    def _arrived(self) -> bool:
        assert self._pending is not None
        event = self._pending[1]
        return event is None or event.query()
