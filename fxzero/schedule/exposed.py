"""What of transfers no order hides under compute.

[Note: exposed transfers]
While a launch is under way, compute can only run calls that need not stand before it nor behind its wait. Launches of
one lane are under way one after the other, and each call runs once. So for every set of them, compute stands still at
least for the seconds that they take, less those of what can run beside any of them. What no gradient leads to (the
decay of a parameter) may run beside many; updates are therefore counted once for the whole set, other calls for each.
What runs beside may be slowed down by all lanes, and so cover more than it takes alone.
"""

from __future__ import annotations

import math

from fxzero.schedule.problem import LAUNCH, WAIT, Problem, closure


def exposed_seconds(problem: Problem, lane: int, *, num_launches: int) -> float:
    """The least that compute stands still for a lane, whatever the order.

    Args:
        problem: what is ordered.
        lane: whose launches are looked at.
        num_launches: of how many, the longest ones; each takes time linear in the number of calls.
    """
    launches = [call for call in range(len(problem)) if problem.kind[call] == LAUNCH and problem.lane[call] == lane]
    launches.sort(key=lambda call: (-problem.seconds[call], call))
    factor = math.prod(problem.slowdown)
    alone: list[tuple[float, int]] = []
    updates: dict[int, set[int]] = {}
    for launch in launches[:num_launches]:
        beside = _beside(problem, launch)
        updates[launch] = {call for call in beside if problem.nodes[call].meta["phase"] == "update"}
        covered = factor * sum(compute_seconds(problem, call) for call in beside - updates[launch])
        alone.append((problem.seconds[launch] - covered, launch))
    best = total = 0.0
    taken: set[int] = set()
    for seconds, launch in sorted(alone, reverse=True):
        if seconds <= 0:
            break
        total += seconds
        taken |= updates[launch]
        best = max(best, total - factor * sum(compute_seconds(problem, call) for call in taken))
    return best


def _beside(problem: Problem, launch: int) -> set[int]:
    """The calls with compute that can run while a launch is under way."""
    fixed = closure(problem.before, launch) | {launch}
    later = closure(problem.after, launch)
    for wait in later:
        if problem.kind[wait] == WAIT and problem.launch_of[wait] == launch:
            fixed |= closure(problem.after, wait) | {wait}
    return {call for call in range(len(problem)) if call not in fixed and compute_seconds(problem, call)}


def compute_seconds(problem: Problem, call: int) -> float:
    """Seconds for which a call holds the compute lane, if nothing else runs."""
    if problem.kind[call] == LAUNCH:
        return problem.launch_s[call]
    return problem.seconds[call] if problem.lane[call] == 0 else 0.0
