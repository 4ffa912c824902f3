"""Problems of a few calls, made up at random, of which every legal order can be tried."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch import fx

from fxzero.schedule.problem import LAUNCH, RUN, WAIT, Memory, Problem


def small_problem(rng: random.Random, *, num_launches: int = 3, num_runs: int = 4) -> Problem:
    """Launches on one lane, each with its wait, and compute before, beside and behind them; memory of each value."""
    kinds = [RUN] * num_runs + [LAUNCH] * num_launches
    rng.shuffle(kinds)
    kind: list[int] = []
    reads: list[list[int]] = []
    launch_of: list[int] = []
    for what in kinds:
        values = [call for call, own in enumerate(kind) if own != LAUNCH]
        reads.append(sorted(rng.sample(values, min(len(values), rng.choice((0, 1, 2))))))
        kind.append(what)
        launch_of.append(-1)
        if what == LAUNCH:
            reads.append([len(kind) - 1])
            launch_of.append(len(kind) - 1)
            kind.append(WAIT)
    phases = [rng.choice(("forward", "backward", "update")) for _ in kind]
    slowdown, hindrance = rng.choice((1.0, 1.0, 1.5)), rng.choice((1.0, 1.0, 2.5))
    return drawn_problem(
        rng, kind, reads, launch_of, phases, slowdown=slowdown, hindrance=hindrance, least_s=0, launch_s=0.5
    )


def drawn_problem(
    rng: random.Random,
    kind: list[int],
    reads: list[list[int]],
    launch_of: list[int],
    phases: list[str],
    *,
    slowdown: float,
    hindrance: float,
    least_s: int,
    launch_s: float,
) -> Problem:
    """Calls of compute and of one lane beside it, with seconds and bytes that are drawn.

    Args:
        kind, reads, launch_of: as those of a Problem.
        phases: call -> that of its node.
        slowdown, hindrance: of the lane.
        least_s: seconds of a call, at least; 5 at most.
        launch_s: for which some launches hold compute.
    """
    graph = fx.Graph()
    nodes = [graph.placeholder(f"call_{call}") for call in range(len(kind))]
    for node, phase in zip(nodes, phases, strict=True):
        node.meta.update(phase=phase, module="")
    readers = [[other for other, read in enumerate(reads) if call in read] for call in range(len(kind))]
    stored = [call for call, what in enumerate(kind) if what != WAIT]
    for call in stored:  # what a launch brings is read through its wait; what it sends stays until then
        readers[call] += [other for wait in readers[call] if kind[wait] == WAIT for other in readers[wait]]
        readers[call] += [launch_of.index(other) for other in readers[call] if kind[other] == LAUNCH]
    return Problem(
        nodes=nodes,
        lanes=["compute", "net:dp"],
        slowdown=[1.0, slowdown],
        hindrance=[1.0, hindrance],
        lane=[0 if what == RUN else 1 if what == LAUNCH else -1 for what in kind],
        kind=kind,
        seconds=[0.0 if what == WAIT else float(rng.randint(least_s, 5)) for what in kind],
        launch_s=[rng.choice((0.0, launch_s)) if what == LAUNCH else 0.0 for what in kind],
        launch_of=launch_of,
        reads=reads,
        before=reads,
        memory=Memory(
            resting_bytes=1,
            size=[rng.randint(1, 5) for _ in stored],
            begin=stored,
            uses=[sorted({call, *readers[call]}) for call in stored],
        ),
    )


def all_orders(problem: Problem) -> Iterator[list[int]]:
    """Every legal order."""
    order: list[int] = []
    missing = [len(earlier) for earlier in problem.before]

    def extend() -> Iterator[list[int]]:
        if len(order) == len(problem):
            yield list(order)
        for call in range(len(problem)):
            if missing[call] or call in order:
                continue
            order.append(call)
            for other in problem.after[call]:
                missing[other] -= 1
            yield from extend()
            for other in problem.after[call]:
                missing[other] += 1
            order.pop()

    return extend()
