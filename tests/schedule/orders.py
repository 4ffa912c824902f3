"""Orders to try: legal ones at random, and ones that turn round what must keep its order."""

from __future__ import annotations

import random

from fxzero.schedule.problem import Problem


def random_order(problem: Problem, rng: random.Random) -> list[int]:
    """A legal order: any call that may come next, of those a few at hand."""
    missing = [len(earlier) for earlier in problem.before]
    ready = [call for call, count in enumerate(missing) if not count]
    order = []
    while ready:
        call = ready.pop(rng.randrange(len(ready)))
        order.append(call)
        for other in problem.after[call]:
            missing[other] -= 1
            if not missing[other]:
                ready.append(other)
    return order


def with_turned(problem: Problem, earlier: int, later: int) -> list[int]:
    """The order of the program, with `later` and what it needs (but `earlier`) moved before `earlier`."""
    needed = {later}
    stack = [later]
    while stack:
        for other in problem.before[stack.pop()]:
            if other > earlier and other not in needed:
                needed.add(other)
                stack.append(other)
    moved = sorted(needed)
    rest = [call for call in range(len(problem)) if call not in needed]
    at = rest.index(earlier)
    return rest[:at] + moved + rest[at:]
