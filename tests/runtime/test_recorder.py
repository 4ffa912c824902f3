"""Recording changes no bit, sees every call, and is gone when it is over: one process, then two over gloo."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero.errors import CaptureError
from fxzero.profile import timeline_of
from fxzero.runtime.flights import Flight, Watcher
from fxzero.runtime.recorder import _Reading
from fxzero.runtime.recording import Recording
from fxzero.simulate.trace import trace_of
from tests.numerics.worker import launch
from tests.runtime.recorded_faults import faults, sample_faults
from tests.runtime.recorded_ranks import FAULTY, PLANS
from tests.simulate.trace_format import trace_faults

TIMEOUT_S = 300


def compiled(**plan: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fxzero.compile(model, optimizer, fxzero.Plan(**plan), loss=lambda model, x: model(x).square().mean())


def batch() -> torch.Tensor:
    return torch.arange(32.0).reshape(4, 8) / 32


def test_world_one_is_bit_equal_with_recording_and_without() -> None:
    def losses(recorded: bool) -> list[float]:
        step = compiled()
        torch.manual_seed(1)
        found = [step(batch()).item()]
        for _ in range(3):
            if recorded:
                step.record(batch(), steps=1)
            else:
                step(batch())
        return [*found, step(batch()).item()]

    assert losses(True) == losses(False)


def test_every_call_is_seen_in_order() -> None:
    step = compiled()
    recording = step.record(batch(), steps=4)
    assert len(recording.samples) == 4 and list(faults(recording)) == []
    assert recording.steps == (step.graph,)
    assert recording.seconds == recording.seconds_of(step.graph)
    assert [event.node for event in recording.typical.events] == step.graph.calls()
    assert "4 steps, programs" in str(recording)


def test_microbatches_are_recorded_as_programs_of_one_step() -> None:
    step = compiled(accumulate=4)
    recording = step.record(batch(), steps=2)
    assert list(faults(recording)) == []
    assert [id(program) for program in recording.steps] == [id(program) for program in step.graphs]
    assert {event.program for event in recording.typical.events} == {0, 1, 2, 3}


def test_what_runs_without_recording_is_as_it_was() -> None:
    step = compiled()
    step(batch())
    program = step._last[0].program
    before, source, file = program._function, program.source, program.file
    threads = threading.active_count()
    step.record(batch(), steps=2)
    assert (program._function, program.source, program.file) == (before, source, file)
    assert "record_" not in source and threading.active_count() == threads


def test_a_step_that_fails_ends_the_recording_too() -> None:
    step = compiled()
    step(batch())
    program = step._last[0].program
    before = program._function
    with pytest.raises(CaptureError, match="expected a forward pass that runs on this batch"):
        step.record(batch()[:, :5], steps=1)
    assert program._function is before


def test_no_steps_are_refused() -> None:
    with pytest.raises(CaptureError, match="expected 1 or more, got 0"):
        compiled().record(batch(), steps=0)


def test_a_flight_that_fails_is_not_lost_and_lets_go_of_its_tensors() -> None:
    def fail() -> None:
        raise RuntimeError("connection closed")

    watcher = Watcher("net:dp")
    flights = [Flight(fail, torch.zeros(1), holds=True), Flight(lambda: None, torch.zeros(1), holds=True)]
    for flight in flights:
        watcher.add(flight)
    watcher.close()
    assert all(flight.done.is_set() and flight.kept is None and flight.ended for flight in flights)
    assert "connection closed" in str(flights[0].error) and flights[1].error is None
    assert flights[0].finish is not fail


def late_flights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is wrong in the trace of a step whose swaps are seen to end long after their waits have returned."""
    see = Flight.see

    def late(flight: Flight) -> None:
        see(flight)
        time.sleep(0.002)

    monkeypatch.setattr(Flight, "see", late)
    recording = compiled(offload_optimizer="host", offload_activations="host", offload_below=0).record(batch(), steps=1)
    return list(trace_faults(trace_of({"measured": timeline_of(recording.typical)})))


def test_a_swap_that_is_seen_late_was_over_when_its_wait_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert late_flights(monkeypatch) == []


def test_a_swap_that_ends_behind_its_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a flight ends when its thread says so."""
    monkeypatch.setattr(_Reading, "_over_by", lambda *_: defaultdict(lambda: math.inf))
    assert any("do not belong together" in fault for fault in late_flights(monkeypatch))


def test_faults_in_a_recording_are_seen() -> None:
    recording = compiled().record(batch(), steps=1)
    (sample,) = recording.samples
    late = dataclasses.replace(sample.events[0], end_s=sample.events[1].end_s)
    assert list(sample_faults(dataclasses.replace(sample, events=(late, *sample.events[1:]))))
    less = dataclasses.replace(sample, events=sample.events[:-1])
    assert any("missing" in fault for fault in faults(Recording((less,))))


# ---- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("recorded") / "results.json"
    launch("tests.runtime.recorded_ranks", str(path), ranks=2, timeout_s=TIMEOUT_S)
    return json.loads(Path(path).read_text())


@pytest.mark.multirank
@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_are_bit_equal_and_every_flight_is_seen(ranks: dict[str, Any], plan: str) -> None:
    for found in ranks[plan]:
        assert found["recorded"] == found["plain"]
        assert found["faults"] == found["trace_faults"] == [] and found["samples"] == 3
        assert "net:dp" in found["lanes"] and found["programs"] == PLANS[plan].get("accumulate", 1)
        if plan == "on the host":
            assert {"d2h", "h2d"} <= set(found["lanes"])


@pytest.mark.multirank
def test_a_program_that_differs_when_it_is_recorded_is_seen(ranks: dict[str, Any]) -> None:
    assert any(found["recorded"] != found["plain"] for found in ranks[FAULTY])
