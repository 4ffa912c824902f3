"""What messages and compute do to each other where they share cores, as in a step over gloo.

[Note: figures of recorded steps]
The small step is recorded in its three forms, in turns, so that what else the machine does falls on all alike.
    launches    of both forms with messages, a line through all: with it, the simulator tells what they held the thread
                for. It is more than alone, since a launch wakes threads that carry messages, on the same core.
    hindrance   what a message takes while compute stands still passes as alone; the rest of what it would take alone
                has taken as long as compute ran beside it.
    slowdown    calls take longer than without messages, on the whole: that happened while messages were under way.
    among_ranks what is left of the time of a step, when the simulator knows all of that: no rank is always as fast as
                the others, and all wait for the slowest, at one message after the other.
Means count, not medians: a launch behind which the system ran something else is rare, but takes as long as many others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, nnls

from fxzero.calibrate.recorded_steps import StepMeans
from fxzero.calibrate.small_step import ALONE, BY_ALL_REDUCES, BY_MESSAGES
from fxzero.calibrate.timing import Measured
from fxzero.cost.communication import message_bytes
from fxzero.cost.tasks import Task
from fxzero.graph import StepGraph
from fxzero.graph.lanes import COMPUTE, LAUNCHES, is_launch, is_wait, lane_of_launch
from fxzero.simulate.timeline import Timeline, simulate

MOST = 20.0  # times as long as alone


@dataclass(frozen=True)
class BesideCompute:
    """What steps have shown.

    Args:
        launch_s: for which launching a message holds the thread.
        launch_bytes_s: bytes a second of the whole tensor, beside that; 0: it takes no time.
        slowdown: by what factor compute takes longer while messages are under way.
        hindrance: by what factor messages take longer while compute runs.
        among_ranks: by what factor compute takes longer all the time, since ranks wait for each other.
    """

    launch_s: float = 0.0
    launch_bytes_s: float = 0.0
    slowdown: float = 1.0
    hindrance: float = 1.0
    among_ranks: float = 1.0


def beside_compute(
    steps: Mapping[str, StepMeans], programs: Mapping[str, StepGraph], alone_s: Callable[[str, float], float]
) -> tuple[BesideCompute, list[Measured]]:
    """Figures of recorded steps ([Note: figures of recorded steps]), and the steps beside what these tell of them.

    Args:
        steps: form -> what was seen of it.
        programs: form -> the program that was recorded.
        alone_s: (form, bytes of the whole tensor) -> seconds of a message without compute.
    """
    cases = [
        _Case.of(programs[form], steps[ALONE], steps[form], form, alone_s) for form in (BY_MESSAGES, BY_ALL_REDUCES)
    ]
    hindrance = float(np.mean([case.hindrance() for case in cases]))
    slowdown = float(np.mean([case.slowdown() for case in cases]))
    launch_s = {case.form: case.launch_s(slowdown, hindrance) for case in cases}
    among_ranks = float(np.mean([case.among_ranks(slowdown, hindrance, launch_s[case.form]) for case in cases]))
    sizes = np.concatenate([case.sizes for case in cases])
    constant, slope = _line_of_sums(sizes, np.concatenate([*launch_s.values()]))
    rows = []
    for case in cases:
        told = case.simulated(among_ranks, slowdown, hindrance, constant + slope * np.array(case.sizes))
        what = f"a small step with {case.form}"
        rows.append(Measured("beside_compute", what, case.seen.step_s, told.step_seconds))
    return BesideCompute(constant, 1 / slope if slope > 0 else 0.0, slowdown, hindrance, among_ranks), rows


def _line_of_sums(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(seconds of no bytes, seconds of a byte): least squares, not of relative errors, so that sums are kept."""
    largest = sizes.max()
    (constant, slope), _ = nnls(np.stack([np.ones(len(sizes)), sizes / largest], axis=1), seconds)
    return float(constant), float(slope / largest)


@dataclass(frozen=True)
class _Case:
    """One form.

    Args:
        step: its program.
        alone: what was seen without messages.
        seen: what was seen with them.
        form: which.
        sizes: bytes of the whole tensor of each message.
        message_s: that each would take alone.
    """

    step: StepGraph
    alone: StepMeans
    seen: StepMeans
    form: str
    sizes: Sequence[float]
    message_s: Sequence[float]

    @classmethod
    def of(
        cls, step: StepGraph, alone: StepMeans, seen: StepMeans, form: str, alone_s: Callable[[str, float], float]
    ) -> _Case:
        sizes = [message_bytes(node) for node in step.calls() if is_launch(node)]
        return cls(step, alone, seen, form, sizes, [alone_s(form, size) for size in sizes])

    def hindrance(self) -> float:
        needed_s = sum(self.message_s)
        carried_s = max(needed_s - self.seen.still_s, needed_s / MOST)
        return min(MOST, max(1.0, (self.seen.flight_s - self.seen.still_s) / carried_s))

    def slowdown(self) -> float:
        longer_s = sum(self.seen.compute_s) - sum(self.alone.compute_s)
        beside_s = max(self.seen.beside_s, 1e-9)
        return min(MOST, 1 + max(0.0, longer_s) / max(beside_s - longer_s, beside_s / MOST))

    def launch_s(self, slowdown: float, hindrance: float) -> np.ndarray:
        """Of each launch, so that the simulator, where messages slow them down too, tells what was seen."""
        found = seen = np.array(self.seen.launch_s)
        for _ in range(5):  # shorter ones overlap less
            told = self.simulated(1.0, slowdown, hindrance, found)
            found = found * seen / np.array([event.seconds for event in told.events if event.kind == LAUNCHES])
        return found

    def among_ranks(self, slowdown: float, hindrance: float, launch_s: np.ndarray) -> float:
        """With which the simulator tells the time that was seen."""

        def above_s(factor: float) -> float:
            return self.simulated(factor, slowdown, hindrance, launch_s).step_seconds - self.seen.step_s

        if above_s(1.0) >= 0:
            return 1.0
        return MOST if above_s(MOST) <= 0 else float(brentq(above_s, 1.0, MOST, xtol=1e-3))

    def simulated(self, among_ranks: float, slowdown: float, hindrance: float, launch_s: np.ndarray) -> Timeline:
        """The step, if its launches take so long alone, in order."""
        compute_s, wait_s = iter(self.alone.compute_s), iter(self.seen.wait_s)
        messages = zip(self.message_s, launch_s, strict=True)
        tasks = {}
        for node in self.step.calls():
            if is_launch(node):
                tasks[node] = Task(lane_of_launch(node), *map(float, next(messages)))
            else:
                tasks[node] = Task(COMPUTE, next(wait_s if is_wait(node) else compute_s) * among_ranks)
        return simulate(self.step, tasks, slowdown=lambda lane: slowdown, hindrance=lambda lane: hindrance)
