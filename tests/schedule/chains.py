"""Problems like the end of a backward pass: gradients one after the other, of each a product that is sent.

One of them is a step that follows itself: what the last gradient updates is gathered for the next step.
"""

from __future__ import annotations

import random
from dataclasses import replace

from fxzero.schedule.problem import CARRIED, LAUNCH, RUN, WAIT, Problem
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


def carrying_step(rng: random.Random) -> Problem:
    """A step that begins with a wait for what the one before has gathered, and gathers it again behind its update.

    Beside that a product that is sent and updates what nothing else reads, and a call of forward that needs nothing.
    """
    # carried, free, gradient | product, its reduction, its update | last gradient, its reduction, its update, gather
    kind = [CARRIED, RUN, RUN, RUN, LAUNCH, WAIT, RUN, RUN, LAUNCH, WAIT, RUN, LAUNCH]
    reads: list[list[int]] = [[], [], [0], [2], [3], [4], [5], [1, 2], [7], [8], [9], [10]]
    phase = [*["forward"] * 3, *["backward"] * 3, "update", *["backward"] * 3, "update", "update"]
    launch_of = [11, -1, -1, -1, -1, 4, -1, -1, -1, 8, -1, -1]
    slowdown, hindrance = rng.choice((1.0, 1.2)), rng.choice((1.0, 1.5))
    problem = drawn_problem(
        rng, kind, reads, launch_of, phase, slowdown=slowdown, hindrance=hindrance, least_s=1, launch_s=0.25
    )
    return replace(problem, seconds=[0.0, *problem.seconds[1:]])  # what was launched is waited for
