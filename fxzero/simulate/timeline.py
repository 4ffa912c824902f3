"""When each call of a step runs, on which lane, and what stands still meanwhile: predicted, or as it was measured.

[Note: how a program runs]
One thread issues the calls in program order. Compute runs in that order on one lane. A launch (collective, swap_out,
swap_in) is put onto its own lane when it is reached, which may hold the compute lane for a moment; a lane takes its
launches in the order in which they come. A wait holds the compute lane until its launch is done: on a GPU the stream
waits, on the CPU the main thread, which comes to the same here. An update on the host holds the thread that issues, so
what comes after it cannot begin before its end; a GPU meanwhile does what it was given before. While a lane is busy,
compute may run slower, by a factor for each lane; factors of several lanes multiply. While compute runs, so may what a
lane does ([Note: a lane's own time] in `cost/contention.py`). Microbatches' programs run one after the other.

[Note: steps in a chain]
A step that launches gathers for the next one is told as one of many: a step before it is simulated too, and what that
leaves under way travels while this one begins. Its time is what it adds to the chain, from the moment at which compute
begins with it to that at which compute begins with the next. A transfer over the end is shown in two parts: to the end
of the step, and the rest of it, which is the step before's, at the start. Steps are taken to follow each other at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from fxzero.cost.contention import Lanes
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
    hindrance: Callable[[str], float] = lambda lane: 1.0,
) -> Timeline:
    """When each call of a step would run; linear in the number of nodes ([Note: steps in a chain]).

    Args:
        steps: its program, or its programs, one a microbatch.
        tasks: what each call occupies, for all programs together.
        slowdown: lane -> the factor by which compute takes longer while it is busy, 1 or more
            (`Hardware.slowdown`).
        hindrance: lane -> the factor by which what it does takes longer while compute runs, 1 or more
            (`Hardware.hindrance`).

    Raises:
        SimulationError: if a call has no task, or one that makes no sense for it.
    """
    programs = (steps,) if isinstance(steps, StepGraph) else tuple(steps)
    run = _Run(_checked("slowdown", slowdown), _checked("hindrance", hindrance))
    reached = [run.program(index, step, tasks) for index, step in enumerate(programs)]
    if not run.ahead:
        return Timeline(programs, tuple(run.seen()), tuple(reached), run.end_s)
    run.begin_again()
    reached = [run.program(index, step, tasks) for index, step in enumerate(programs)]
    end_s = run.free_s
    events = [replace(event, end_s=min(event.end_s, end_s)) for event in run.seen() if event.start_s < end_s]
    return Timeline(programs, tuple(events), tuple(reached), end_s)


class _Moment(NamedTuple):
    """When a lane has made something.

    Args:
        time: in the lane's own time, or by the clock.
        lane: whose time it is; "": the clock's.
    """

    time: float
    lane: str = ""


_AT_ONCE = _Moment(0.0)


class _Run:
    """The state of all lanes as the thread that issues goes through the step.

    Attributes:
        events: in the order in which they are issued, those of lanes in the lanes' own time.
        now: when the compute lane is free, and what was issued so far for it is done.
        issued: when the thread itself is free; only what it computes on the host holds it.
        ahead: parameter -> when its gather for the next step, launched so far, is done.
    """

    def __init__(self, slowdown: Callable[[Any], float], hindrance: Callable[[Any], float]) -> None:
        self.events: list[Event] = []
        self.now = self.issued = 0.0
        self.ahead: dict[str, _Moment] = {}
        self._lanes = Lanes(slowdown, hindrance)

    @property
    def end_s(self) -> float:
        """When everything that was issued is done."""
        return max(self.free_s, self._lanes.end(self.free_s))

    @property
    def free_s(self) -> float:
        """When the next program can begin."""
        return max(self.now, self.issued)

    def seen(self) -> list[Event]:
        """All events by the clock, if compute has nothing more to do."""

        def at(event: Event, moment: float) -> float:
            return self._lanes.when(event.lane, moment, self.free_s)

        return [
            event
            if event.lane == COMPUTE
            else replace(event, start_s=at(event, event.start_s), end_s=at(event, event.end_s))
            for event in self.events
        ]

    def begin_again(self) -> None:
        """The next step begins: what is under way goes on, and times count from now."""
        start = self.free_s
        moved = self._lanes.since(start)
        under_way = []
        for event in self.events:
            shift = self._lanes.own_time(event.lane, start)
            if event.lane != COMPUTE and event.end_s > shift:
                begin, end = max(event.start_s - shift, 0.0), event.end_s - shift
                under_way.append(replace(event, start_s=begin, end_s=end))
        self.ahead = {
            name: _Moment(max(done.time - self._lanes.own_time(done.lane, start), 0.0), done.lane)
            for name, done in self.ahead.items()
        }
        self.now = self.issued = 0.0
        self.events, self._lanes = under_way, moved

    def program(self, index: int, step: StepGraph, tasks: Mapping[fx.Node, Task]) -> np.ndarray:
        """Run one program; when each of its nodes is reached."""
        reached = np.zeros(len(step.graph.nodes))
        done: dict[fx.Node, _Moment] = {}  # of what other lanes than compute have made, and of its views
        for node in filter(c10d.is_ahead, step.placeholders):
            done[node] = self.ahead.pop(node.meta["entry"].name, _AT_ONCE)
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
                done[node] = self._latest(node, done)
                if is_wait(node):
                    self._wait(index, node, done[node])
                if task.seconds:
                    self._compute(index, node, task.seconds, RUNS)
        for launch, names in c10d.launched_for_next(step).items():
            self.ahead |= dict.fromkeys(names, done[launch])
        return reached

    def _launch(self, index: int, node: fx.Node, task: Task, done: Mapping[fx.Node, _Moment]) -> _Moment:
        if task.resource in ("", COMPUTE):
            self._compute(index, node, task.seconds, RUNS)
            return _Moment(self.now)
        if task.launch_s:
            self._compute(index, node, task.launch_s, LAUNCHES)
        return self._occupy(index, node, task, max(self.free_s, self._on_the_clock(self._latest(node, done))))

    def _on_host(self, index: int, node: fx.Node, task: Task, done: Mapping[fx.Node, _Moment]) -> _Moment:
        """The thread that issues computes by itself; it begins when what was moved to it is there."""
        found = self._occupy(index, node, task, max(self.issued, self._on_the_clock(self._latest(node, done))))
        self.issued = self._on_the_clock(found)
        return found

    def _wait(self, index: int, node: fx.Node, done: _Moment) -> None:
        until = self._lanes.arrival(done.lane, done.time, self.now)
        if until > self.now:
            self.events.append(Event(node, index, COMPUTE, WAITS, self.now, until))
            self._stand_still(until)

    def _compute(self, index: int, node: fx.Node, seconds: float, kind: str) -> None:
        if self.issued > self.now:
            self._stand_still(self.issued)
        start = self.now
        self.now = self._lanes.end_of(start, seconds)
        if seconds:
            self.events.append(Event(node, index, COMPUTE, kind, start, self.now))

    def _stand_still(self, until: float) -> None:
        self._lanes.stand_still(self.now, until)
        self.now = until

    def _occupy(self, index: int, node: fx.Node, task: Task, earliest: float) -> _Moment:
        start, end = self._lanes.occupy(task.resource, earliest, task.seconds)
        self.events.append(Event(node, index, task.resource, RUNS, start, end))
        return _Moment(end, task.resource)

    def _latest(self, node: fx.Node, done: Mapping[fx.Node, _Moment]) -> _Moment:
        """When the last of what other lanes make for a call is there."""
        found = [done[source] for source in node.all_input_nodes if source in done]
        return max(found, key=self._on_the_clock, default=_AT_ONCE)

    def _on_the_clock(self, moment: _Moment) -> float:
        """If compute runs on."""
        return self._lanes.on_the_clock(moment.lane, moment.time)


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


def _checked(what: str, factor_of: Callable[[str], float]) -> Callable[[str], float]:
    def checked(lane: str) -> float:
        factor = factor_of(lane)
        if not 1.0 <= factor < math.inf:
            where, fix = f"{what} of {lane}", "correct the hardware description"
            raise SimulationError.of(where, expected="a factor of 1 or more", got=repr(factor), fix=fix)
        return factor

    return checked
