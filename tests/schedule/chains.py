"""Problems like the end of a backward pass: gradients one after the other, of each a product that is sent."""

from __future__ import annotations

import random

from torch import fx

from fxzero.schedule.problem import LAUNCH, RUN, WAIT, Memory, Problem


def backward_chain(rng: random.Random, *, num_products: int = 1, update: bool = True) -> Problem:
    """A chain of gradients; the last one is sent itself, of the others a product, which may be put off.

    Seconds, bytes and slowdown are drawn; an update may follow the first of what is sent.
    """
    kind: list[int] = []
    reads: list[list[int]] = []
    phase: list[str] = []

    def add(what: int, read: list[int], of: str = "backward") -> int:
        kind.append(what)
        reads.append(read)
        phase.append(of)
        return len(kind) - 1

    last: list[int] = []
    for index in range(num_products):
        last = [add(RUN, last)]
        sent = add(WAIT, [add(LAUNCH, [add(RUN, last)])])
        if update and not index:
            add(RUN, [sent], "update")
    add(WAIT, [add(LAUNCH, [add(RUN, last)])])
    launch_of = [read[0] if what == WAIT else -1 for what, read in zip(kind, reads, strict=True)]
    graph = fx.Graph()
    nodes = [graph.placeholder(f"call_{call}") for call in range(len(kind))]
    for node, of in zip(nodes, phase, strict=True):
        node.meta.update(phase=of, module="")
    readers = [[other for other, read in enumerate(reads) if call in read] for call in range(len(kind))]
    stored = [call for call, what in enumerate(kind) if what != WAIT]
    for call in stored:  # what a launch brings is read through its wait; what it sends stays until then
        readers[call] += [other for wait in readers[call] if kind[wait] == WAIT for other in readers[wait]]
        readers[call] += [launch_of.index(other) for other in readers[call] if kind[other] == LAUNCH]
    return Problem(
        nodes=nodes,
        lanes=["compute", "net:dp"],
        slowdown=[1.0, rng.choice((1.0, 1.2))],
        hindrance=[1.0, 1.0],
        lane=[0 if what == RUN else 1 if what == LAUNCH else -1 for what in kind],
        kind=kind,
        seconds=[0.0 if what == WAIT else float(rng.randint(1, 5)) for what in kind],
        launch_s=[rng.choice((0.0, 0.25)) if what == LAUNCH else 0.0 for what in kind],
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
