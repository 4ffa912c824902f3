"""A timeline as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

One process for each timeline (predicted and measured, or one a rank), in it one thread for each lane, and a counter of
memory by kind. An arrow leads from each collective or swap to the wait that needs it. Format: Trace Event Format
(Google, 2016), the JSON object form; its times are in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from fxzero.cost.allocator import Allocator
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import LAUNCHES, WAITS, Event, is_wait, launch_of
from fxzero.graph.step_graph import num_bytes
from fxzero.graph.text import default_device, launch_name
from fxzero.graph.type_text import type_of
from fxzero.simulate.memory_over_time import MemoryOverTime, memory_over_time
from fxzero.simulate.timeline import Timeline

_US = 1e6
_DIGITS = 3  # of a microsecond: nanoseconds

JsonObject = dict[str, Any]


def write_trace(
    timelines: Mapping[str, Timeline],
    path: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    allocator: Allocator | None = None,
) -> None:
    """The timelines are in a file.

    Args:
        timelines: name of a process -> its timeline, in the order in which they are shown.
        path: of the file, such as trace.json.
        about: what else to note: plan, hardware.
        allocator: whose rules sizes of memory follow; default: that of the graph's device.
    """
    with open(path, "w", encoding="utf-8") as file:
        json.dump(trace_of(timelines, about=about, allocator=allocator), file, separators=(",", ":"))


def trace_of(
    timelines: Mapping[str, Timeline],
    *,
    about: Mapping[str, Any] | None = None,
    allocator: Allocator | None = None,
) -> JsonObject:
    """The JSON object of a trace; arguments as for `write_trace`."""
    events: list[JsonObject] = []
    for pid, (name, timeline) in enumerate(timelines.items(), start=1):
        events += _names(name, timeline, pid)
        events += _Process(timeline, pid).events()
        events += _memory(memory_over_time(timeline, allocator=allocator), pid, timeline.step_seconds)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about or {})}


def _names(name: str, timeline: Timeline, pid: int) -> Iterator[JsonObject]:
    yield _metadata("process_name", pid, 0, name=name)
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    for tid, lane in enumerate(timeline.lanes, start=1):
        yield _metadata("thread_name", pid, tid, name=lane)
        yield _metadata("thread_sort_index", pid, tid, sort_index=tid)


def _metadata(what: str, pid: int, tid: int, **args: Any) -> JsonObject:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": args}


class _Process:
    """The events of one timeline."""

    def __init__(self, timeline: Timeline, pid: int) -> None:
        self._timeline = timeline
        self._pid = pid
        self._tid = {lane: tid for tid, lane in enumerate(timeline.lanes, start=1)}
        self._devices = {id(step): default_device(step) for step in timeline.steps}
        self._known: dict[fx.Node, JsonObject] = {}  # arguments; microbatches share nodes
        self._arrows = 0

    def events(self) -> Iterator[JsonObject]:
        """Slices, then the arrows between them."""
        for event in self._timeline.events:
            yield self._slice(event)
        for index, step in enumerate(self._timeline.steps):
            yield from self._arrows_of(index, step)

    def _slice(self, event: Event) -> JsonObject:
        node = event.node
        verb = {LAUNCHES: "launch ", WAITS: "wait for "}.get(event.kind, "")
        shown = launch_of(node) if event.kind == WAITS else node
        return {
            "name": f"{verb}{launch_name(shown)}",
            "cat": f"{event.kind},{node.meta.get('phase', '')}",
            "ph": "X",
            "ts": _us(event.start_s),
            "dur": round(_us(event.end_s) - _us(event.start_s), _DIGITS),  # so that it ends where the next begins
            "pid": self._pid,
            "tid": self._tid[event.lane],
            "args": self._arguments(event),
        }

    def _arguments(self, event: Event) -> JsonObject:
        node = event.node
        if node not in self._known:
            step = self._timeline.steps[event.program]
            val = node.meta.get("val")
            found = {
                "node": f"%{node.name}",
                "module": node.meta.get("module", ""),
                "phase": node.meta.get("phase", ""),
                "shape": type_of(node, step, device=self._devices[id(step)]),
                "bytes": num_bytes(val),
            }
            if c10d.is_collective(node):
                found["sent_bytes"] = c10d.wire_bytes(node, step.mesh)
            if "param" in node.meta:
                found["param"] = node.meta["param"]
            self._known[node] = found
        several = len(self._timeline.steps) > 1
        return self._known[node] | ({"microbatch": event.program} if several else {})

    def _arrows_of(self, index: int, step: StepGraph) -> Iterator[JsonObject]:
        """From the lane of each launch to its first wait: the slice of the wait, or else the next one after it."""
        timeline = self._timeline
        stood = {event.node: event for event in timeline.exposed if event.program == index}
        reached = timeline.reached_s[index]
        arrived: set[fx.Node] = set()
        for position, node in enumerate(step.graph.nodes):
            transfer = timeline.transfers.get((index, launch_of(node))) if is_wait(node) else None
            if transfer is None or transfer.node in arrived:
                continue
            arrived.add(transfer.node)
            self._arrows += 1
            common = {"name": "needed", "cat": "flow", "id": self._pid * 10**9 + self._arrows, "pid": self._pid}
            yield common | {"ph": "s", "ts": _us(transfer.start_s), "tid": self._tid[transfer.lane]}
            end: JsonObject = {"ph": "f", "ts": _us(reached[position]), "tid": self._tid["compute"]}
            if node in stood:
                middle = (max(stood[node].start_s, transfer.start_s) + stood[node].end_s) / 2
                end |= {"ts": _us(middle), "bp": "e"}
            yield common | end


def _memory(memory: MemoryOverTime, pid: int, end_s: float) -> Iterator[JsonObject]:
    """A counter of bytes by kind on the device, and one for what is elsewhere; a line where any of them changes."""
    tracks = {"memory on the device": memory.bytes_by_kind}
    if any(line.any() for line in memory.tiers.values()):
        tracks["memory off the device"] = memory.tiers
    for name, lines in tracks.items():
        used = {key: line.tolist() for key, line in lines.items() if line.any()}
        before: list[int] | None = None
        for index, seconds in enumerate(memory.seconds.tolist()):
            values = [line[index] for line in used.values()]
            if values != before:
                yield _counter(name, pid, seconds, dict(zip(used, values, strict=True)))
            before = values
        if before is not None:
            yield _counter(name, pid, end_s, dict(zip(used, before, strict=True)))


def _counter(name: str, pid: int, seconds: float, values: Mapping[str, int]) -> JsonObject:
    return {"name": name, "ph": "C", "ts": _us(seconds), "pid": pid, "tid": 0, "args": dict(values)}


def _us(seconds: float) -> float:
    return round(float(seconds) * _US, _DIGITS)
