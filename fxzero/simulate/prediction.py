"""What a step takes on a machine: its tasks, its timeline, and which lane it would pay to make faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from fxzero.cost.hardware import Hardware
from fxzero.cost.recorded import knows
from fxzero.cost.tasks import Task, step_tasks
from fxzero.graph import StepGraph
from fxzero.graph.lanes import COMPUTE
from fxzero.schedule.bound import lower_bound
from fxzero.schedule.problem import Problem
from fxzero.simulate.timeline import SimulationError, Timeline, simulate


@dataclass(frozen=True)
class Prediction:
    """A step on a machine.

    Args:
        hardware: the machine.
        tasks: what each call of its programs occupies.
        timeline: when it does.
    """

    hardware: Hardware
    tasks: dict[fx.Node, Task]
    timeline: Timeline

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.timeline.step_seconds

    @cached_property
    def bound_s(self) -> float | None:
        """Seconds that no order of these calls gets below, with as much memory as they like.

        Of several microbatches it is not known: lanes may still have to do for one while the next one computes.
        """
        if len(self.timeline.steps) != 1:
            return None
        step, machine = self.timeline.steps[0], self.hardware
        problem = Problem.of(step, self.tasks, slowdown=machine.slowdown, hindrance=machine.hindrance)
        return lower_bound(problem).seconds

    @cached_property
    def gains_s(self) -> dict[str, float]:
        """Lane -> seconds by which the step would be shorter if that lane took half the time; largest first.

        Beside them "no waits": if compute never stood still.
        """
        found = {lane: self.seconds - self._with_faster(lane) for lane in self.timeline.lanes}
        found["no waits"] = self.timeline.exposed_s
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _with_faster(self, lane: str) -> float:
        def faster(task: Task) -> Task:
            if task.resource == lane:
                task = replace(task, seconds=task.seconds / 2)
            return replace(task, launch_s=task.launch_s / 2) if lane == COMPUTE else task

        known: dict[Task, Task] = {}
        tasks = {}
        for node, task in self.tasks.items():
            if task not in known:
                known[task] = faster(task)
            tasks[node] = known[task]
        return _simulated(self.timeline.steps, tasks, self.hardware).step_seconds


def predict(
    steps: Sequence[StepGraph], hardware: Hardware, *, recorded: Mapping[str, float] | None = None
) -> Prediction:
    """What a step takes.

    Args:
        steps: its programs, one a microbatch; equal ones are the same object.
        hardware: the machine.
        recorded: signature of an op -> measured seconds (`step_tasks`). Where it knows the step, what lanes, ranks
            and compute do to each other is in it, and is not counted again.

    Raises:
        SimulationError: if a cost makes no sense, or there is none because a shape is known only when the step runs.
    """
    tasks: dict[fx.Node, Task] = {}
    programs = {id(step): step for step in steps}.values()
    measured = recorded is not None and any(knows(recorded, step) for step in programs)
    machine = hardware.undisturbed() if measured else hardware
    for step in programs:
        _check_shapes(step)
        tasks |= step_tasks(step, machine, recorded=recorded)
    return Prediction(machine, tasks, _simulated(steps, tasks, machine))


def _simulated(steps: Sequence[StepGraph], tasks: Mapping[fx.Node, Task], hardware: Hardware) -> Timeline:
    return simulate(steps, tasks, slowdown=hardware.slowdown, hindrance=hardware.hindrance)


def _check_shapes(step: StepGraph) -> None:
    """Raise SimulationError where a shape depends on values: what such a call takes is not known before."""
    for node in step.calls():
        val = node.meta.get("val")
        for tensor in val if isinstance(val, (list, tuple)) else [val]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor.numel(), int):
                where = f"%{node.name} of {node.meta.get('module') or 'the model'}"
                raise SimulationError.of(
                    where,
                    expected="a shape that is known before the step runs",
                    got=f"{node.target}, whose shape depends on values",
                    fix="see what it takes with step.record()",
                )
