"""Problems like the end of a backward pass: gradients one after the other, of each a product that is sent."""

from __future__ import annotations

import random

from fxzero.schedule.problem import LAUNCH, RUN, WAIT, Problem
from tests.schedule.small import drawn_problem


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
    slowdown = rng.choice((1.0, 1.2))
    return drawn_problem(rng, kind, reads, launch_of, phase, slowdown=slowdown, hindrance=1.0, least_s=1, launch_s=0.25)
