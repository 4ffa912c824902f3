"""A trace is what the format's documentation asks for, and says what the timeline does; planted faults are seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fxzero.cost.hardware import known_hardware
from fxzero.cost.memory import memory_profile
from fxzero.cost.tasks import step_tasks
from fxzero.graph.lanes import COMPUTE, WAITS, is_launch
from fxzero.simulate.memory_over_time import memory_over_time
from fxzero.simulate.timeline import Timeline, simulate
from fxzero.simulate.trace import trace_of, write_trace
from tests.simulate.conftest import Rewritten
from tests.simulate.trace_format import trace_faults

H100 = known_hardware("h100")


@pytest.fixture
def timeline(rewritten: Rewritten) -> Timeline:
    step = rewritten(3, zero=3, offload_optimizer="host", offload_below=1)
    return simulate(step, step_tasks(step, H100), slowdown=H100.slowdown)


def test_it_is_what_the_format_asks_for(timeline: Timeline) -> None:
    trace = trace_of({"predicted": timeline, "measured": timeline}, about={"plan": "zero 3"})
    assert list(trace_faults(trace)) == []
    assert trace["otherData"] == {"plan": "zero 3"}


def test_it_says_what_the_timeline_does(timeline: Timeline) -> None:
    events = trace_of({"predicted": timeline})["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(timeline.events)
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(threads.values()) == timeline.lanes and timeline.lanes[0] == COMPUTE
    for lane in timeline.lanes:
        shown = sum(e["dur"] for e in slices if threads[e["tid"]] == lane and not e["cat"].startswith(WAITS))
        assert shown == pytest.approx(1e6 * timeline.busy_s[lane], abs=1.0)
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(1e6 * timeline.step_seconds, abs=0.01)
    gather = next(e for e in slices if e["name"].startswith("all_gather"))
    assert {"node", "module", "phase", "shape", "bytes", "sent_bytes"} <= gather["args"].keys()
    launches = [node for node in timeline.steps[0].calls() if is_launch(node)]
    assert sum(event["ph"] == "s" for event in events) == len(launches)


def test_its_counter_has_the_predicted_peak(timeline: Timeline) -> None:
    events = trace_of({"predicted": timeline})["traceEvents"]
    counters = [event for event in events if event["name"] == "memory on the device"]
    peak = memory_profile(timeline.steps[0]).peak_bytes
    assert max(sum(event["args"].values()) for event in counters) == peak == memory_over_time(timeline).peak_bytes
    assert [event["ts"] for event in counters] == sorted(event["ts"] for event in counters)
    assert any(event["name"] == "memory off the device" for event in events)


def test_microbatches_are_told_apart(rewritten: Rewritten) -> None:
    step = rewritten(1, zero=2)
    found = simulate([step, step], step_tasks(step, H100))
    trace = trace_of({"predicted": found})
    assert list(trace_faults(trace)) == []
    assert {event["args"]["microbatch"] for event in trace["traceEvents"] if event["ph"] == "X"} == {0, 1}


def test_it_is_written_as_json(timeline: Timeline, tmp_path: Path) -> None:
    write_trace({"predicted": timeline}, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == trace_of({"predicted": timeline})


def _drop_end(event: dict[str, Any]) -> None:
    event["id"] = -1


def _longer(event: dict[str, Any]) -> None:
    event["dur"] += 1e6


PLANTED = [
    ("X", lambda event: event.pop("dur"), "dur is None"),
    ("X", lambda event: event.update(dur=-1.0), "dur is -1.0"),
    ("X", lambda event: event.update(ts="0"), "ts is '0'"),
    ("X", lambda event: event.update(ts=float("nan")), "not JSON"),
    ("X", lambda event: event.update(tid=99), "has no name"),
    ("X", lambda event: event.update(ph="B"), "phase 'B'"),
    ("X", _longer, "overlap"),
    ("C", lambda event: event.update(args={"activations": "3 MiB"}), "a counter of"),
    ("M", lambda event: event.update(name="process_colour"), "metadata 'process_colour'"),
    ("f", _drop_end, "has one end"),
    ("f", lambda event: event.update(ts=0.0), "do not belong together"),
    ("s", lambda event: event.update(ts=1e9), "no slice at"),
]


@pytest.mark.parametrize(
    ("phase", "plant", "words"), PLANTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_fault_in_a_trace_is_seen(timeline: Timeline, phase: str, plant: Any, words: str) -> None:
    trace = copy.deepcopy(trace_of({"predicted": timeline}))
    of_phase = [event for event in trace["traceEvents"] if event["ph"] == phase]
    plant(of_phase[-1] if phase == "f" else of_phase[0])
    assert any(words in fault for fault in trace_faults(trace)), list(trace_faults(trace))
