"""Runs a program with a time stamp between its calls, as a second text of the same graph.

    record_begin()
    w_gather = fxzero_all_gather(w, 2, group_dp, 1)
    record_launched(node_w_gather, w_gather, (w,))
    ...
    record_begin()
    record_wait(node_w_gather)
    w_full = wait(w_gather)

The text that runs otherwise has none of this, so recording costs nothing when it is off. What a call takes reaches to
the next stamp: it includes the freeing of what dies with it, and the copies that follow it. The order of calls, and
what they compute, is the same in both, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.blocked_runs import BlockedRun
from fxzero.graph.lanes import (
    COMPUTE,
    HOST,
    LAUNCHES,
    RUNS,
    WAITS,
    Event,
    is_launch,
    is_wait,
    lane_of_launch,
    launch_of,
)
from fxzero.lower.lower_regions import LoweredRegion
from fxzero.runtime.emitter import Emitter
from fxzero.runtime.flights import Clock, DeviceClock, Flight, HostClock, LaneStream, Watcher, flight_of
from fxzero.runtime.program import Program, RunFunction
from fxzero.runtime.recording import Sample


class RecordingEmitter(Emitter):
    """Writes a program that tells a recorder where it is.

    Attributes:
        index: the calls that have a stamp before them, in order -> its number.
        shares: the calls of blocked runs and of regions -> (place in it, number of its calls).
    """

    def __init__(self, program: Program, recorder: Recorder) -> None:
        super().__init__(program.step, program.groups, program.swapper, program.lowered)
        self.index: dict[fx.Node, int] = {}
        self.shares: dict[fx.Node, tuple[int, int]] = {}
        self._num_stamps = 0
        self.names |= {
            "record_begin": recorder.begin,
            "record_launched": recorder.launched,
            "record_wait": recorder.wait,
        }

    def call(self, node: fx.Node) -> None:
        """Write a stamp, then the call."""
        if c10d.is_release(node):
            return
        self.index[node] = self._stamp()
        if is_wait(node):
            self.lines.append(f"    record_wait({self._bind_node(launch_of(node))})")
        super().call(node)
        if is_launch(node):
            sources = f"({self._argument(c10d.sent(node))},)" if c10d.is_collective(node) else "None"
            self.lines.append(f"    record_launched({self._bind_node(node)}, {node.name}, {sources})")

    def blocked(self, run: BlockedRun) -> None:
        """Write one stamp before a run, whose calls share its time."""
        for node in run.before:
            self.call(node)
        self.index |= dict.fromkeys(run.calls, self._stamp())
        self.shares |= {node: (place, len(run.calls)) for place, node in enumerate(run.calls)}
        super().blocked(replace(run, before=()))

    def region(self, lowered: LoweredRegion, dying: list[str]) -> list[str]:
        """Write one stamp before a region, whose calls share its time."""
        self.index |= dict.fromkeys(lowered.calls, self._stamp())
        self.shares |= {node: (place, len(lowered.calls)) for place, node in enumerate(lowered.calls)}
        return super().region(lowered, dying)

    def _stamp(self) -> int:
        """Write a stamp; returns its number."""
        self.lines.append("    record_begin()")
        self._num_stamps += 1
        return self._num_stamps - 1

    def _bind_node(self, node: fx.Node) -> str:
        return self._bind(f"node_{node.name}", node)


@dataclass
class _Run:
    """What was noted while one program ran."""

    step: StepGraph
    index: dict[fx.Node, int]  # of the calls that have a stamp, in order
    shares: dict[fx.Node, tuple[int, int]]  # of those that share one
    marks: list[Any] = field(default_factory=list)
    launched: dict[fx.Node, Any] = field(default_factory=dict)  # launch -> when its call had returned
    flights: dict[fx.Node, Flight | None] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)  # number of a wait -> when what it waits for was done
    end: Any = None


class Recorder:
    """Notes when the calls of programs run.

    Args:
        device: of the step.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock: Clock = DeviceClock() if self._on_gpu else HostClock()
        self._mark = self._clock.mark
        self._watchers: dict[str, Watcher] = {}
        self._streams: dict[str, LaneStream] = {}
        self._runs: list[_Run] = []

    @contextlib.contextmanager
    def attached(self, program: Program) -> Iterator[None]:
        """Within the block a program is recorded whenever it runs."""
        emitter = RecordingEmitter(program, self)

        def around(function: RunFunction) -> RunFunction:
            def run(inputs: list[Any]) -> tuple[Any, ...]:
                self._runs.append(_Run(program.step, emitter.index, emitter.shares))
                returned = function(inputs)
                self._runs[-1].end = self._mark()
                return returned

            return run

        with program.written_by(emitter, around):
            yield

    def close(self) -> None:
        """End the threads that watch."""
        for watcher in self._watchers.values():
            watcher.close()
        self._watchers.clear()

    # ---- called by the program

    def begin(self) -> None:
        """The next call begins."""
        self._runs[-1].marks.append(self._mark())

    def launched(self, launch: fx.Node, value: Any, sources: Any) -> None:
        """A launch has returned.

        Args:
            launch: the call.
            value: what it returned.
            sources: the tensors of a collective; None of a swap.
        """
        run = self._runs[-1]
        run.launched[launch] = self._mark()
        run.flights[launch] = flight = flight_of(value, sources)
        if flight is None:
            return
        lane = lane_of_launch(launch)
        if self._on_gpu and flight.holds:
            self._streams.setdefault(lane, LaneStream()).add(flight, self._clock)
            return
        if lane not in self._watchers:
            self._watchers[lane] = Watcher(lane)
        self._watchers[lane].add(flight)

    def wait(self, launch: fx.Node) -> None:
        """The program comes to a wait: it goes on when the flight is over, unless its own wait sees to that."""
        run = self._runs[-1]
        flight = run.flights.get(launch)  # none of what the step before has launched: `take` has seen its end
        if flight is None or not flight.holds:
            return
        if self._on_gpu:
            LaneStream.hold(flight)
        else:
            flight.done.wait()
        if flight.error is not None:
            raise flight.error
        run.held[len(run.marks) - 1] = self._mark()

    # ---- what was seen

    def take(self, *, call_s: float) -> Sample:
        """The events of all that ran since the last time, as those of one step.

        Args:
            call_s: seconds of the whole call, of which programs are a part.
        """
        runs, self._runs = self._runs, []
        if self._on_gpu:
            torch.cuda.synchronize()
        for run in runs:
            for flight in filter(None, run.flights.values()):
                flight.done.wait()
        origin = self._clock.device_s(runs[0].marks[0]) if runs and runs[0].marks else 0.0
        reading = _Reading(self._clock, origin, self._on_gpu)
        reached = [reading.add(index, run) for index, run in enumerate(runs)]
        ends = [self._clock.device_s(run.end) - origin for run in runs]
        steps = tuple(run.step for run in runs)
        return Sample(steps, tuple(reading.events), tuple(reached), max(ends, default=0.0), call_s)


class _Reading:
    """Makes events of marks."""

    def __init__(self, clock: Clock, origin: float, on_gpu: bool) -> None:
        self.events: list[Event] = []
        self._clock = clock
        self._origin = origin
        self._on_gpu = on_gpu
        self._free: dict[str, float] = {}  # lane -> end of its last flight

    def add(self, index: int, run: _Run) -> list[float]:
        """Read one program; when each of its nodes was reached, by position."""
        begins = [self._at(mark) for mark in (*run.marks, run.end)]
        over = self._over_by(run, begins)
        for node, number in run.index.items():
            begin, end = begins[number], begins[number + 1]
            if node in run.shares:
                place, count = run.shares[node]
                begin, end = (begin + (end - begin) * part / count for part in (place, place + 1))
            if is_launch(node):
                self.events.append(Event(node, index, COMPUTE, LAUNCHES, begin, end))
                self._flight(index, node, run, over[node])
            elif is_wait(node):
                self._wait(index, node, run, number, begin, end)
            elif self._on_gpu and swap_ops.is_off_device(node):
                marks = (*run.marks, run.end)[number : number + 2]
                self.events.append(Event(node, index, HOST, RUNS, *(self._host(mark) for mark in marks)))
            else:
                self.events.append(Event(node, index, COMPUTE, RUNS, begin, end))
        reached, last = [], begins[-1]
        for node in reversed(run.step.graph.nodes):  # what has no stamp is reached with what comes after it
            last = begins[run.index[node]] if node in run.index else last
            reached.append(last)
        return reached[::-1]

    @staticmethod
    def _over_by(run: _Run, begins: list[float]) -> dict[fx.Node, float]:
        """Launch -> when it was over at the latest: the wait for it, or for a later one of its lane, had returned."""
        waited: dict[fx.Node, float] = {}
        for node, number in run.index.items():
            if is_wait(node):
                waited.setdefault(launch_of(node), begins[number + 1])
        over: dict[fx.Node, float] = {}
        latest: dict[str, float] = {}
        for node in filter(is_launch, reversed(run.index)):
            lane = lane_of_launch(node)
            over[node] = latest[lane] = min(latest.get(lane, math.inf), waited.get(node, math.inf))
        return over

    def _flight(self, index: int, node: fx.Node, run: _Run, over_s: float) -> None:
        """What a thread saw late, since it was woken late, was over by `over_s`."""
        flight = run.flights[node]
        if flight is None:
            return
        lane = lane_of_launch(node)
        start = max(self._at(run.launched[node]), self._free.get(lane, 0.0))
        self._free[lane] = max(start, min(self._at(flight.ended), over_s))
        self.events.append(Event(node, index, lane, RUNS, start, self._free[lane]))

    def _wait(self, index: int, node: fx.Node, run: _Run, number: int, begin: float, end: float) -> None:
        if number in run.held:
            held = self._at(run.held[number])
        else:
            flight = run.flights.get(launch_of(node))
            held = begin if flight is None else min(max(begin, self._at(flight.ended)), end)
        self.events.append(Event(node, index, COMPUTE, WAITS, begin, held))
        self.events.append(Event(node, index, COMPUTE, RUNS, held, end))

    def _at(self, mark: Any) -> float:
        return self._clock.device_s(mark) - self._origin

    def _host(self, mark: Any) -> float:
        return self._clock.host_s(mark) - self._origin
