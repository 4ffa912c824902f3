"""Calls stand in the order in which the step takes least time by the cost model, within a bound on memory.

Order only: no call is added, removed or changed, so results are bit-equal. Forward, backward and update are one
program to it: an update runs while backward still waits for its next gather. docs/schedule.md says how it is found.
"""

from __future__ import annotations

import torch

from fxzero.cost.hardware import hardware_of
from fxzero.cost.memory import memory_timeline
from fxzero.cost.recorded import Machine, RecordedCosts, knows, signatures
from fxzero.cost.tasks import step_tasks
from fxzero.errors import HardwareError, PlanError, RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import reorder
from fxzero.graph.step_graph import device_of
from fxzero.schedule.local_search import find_schedule
from fxzero.schedule.problem import Problem

_TRIES = 4


@graph_pass(requires=("updates-placed",), provides=("scheduled",))
def schedule_step(
    step: StepGraph,
    *,
    hardware: str = "auto",
    memory_bytes: int | None = None,
    backend: str = "",
    costs: RecordedCosts | str | None = None,
    any_machine: bool = False,
) -> int:
    """Put all calls in the fastest order that is found, with launches early, waits late and memory within its bound.

    Args:
        step: the graph, in a legal order.
        hardware: name or path of a machine's description, whose costs decide; "auto": by the graph's device.
        memory_bytes: that tensors of the device may take, state included; None: as many as in the order that it has.
        backend: what carries collectives, for "auto".
        costs: recorded ones, or their file, which decide for the calls that they know; others cost as `hardware` says.
        any_machine: read the file though its costs were recorded on another machine.

    Raises:
        HardwareError: if there is no such file, or it is another machine's, or knows no call of this step.
        PlanError: if no order is found that takes so little memory, naming the call at which it does not fit.
    """
    machine = hardware_of(step, backend=backend, named=hardware)
    if isinstance(costs, str):
        costs = RecordedCosts.load(costs, machine=Machine.of(torch.device(device_of(step))), force=any_machine)
    recorded = None
    if costs is not None:
        recorded, machine = _known_costs(step, costs), machine.undisturbed()
    tasks = step_tasks(step, machine, recorded=recorded)
    problem = Problem.of(step, tasks, slowdown=machine.slowdown, hindrance=machine.hindrance)
    limit = memory_timeline(step).total.max() if memory_bytes is None else memory_bytes
    allowed = int(limit)
    old = step.calls()
    above = 0
    for _ in range(_TRIES):
        try:
            found = find_schedule(problem, bound_bytes=allowed)
        except PlanError:
            if not above:
                raise
            break
        moved = reorder(step, [problem.nodes[call] for call in found.order])
        _wait_late(step)
        # What is written in place is decided anew in every order; a copy more may arise, which the problem cannot know.
        above = int(memory_timeline(step).total.max()) - int(limit)
        if above <= 0:
            return moved
        allowed -= above
    reorder(step, old)
    if int(memory_timeline(step).total.max()) <= int(limit):
        step.remarks["schedule_step"] = f"the order of the passes: any other that was found takes {above:,} bytes more"
        return 0
    raise RewriteError.of(
        f"{step.title}, memory",
        expected=f"an order within {int(limit):,} bytes",
        got=f"{above:,} bytes more than was counted",
        fix="report this graph, and set schedule='fixed'",
    )


def _known_costs(step: StepGraph, costs: RecordedCosts) -> dict[str, float]:
    """Signature of a call -> recorded seconds, if any call of the step is among them."""
    found = costs.seconds
    if not knows(found, step):
        own = next(signatures(step), None)
        raise HardwareError.of(
            f"{costs!r}",
            expected=f"costs of calls of this step, such as {own!r}" if own else "costs",
            got=f"{len(found)} others, such as {min(found)!r}" if found else "none",
            fix="record this step: step.record(*batch, costs=FILE)",
        )
    return found


def _wait_late(step: StepGraph) -> None:
    """Wait for what the step before has launched where it is first read: the search takes it to be there at once."""
    position = step.positions()
    for wait in step.calls(c10d.wait):
        if c10d.is_ahead(c10d.launched_by(wait)) and wait.users:
            min(wait.users, key=position.__getitem__).prepend(wait)
