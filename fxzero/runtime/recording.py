"""What was seen of some steps: when each call ran, and what it took.

Of each call the mean of the steps counts: means add up to the step, where medians leave out what happens rarely to each
call, but in each step to some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from fxzero.graph import StepGraph
from fxzero.graph.lanes import LAUNCHES, RUNS, WAITS, Event


@dataclass(frozen=True)
class Sample:
    """One step.

    Args:
        steps: its programs, one a microbatch.
        events: as they were issued; times since the first call began.
        reached_s: of each program: when each node was reached, by position.
        step_seconds: from the first call of the first program to the end of the last one.
        call_s: of the whole call of the TrainStep: with guards, agreement between ranks, and state bound to inputs.
    """

    steps: tuple[StepGraph, ...]
    events: tuple[Event, ...]
    reached_s: tuple[Sequence[float], ...]
    step_seconds: float
    call_s: float


@dataclass(frozen=True)
class Recording:
    """Some steps of the same programs on this rank; [Note: how exact a flight is] in `runtime/flights.py`.

    Args:
        samples: one a step, at least one.
    """

    samples: tuple[Sample, ...]

    @property
    def steps(self) -> tuple[StepGraph, ...]:
        """The programs, one a microbatch."""
        return self.samples[0].steps

    @property
    def typical(self) -> Sample:
        """The step of median time: what a picture shows."""
        return sorted(self.samples, key=lambda sample: sample.step_seconds)[len(self.samples) // 2]

    @property
    def step_seconds(self) -> float:
        """Median time of the programs."""
        return median(sample.step_seconds for sample in self.samples)

    @property
    def call_s(self) -> float:
        """Median time of the whole call."""
        return median(sample.call_s for sample in self.samples)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Name of a node -> mean seconds: of a collective or swap on its lane, of a wait without standing still.

        Programs of one step give most of their calls the same names; where they do, the last one's are meant.
        """
        return {name: value for step in dict.fromkeys(map(id, self.steps)) for name, value in self._of(step).items()}

    def seconds_of(self, step: StepGraph) -> dict[str, float]:
        """The same for one program."""
        return self._of(id(step))

    @cached_property
    def launch_s(self) -> dict[str, float]:
        """Name of a launch -> mean seconds for which it held the compute lane."""
        return _means((e.node.name, e.seconds) for s in self.samples for e in s.events if e.kind == LAUNCHES)

    @cached_property
    def waited_s(self) -> dict[str, float]:
        """Name of a wait -> mean seconds for which compute stood still at it."""
        return _means((e.node.name, e.seconds) for s in self.samples for e in s.events if e.kind == WAITS)

    def _of(self, step: int) -> dict[str, float]:
        return _means(
            (event.node.name, event.seconds)
            for sample in self.samples
            for event in sample.events
            if event.kind == RUNS and id(sample.steps[event.program]) == step
        )

    def __str__(self) -> str:
        count = len(self.samples)
        largest = sorted(self.seconds.items(), key=lambda item: -item[1])[:5]
        lines = [f"{count} steps, programs {1e3 * self.step_seconds:.2f} ms (median), calls {1e3 * self.call_s:.2f} ms"]
        lines += [f"  %{name} {1e3 * seconds:.3f} ms" for name, seconds in largest]
        return "\n".join(lines)


def _means(found: Iterable[tuple[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for name, seconds in found:
        values[name].append(seconds)
    return {name: fmean(each) for name, each in values.items()}
