"""When each call of a step runs, on which lane, and what stands still meanwhile: predicted, or as it was measured.

[Note: how a program runs]
One thread issues the calls in program order. Compute runs in that order on one lane. A launch (collective, swap_out,
swap_in) is put onto its own lane when it is reached, which may hold the compute lane for a moment; a lane takes its
launches in the order in which they come. A wait holds the compute lane until its launch is done: on a GPU the stream
waits, on the CPU the main thread, which comes to the same here. An update on the host holds the thread that issues, so
what comes after it cannot begin before its end; a GPU meanwhile does what it was given before. While a lane is busy,
compute may run slower, by a factor for each lane; factors of several lanes multiply. Microbatches' programs run one
after the other.

[Note: steps in a chain]
A step that launches gathers for the next one is told as one of many: a step before it is simulated too, and what that
leaves under way travels while this one begins. Its time is what it adds to the chain, from the moment at which compute
begins with it to that at which compute begins with the next. A transfer over the end is shown in two parts: to the end
of the step, and the rest of it, which is the step before's, at the start. Steps are taken to follow each other at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import fx

from fxzero.cost.contention import BusyLanes
from fxzero.cost.tasks import Task
from fxzero.errors import FxzeroError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import (
    COMPUTE,
    HOST,
    LANES,
    LAUNCHES,
    RUNS,
    WAITS,
    Event,
    is_launch,
    is_wait,
    lane_of_launch,
    launch_of,
)


class SimulationError(FxzeroError):
    """Raised when a program cannot be simulated: a call without a task, or a task that makes no sense for its call."""


@dataclass(frozen=True)
class Timeline:
    """What a step does when.

    Args:
        steps: its programs, one a microbatch.
        events: in the order in which they are issued.
        reached_s: of each program: when the thread that issues comes to each node, by position.
        step_seconds: until all lanes are done; where gathers are launched for the next step, until that begins.
    """

    steps: tuple[StepGraph, ...]
    events: tuple[Event, ...]
    reached_s: tuple[np.ndarray, ...]
    step_seconds: float

    @cached_property
    def lanes(self) -> list[str]:
        """The lanes with any event, compute first."""
        found = {event.lane for event in self.events} | {COMPUTE}
        return sorted(found, key=lambda lane: (LANES.index(lane.partition(":")[0]), lane))

    @cached_property
    def busy_s(self) -> dict[str, float]:
        """Lane -> seconds in which it runs or launches something."""
        busy = dict.fromkeys(self.lanes, 0.0)
        for event in self.events:
            if event.kind != WAITS:
                busy[event.lane] += event.seconds
        return busy

    @cached_property
    def idle_s(self) -> dict[str, float]:
        """Lane -> seconds of the step in which it does not."""
        return {lane: self.step_seconds - busy for lane, busy in self.busy_s.items()}

    @cached_property
    def exposed(self) -> list[Event]:
        """The waits for which compute stood still, longest first."""
        return sorted((event for event in self.events if event.kind == WAITS), key=lambda event: -event.seconds)

    @cached_property
    def transfers(self) -> dict[tuple[int, fx.Node], Event]:
        """(program, launch) -> what its lane does for it."""
        found = ((event.program, event.node, event) for event in self.events if event.lane != COMPUTE)
        return {(program, node): event for program, node, event in found if is_launch(node)}

    def lane_of(self, wait: Event) -> str:
        """The lane that compute stood still for."""
        launch = launch_of(wait.node)
        if c10d.is_ahead(launch):
            return lane_of_launch(launch)
        transfer = self.transfers.get((wait.program, launch))
        return COMPUTE if transfer is None else transfer.lane

    @property
    def exposed_s(self) -> float:
        """Seconds for which compute stood still, all waits together."""
        return math.fsum(event.seconds for event in self.exposed)


def simulate(
    steps: StepGraph | Sequence[StepGraph],
    tasks: Mapping[fx.Node, Task],
    *,
    slowdown: Callable[[str], float] = lambda lane: 1.0,
) -> Timeline:
    """When each call of a step would run; linear in the number of nodes ([Note: steps in a chain]).

    Args:
        steps: its program, or its programs, one a microbatch.
        tasks: what each call occupies, for all programs together.
        slowdown: lane -> the factor by which compute takes longer while it is busy, 1 or more
            (`Hardware.slowdown`).

    Raises:
        SimulationError: if a call has no task, or one that makes no sense for it.
    """
    programs = (steps,) if isinstance(steps, StepGraph) else tuple(steps)
    run = _Run(slowdown)
    reached = [run.program(index, step, tasks) for index, step in enumerate(programs)]
    if not run.ahead:
        return Timeline(programs, tuple(run.events), tuple(reached), run.end_s)
    run.begin_again()
    reached = [run.program(index, step, tasks) for index, step in enumerate(programs)]
    end_s = run.free_s
    events = [replace(event, end_s=min(event.end_s, end_s)) for event in run.events if event.start_s < end_s]
    return Timeline(programs, tuple(events), tuple(reached), end_s)


class _Run:
    """The state of all lanes as the thread that issues goes through the step.

    Attributes:
        now: when the compute lane is free, and what was issued so far for it is done.
        issued: when the thread itself is free; only what it computes on the host holds it.
        ahead: parameter -> when its gather for the next step, launched so far, is done.
    """

    def __init__(self, slowdown: Callable[[str], float]) -> None:
        self.events: list[Event] = []
        self.now = self.issued = 0.0
        self.ahead: dict[str, float] = {}
        self._factor_of = slowdown
        self._free: dict[str, float] = defaultdict(float)
        self._factors: dict[str, float] = {}
        self._busy = BusyLanes()

    @property
    def end_s(self) -> float:
        """When everything that was issued is done."""
        return max([self.now, self.issued, *self._free.values()])

    @property
    def free_s(self) -> float:
        """When the next program can begin."""
        return max(self.now, self.issued)

    def begin_again(self) -> None:
        """The next step begins: what is under way goes on, and times count from now."""
        start = self.free_s
        self.now = self.issued = 0.0
        under_way = [event for event in self.events if event.end_s > start]
        self.events = [
            replace(event, start_s=max(event.start_s - start, 0.0), end_s=event.end_s - start) for event in under_way
        ]
        self.ahead = {name: max(done - start, 0.0) for name, done in self.ahead.items()}
        self._free = defaultdict(float, {lane: max(free - start, 0.0) for lane, free in self._free.items()})
        self._busy = self._busy.since(start)

    def program(self, index: int, step: StepGraph, tasks: Mapping[fx.Node, Task]) -> np.ndarray:
        """Run one program; when each of its nodes is reached."""
        reached = np.zeros(len(step.graph.nodes))
        done: dict[fx.Node, float] = {}  # of what other lanes than compute have made, and of its views
        for node in filter(c10d.is_ahead, step.placeholders):
            done[node] = self.ahead.pop(node.meta["entry"].name, 0.0)
        for position, node in enumerate(step.graph.nodes):
            reached[position] = self.now
            if node.op != "call_function":
                continue
            task = _task_of(node, tasks)
            if is_launch(node):
                done[node] = self._launch(index, node, task, done)
            elif task.resource == HOST:
                done[node] = self._on_host(index, node, task, done)
            else:
                done[node] = _latest(node, done)
                if is_wait(node):
                    self._wait(index, node, done[node])
                if task.seconds:
                    self._compute(index, node, task.seconds, RUNS)
        for launch, names in c10d.launched_for_next(step).items():
            self.ahead |= dict.fromkeys(names, done[launch])
        return reached

    def _launch(self, index: int, node: fx.Node, task: Task, done: Mapping[fx.Node, float]) -> float:
        if task.resource in ("", COMPUTE):
            self._compute(index, node, task.seconds, RUNS)
            return self.now
        if task.launch_s:
            self._compute(index, node, task.launch_s, LAUNCHES)
        start = max(self.now, self.issued, self._free[task.resource], _latest(node, done))
        self._occupy(index, node, task.resource, start, start + task.seconds)
        return self._free[task.resource]

    def _on_host(self, index: int, node: fx.Node, task: Task, done: Mapping[fx.Node, float]) -> float:
        """The thread that issues computes by itself; it begins when what was moved to it is there."""
        start = max(self.issued, _latest(node, done))
        self._occupy(index, node, HOST, start, start + task.seconds)
        self.issued = self._free[HOST]
        return self.issued

    def _wait(self, index: int, node: fx.Node, until: float) -> None:
        if until > self.now:
            self.events.append(Event(node, index, COMPUTE, WAITS, self.now, until))
            self.now = until

    def _compute(self, index: int, node: fx.Node, seconds: float, kind: str) -> None:
        start = max(self.now, self.issued)
        self.now = self._busy.end_of(start, seconds)
        if seconds:
            self.events.append(Event(node, index, COMPUTE, kind, start, self.now))

    def _occupy(self, index: int, node: fx.Node, lane: str, start: float, end: float) -> None:
        self._free[lane] = end
        self.events.append(Event(node, index, lane, RUNS, start, end))
        if lane not in self._factors:
            self._factors[lane] = _checked_factor(lane, self._factor_of(lane))
        self._busy.add(lane, self._factors[lane], start, end)


def _latest(node: fx.Node, done: Mapping[fx.Node, float]) -> float:
    """When the last of what other lanes make for a call is there."""
    return max((done.get(source, 0.0) for source in node.all_input_nodes), default=0.0)


def _task_of(node: fx.Node, tasks: Mapping[fx.Node, Task]) -> Task:
    task = tasks.get(node)
    if task is None:
        fix = "make tasks with fxzero.cost.tasks.step_tasks for every program of the step"
        raise SimulationError.of(_name(node), expected="a task for every call", got="none", fix=fix)
    if not (0 <= task.seconds < math.inf and 0 <= task.launch_s < math.inf):
        got = f"seconds={task.seconds!r}, launch_s={task.launch_s!r}"
        raise SimulationError.of(_name(node), expected="finite seconds, 0 or more", got=got, fix="correct its cost")
    lane = task.resource.partition(":")[0]
    if lane and lane not in (LANES if is_launch(node) else (COMPUTE, HOST)):
        expected = f"a lane of {', '.join(LANES)}" if is_launch(node) else "compute or host: it launches nothing"
        raise SimulationError.of(_name(node), expected=expected, got=repr(task.resource), fix="correct its task")
    return task


def _name(node: fx.Node) -> str:
    return f"%{node.name}, {node.target}"


def _checked_factor(lane: str, factor: float) -> float:
    if not 1.0 <= factor < math.inf:
        expected = "a factor of 1 or more"
        raise SimulationError.of(
            f"slowdown of {lane}", expected=expected, got=repr(factor), fix="correct the hardware description"
        )
    return factor
