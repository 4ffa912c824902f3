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
    count = len(kind)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"call_{call}") for call in range(count)]
    for node in nodes:
        node.meta.update(phase=rng.choice(("forward", "backward", "update")), module="")
    readers: list[list[int]] = [[other for other in range(count) if call in reads[other]] for call in range(count)]
    stored = [call for call in range(count) if kind[call] != WAIT]
    for call in stored:  # what a launch brings is read through its wait; what it sends stays until then
        readers[call] += [other for wait in readers[call] if kind[wait] == WAIT for other in readers[wait]]
        readers[call] += [launch_of.index(other) for other in readers[call] if kind[other] == LAUNCH]
    return Problem(
        nodes=nodes,
        lanes=["compute", "net:dp"],
        slowdown=[1.0, rng.choice((1.0, 1.0, 1.5))],
        hindrance=[1.0, rng.choice((1.0, 1.0, 2.5))],
        lane=[0 if what == RUN else 1 if what == LAUNCH else -1 for what in kind],
        kind=kind,
        seconds=[0.0 if what == WAIT else float(rng.randint(0, 5)) for what in kind],
        launch_s=[rng.choice((0.0, 0.5)) if what == LAUNCH else 0.0 for what in kind],
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
