"""Into how many pieces the products beside each collective are cut: what a step is predicted to take decides.

What is looked at is the step as it is when products are cut: what later passes send over other axes is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fxzero.cost.hardware import Hardware
from fxzero.cost.tasks import step_tasks
from fxzero.graph import StepGraph
from fxzero.schedule.evaluate import peak_of, times_of
from fxzero.schedule.list_schedule import Policy, list_schedule, waits_at_readers, ways_to_end
from fxzero.schedule.problem import Problem

NO_GAIN = 1e-4  # of the step: pieces that save less are not worth their calls

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Estimate:
    """How long a step takes, for the order that it will be put in.

    Args:
        hardware: the machine.
        by_cost: an order by cost, of which one list schedule stands for the best; else that of the program.
        memory_bytes: that such an order may take; None: as much as that of the program.
    """

    hardware: Hardware
    by_cost: bool
    memory_bytes: int | None = None

    def seconds(self, step: StepGraph) -> float:
        """Predicted seconds of a step."""
        machine = self.hardware
        tasks = step_tasks(step, machine)
        problem = Problem.of(step, tasks, slowdown=machine.slowdown, hindrance=machine.hindrance)
        program = list(range(len(problem)))
        if not self.by_cost:
            return times_of(problem, program).seconds
        bound = max(self.memory_bytes or 0, peak_of(problem, program))
        order = list_schedule(problem, Policy(), way_out=program, bound_bytes=bound, ways=ways_to_end(problem))
        orders = (program, order, waits_at_readers(problem, order))
        return min(times_of(problem, order).seconds for order in orders)


@dataclass(frozen=True)
class PieceCounts(Generic[Kind]):
    """What was found.

    Args:
        chosen: kind of collective -> number of pieces; the others stay whole.
        seconds: of the step with these.
        whole_s: of the step with none.
    """

    chosen: dict[Kind, int]
    seconds: float
    whole_s: float


def fewest_seconds(
    options: Mapping[Kind, Sequence[int]], seconds: Callable[[Mapping[Kind, int]], float], *, most: int
) -> PieceCounts[Kind]:
    """Numbers of pieces with which a step takes least time: never more than with all whole.

    All kinds in equally many pieces come first, then one kind after the other in another number than in the best so
    far, until that changes nothing for any of them.

    Args:
        options: kind of collective -> numbers of pieces, ascending.
        seconds: of the step with these numbers; kinds that are left out stay whole.
        most: how many steps are looked at, beside the whole one.
    """
    search = _Search(seconds, most)
    whole_s = search.best_s
    for count in sorted({count for counts in options.values() for count in counts}):
        search.consider({kind: count for kind, counts in options.items() if count in counts})
    last: dict[Kind, int] | None = None
    while last != search.best and search.left:
        last = search.best
        for kind, counts in options.items():
            for count in (1, *counts):
                search.consider({**search.best, kind: count})
    return PieceCounts(search.best, search.best_s, whole_s)


@dataclass
class _Search(Generic[Kind]):
    """The best so far, and how many more steps may be looked at."""

    seconds: Callable[[Mapping[Kind, int]], float]
    left: int
    best: dict[Kind, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.best_s = self.seconds({})
        self.known = {frozenset[tuple[Kind, int]]()}

    def consider(self, counts: Mapping[Kind, int]) -> None:
        cut = {kind: count for kind, count in counts.items() if count > 1}
        key = frozenset(cut.items())
        if key in self.known or not self.left:
            return
        self.known.add(key)
        self.left -= 1
        found = self.seconds(cut)
        if found < self.best_s * (1 - NO_GAIN):
            self.best, self.best_s = cut, found
