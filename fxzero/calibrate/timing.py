"""How long calls take: medians of several, on a device that other work may share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SAMPLES = 9


@dataclass(frozen=True)
class Measured:
    """One figure of a calibration, beside what the description that came of it says.

    Args:
        what: "ops.pointwise", "collectives.all_gather".
        case: which op, at which size.
        seconds: median of what was measured.
        predicted_s: by the description.
    """

    what: str
    case: str
    seconds: float
    predicted_s: float

    @property
    def residual(self) -> float:
        """By what part the prediction is above what was measured; below it where negative."""
        return self.predicted_s / self.seconds - 1


@dataclass(frozen=True)
class Clock:
    """Times calls on one device.

    One thread of a CPU is timed by its own clock, which stands still while the system runs something else.

    Args:
        device: where they run; a GPU is waited for around each sample.
        sample_s: how long a sample takes at least, so that the clock's own resolution does not count.
        samples: of which the median is taken.
    """

    device: torch.device
    sample_s: float = 2e-3
    samples: int = SAMPLES

    def seconds(self, call: Callable[[int], object]) -> float:
        """Median of the time of one call; it is given the number of the call, so that it may take turns with inputs."""
        call(0)
        once = self._sample(call, 1)
        repeats = max(1, min(1000, int(self.sample_s / max(once, 1e-7))))
        samples = min(5, self.samples) if once > 20 * self.sample_s else self.samples
        return statistics.median(self._sample(call, repeats) / repeats for _ in range(samples))

    def _sample(self, call: Callable[[int], object], repeats: int) -> float:
        now = time.thread_time if self._is_one_thread() else time.perf_counter
        settle(self.device)
        start = now()
        for number in range(repeats):
            call(number)
        settle(self.device)
        return now() - start

    def _is_one_thread(self) -> bool:
        return self.device.type == "cpu" and torch.get_num_threads() == 1


def settle(device: torch.device) -> None:
    """Return when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
