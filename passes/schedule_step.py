"""Calls stand in the order in which the step takes least time by the cost model, within a bound on memory.

Order only: no call is added, removed or changed, so results are bit-equal. Forward, backward and update are one
program to it: an update runs while backward still waits for its next gather. docs/schedule.md says how it is found.
"""

from __future__ import annotations

from fxzero.cost.hardware import Hardware, hardware_of
from fxzero.cost.memory import memory_timeline
from fxzero.cost.tasks import step_tasks
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import reorder
from fxzero.schedule.local_search import find_schedule
from fxzero.schedule.problem import Problem

_TRIES = 4


@graph_pass(requires=("updates-placed",), provides=("scheduled",))
def schedule_step(
    step: StepGraph, *, hardware: str = "auto", memory_bytes: int | None = None, backend: str = ""
) -> int:
    """Put all calls in the fastest order that is found, with launches early, waits late and memory within its bound.

    Args:
        step: the graph, in a legal order.
        hardware: name or path of a machine's description, whose costs decide; "auto": by the graph's device.
        memory_bytes: that tensors of the device may take, state included; None: as many as in the order that it has.
        backend: what carries collectives, for "auto".

    Raises:
        PlanError: if no order is found that takes so little memory, naming the call at which it does not fit.
    """
    machine = hardware_of(step, backend=backend) if hardware == "auto" else Hardware.load(hardware)
    problem = Problem.of(step, step_tasks(step, machine), slowdown=machine.slowdown)
    limit = memory_timeline(step).total.max() if memory_bytes is None else memory_bytes
    allowed = int(limit)
    old = step.calls()
    for _ in range(_TRIES):
        found = find_schedule(problem, bound_bytes=allowed)
        moved = reorder(step, [problem.nodes[call] for call in found.order])
        # What is written in place is decided anew in every order; a copy more may arise, which the problem cannot know.
        above = int(memory_timeline(step).total.max()) - int(limit)
        if above <= 0:
            return moved
        allowed -= above
    reorder(step, old)
    raise RewriteError.of(
        f"{step.title}, memory",
        expected=f"an order within {int(limit):,} bytes",
        got=f"{above:,} bytes more than was counted",
        fix="report this graph, and set schedule='fixed'",
    )
