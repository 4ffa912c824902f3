"""What the Trace Event Format asks of a JSON object with traceEvents, and what ui.perfetto.dev needs to show it.

Source: Trace Event Format (Google, 2016): sections JSON Object Format, Duration, Complete, Counter, Flow and Metadata
Events.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}
PHASES = {"X", "M", "C", "s", "f"}  # of the format's phases, those that we write


def trace_faults(trace: Any) -> Iterator[str]:
    """Words for each thing that is wrong with a trace."""
    try:
        json.dumps(trace, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"not JSON: {error}"
        return
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        yield "no list of traceEvents"
        return
    if trace.get("displayTimeUnit") not in ("ms", "ns"):
        yield f"displayTimeUnit is {trace.get('displayTimeUnit')!r}"
    events = trace["traceEvents"]
    faults = [fault for index, event in enumerate(events) for fault in _event_faults(index, event)]
    yield from faults
    if not faults:
        yield from _name_faults(events)
        slices = _slices(events)
        yield from _nesting_faults(slices)
        yield from _flow_faults(events, slices)


def _event_faults(index: int, event: Any) -> Iterator[str]:
    where = f"event {index}"
    if not isinstance(event, dict) or event.get("ph") not in PHASES:
        yield f"{where}: phase {(event.get('ph') if isinstance(event, dict) else event)!r}"
        return
    for key, kind in (("name", str), ("pid", int), ("tid", int)):
        if not isinstance(event.get(key), kind):
            yield f"{where}: {key} is {event.get(key)!r}"
    if event["ph"] == "M":
        key, kind = METADATA.get(event.get("name", ""), ("", object))
        if not key or not isinstance(event.get("args", {}).get(key), kind):
            yield f"{where}: metadata {event.get('name')!r} with {event.get('args')!r}"
        return
    if not _is_number(event.get("ts")) or event["ts"] < 0:
        yield f"{where}: ts is {event.get('ts')!r}"
    if event["ph"] == "X" and (not _is_number(event.get("dur")) or event["dur"] < 0):
        yield f"{where}: dur is {event.get('dur')!r}"
    if event["ph"] == "C":
        args = event.get("args")
        if not isinstance(args, dict) or not args or not all(_is_number(value) for value in args.values()):
            yield f"{where}: a counter of {args!r}"
    if event["ph"] in "sf":
        if not isinstance(event.get("id"), (int, str)) or not isinstance(event.get("cat"), str):
            yield f"{where}: a flow without id or cat"
        if event.get("bp", "e") != "e":
            yield f"{where}: bp is {event['bp']!r}"


def _name_faults(events: list[Any]) -> Iterator[str]:
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    for pid, tid in sorted({(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} - named):
        yield f"thread {tid} of process {pid} has no name"
    for pid in sorted({e["pid"] for e in events} - processes):
        yield f"process {pid} has no name"


def _slices(events: list[Any]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Thread -> (begin, end) of its slices, in order."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    return {thread: sorted(spans) for thread, spans in found.items()}  # an empty one before what begins with it


def _nesting_faults(slices: dict[tuple[int, int], list[tuple[float, float]]]) -> Iterator[str]:
    for thread, spans in slices.items():
        for (begin, end), (other, _) in itertools.pairwise(spans):
            if other < end - 1e-4 and other > begin:  # our slices are side by side; none is in another
                yield f"slices of thread {thread} overlap at {other}"


def _flow_faults(events: list[Any], slices: dict[tuple[int, int], list[tuple[float, float]]]) -> Iterator[str]:
    flows: dict[Any, dict[str, Any]] = defaultdict(dict)
    for event in events:
        if event["ph"] in "sf":
            if event["ph"] in flows[event["id"]]:
                yield f"flow {event['id']} has two ends of one kind"
            flows[event["id"]][event["ph"]] = event
    for number, ends in flows.items():
        if set(ends) != {"s", "f"}:
            yield f"flow {number} has one end"
            continue
        start, end = ends["s"], ends["f"]
        if (start["name"], start["cat"]) != (end["name"], end["cat"]) or start["ts"] > end["ts"] + 1e-3:
            yield f"the ends of flow {number} do not belong together"
        for event in ends.values():
            spans = slices.get((event["pid"], event["tid"]), [])
            before = bisect.bisect(spans, (event["ts"] + 1e-3, math.inf)) - 1
            inside = before >= 0 and spans[before][1] >= event["ts"] - 1e-3
            bound = event["ph"] == "s" or event.get("bp") == "e"  # to the slice around it; else to the next one
            if bound and not inside:
                yield f"flow {number}, {event['ph']}: no slice at {event['ts']}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
