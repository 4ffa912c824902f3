"""How long calls take, on a device that other work may share.

[Note: calls in turns]
On a CPU a call that is made again and again finds its code, its data and the way through Python in caches, as no call
of a program does: there a small op takes ten times as long. So all calls that are to be timed take turns, in another
order each time. Most ops of a program have run shortly before on other data; so each turn is a few calls of the same
op, of which the first finds nothing in caches and the others their code. Means count, since a program's step is their
sum; and since turns of one call lie seconds apart, what the machine does at one moment falls on all alike.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SAMPLES = 9
IN_A_ROW = 3  # calls of a turn
KEPT = 8  # results that live on for a while, so that the next call finds no memory that was just used


@dataclass(frozen=True)
class Measured:
    """One figure of a calibration, beside what the description that came of it says.

    Args:
        what: "ops.pointwise", "collectives.all_gather".
        case: which op, at which size.
        seconds: mean or median of what was measured.
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
        turns_s: how long calls take turns at least.
    """

    device: torch.device
    sample_s: float = 2e-3
    samples: int = SAMPLES
    turns_s: float = 25.0

    def in_turns(self, calls: Sequence[Callable[[int], object]]) -> list[float]:
        """Mean seconds of each call, as a program makes it; on a GPU, which hides it, medians one by one.

        Args:
            calls: what to time; each is given the number of the call, so that it may take turns with inputs.
        """
        if self.device.type != "cpu":
            return [self.seconds(call) for call in calls]
        order = random.Random(0)
        now = self._now
        kept: deque[object] = deque(maxlen=KEPT)
        numbers = itertools.count()

        def turn(call: Callable[[int], object]) -> float:
            seconds = 0.0
            for number in itertools.islice(numbers, IN_A_ROW):
                start = now()
                made = call(number)
                seconds += now() - start
                kept.append(made)
            return seconds

        for call in calls:  # warms up
            turn(call)
        taken_s, rounds, began = [0.0] * len(calls), 0, time.perf_counter()
        while not rounds or time.perf_counter() - began < self.turns_s:
            for index in order.sample(range(len(calls)), len(calls)):
                taken_s[index] += turn(calls[index])
            rounds += 1
        return [seconds / rounds / IN_A_ROW for seconds in taken_s]

    def seconds(self, call: Callable[[int], object]) -> float:
        """Median of the time of one call; it is given the number of the call, so that it may take turns with inputs."""
        call(0)
        once = self._sample(call, 1)
        repeats = max(1, min(1000, int(self.sample_s / max(once, 1e-7))))
        samples = min(5, self.samples) if once > 20 * self.sample_s else self.samples
        return statistics.median(self._sample(call, repeats) / repeats for _ in range(samples))

    def _sample(self, call: Callable[[int], object], repeats: int) -> float:
        settle(self.device)
        start = self._now()
        for number in range(repeats):
            call(number)
        settle(self.device)
        return self._now() - start

    @property
    def _now(self) -> Callable[[], float]:
        one_thread = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.thread_time if one_thread else time.perf_counter


def settle(device: torch.device) -> None:
    """Return when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
