"""What tables say of a prediction, and of a step as predicted and as measured."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero.cost.hardware import known_hardware
from fxzero.cost.recorded import Machine, RecordedCosts, signatures
from fxzero.cost.signature import signature
from fxzero.cost.tasks import step_tasks
from fxzero.errors import CaptureError
from fxzero.graph.lanes import COMPUTE, Event, is_launch
from fxzero.simulate.prediction import Prediction, predict
from fxzero.simulate.side_by_side import class_of
from fxzero.simulate.summary import exposed_by_place, exposed_table, lane_table, timeline_tables
from fxzero.simulate.timeline import SimulationError
from tests.simulate.conftest import Rewritten
from tests.simulate.trace_format import trace_faults


@pytest.fixture
def prediction(rewritten: Rewritten) -> Prediction:
    return predict([rewritten(3, zero=3, prefetch=0)], known_hardware("h100_ethernet"))


def test_tables_name_lanes_waits_and_gains(prediction: Prediction) -> None:
    text = timeline_tables(prediction)
    assert text.startswith("predicted step ") and "compute stands still for" in text
    assert "net:dp twice as fast" in text and "if compute never stood still" in text
    assert re.search(r", [0-9.]+% of the bound \(", text)
    assert "blocks.*.up" in exposed_table(prediction.timeline)
    assert len(lane_table(prediction.timeline).splitlines()) == 2 + len(prediction.timeline.lanes)


def test_what_compute_stands_still_for_adds_up(prediction: Prediction) -> None:
    found = exposed_by_place(prediction.timeline)
    assert sum(item.seconds for item in found) == pytest.approx(prediction.timeline.exposed_s)
    assert sum(len(item.nodes) for item in found) == len(prediction.timeline.exposed)
    assert found == sorted(found, key=lambda item: -item.seconds) and {item.lane for item in found} == {"net:dp"}


def test_gains_are_those_of_a_simulation_with_half_the_time(prediction: Prediction) -> None:
    gains = prediction.gains_s
    assert set(gains) == {COMPUTE, "net:dp", "no waits"}
    assert gains["no waits"] == prediction.timeline.exposed_s
    assert 0 < gains["net:dp"] <= prediction.timeline.busy_s["net:dp"] / 2
    assert 0 < gains[COMPUTE] <= prediction.timeline.busy_s[COMPUTE] / 2 + 1e-12
    assert list(gains.values()) == sorted(gains.values(), reverse=True)


# ---- beside what was measured


@pytest.fixture
def step() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    return fxzero.compile(model, optimizer, fxzero.Plan(), loss=lambda model, x: model(x).square().mean())


def test_a_profile_compares_every_call(step: Any, tmp_path: Path) -> None:
    found = step.profile(torch.randn(32, 64), path=tmp_path / "trace.json", steps=3)
    assert len(found.measured) == 3 and found.call_s >= found.measured_s > 0
    assert found.ratio == pytest.approx(found.predicted_s / found.measured_s)
    rows = found.by_class()
    assert {"matmul", "transcendental", "pointwise"} <= {row.what for row in rows}
    assert sum(row.calls for row in rows) == len(step.graph.calls())
    (compute,) = found.by_lane()
    assert compute.predicted_s == pytest.approx(found.predicted_s)
    text = str(found)
    assert text.startswith("predicted ") and "class of calls" in text and "matmul" in text
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert list(trace_faults(trace)) == []
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {"predicted", "measured"}


def test_times_are_predicted_for_the_machine_that_the_plan_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(replace(known_hardware("cpu"), name="mine").to_toml())
    model = nn.Linear(64, 64)
    plan = fxzero.Plan(hardware=str(file))
    step = fxzero.compile(model, torch.optim.SGD(model.parameters()), plan, loss=lambda model, x: model(x).mean())
    found = step.profile(torch.randn(32, 64), path=None, steps=1)
    assert found.prediction.hardware.name == "mine" and " on mine" in step.report()
    assert step.profile(torch.randn(32, 64), path=None, steps=1, hardware="cpu").prediction.hardware.name == "cpu"


def test_a_call_that_took_twice_as_long_is_seen_in_its_class(step: Any) -> None:
    found = step.profile(torch.randn(32, 64), path=None, steps=1)
    (timeline,) = found.measured
    longer = [
        Event(e.node, e.program, e.lane, e.kind, e.start_s, e.end_s + (e.seconds if class_of(e) == "matmul" else 0))
        for e in timeline.events
    ]
    again = dataclasses.replace(found, measured=(dataclasses.replace(timeline, events=tuple(longer)),))
    before = {row.what: row.measured_s for row in found.by_class()}
    after = {row.what: row.measured_s for row in again.by_class()}
    assert after.pop("matmul") == pytest.approx(2 * before.pop("matmul"))
    assert after == before


def test_measured_times_played_by_the_simulator_give_the_measured_step(step: Any) -> None:
    """One step of one rank: nothing but compute, one call after the other."""
    found = step.profile(torch.randn(32, 64), path=None, steps=1)
    assert found.replayed.step_seconds == pytest.approx(found.measured_s, rel=1e-6)
    assert "the simulator with the measured times of its calls: " in str(found)


def test_a_trace_in_a_folder_that_is_not_there_is_refused_before_any_step(step: Any, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"step.profile.*expected a folder that exists"):
        step.profile(torch.randn(32, 64), path=tmp_path / "none" / "trace.json")
    with pytest.raises(CaptureError, match="expected a step that has run"):
        _ = step.graph


def test_launches_are_counted_apart_from_what_they_launch(prediction: Prediction) -> None:
    events = [event for event in prediction.timeline.events if is_launch(event.node)]
    assert {class_of(event) for event in events if event.lane == COMPUTE} <= {"launches"}
    assert "launches" not in {class_of(event) for event in events if event.lane != COMPUTE}


def test_a_report_says_what_the_step_takes(step: Any) -> None:
    step(torch.randn(32, 64))
    text = step.report()
    assert "predicted step " in text and "on cpu" in text and "what would make the step shorter:" in text


def test_a_shape_that_only_the_run_knows_is_said_not_guessed() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fxzero.compile(model, optimizer, fxzero.Plan(), loss=lambda model, x: model(x)[x > 0].square().mean())
    x = torch.randn(4, 8)
    step(x)
    text = step.report()
    assert "the time of the step is not predicted: %" in text and "depends on values; see what it takes" in text
    assert step.record(x, steps=1).step_seconds > 0
    with pytest.raises(SimulationError, match="expected a shape that is known before the step runs"):
        step.profile(x, path=None, steps=1)


def test_calls_without_recorded_costs_are_told_as_the_search_takes_them(rewritten: Rewritten) -> None:
    """What some calls were measured to take has in it what ranks wait for each other: it counts for no other call."""
    graph = rewritten(2, zero=3)
    known, *_ = signatures(graph)
    hardware = replace(known_hardware("cpu"), contention={"ranks": 2.0})
    found = predict((graph,), hardware, recorded={known: 1e-3})
    assert dict(found.tasks) == step_tasks(graph, hardware.undisturbed(), recorded={known: 1e-3})
    without = predict((graph,), hardware).tasks  # the twin: all of them
    product = next(node for node in graph.calls() if "addmm" in node.name and signature(node, graph.mesh) != known)
    assert without[product].seconds == pytest.approx(2 * found.tasks[product].seconds)


def test_recorded_costs_are_kept_and_predicted_with(step: Any, tmp_path: Path) -> None:
    x, file = torch.randn(32, 64), tmp_path / "costs.json"
    recording = step.record(x, steps=2, costs=file)
    known = RecordedCosts.load(file, machine=Machine.of(torch.device("cpu")))
    hardware = known_hardware("cpu")
    found = predict(step.graphs, hardware, recorded=known.seconds)
    (product,) = (node for node in step.graph.calls() if node.name == "addmm")
    assert found.tasks[product].seconds == pytest.approx(recording.seconds["addmm"])
    assert predict(step.graphs, hardware).tasks[product].seconds != found.tasks[product].seconds
    contended = replace(hardware, contention={"h2d": 3.0}, beside_compute={"h2d": 3.0})
    undisturbed = predict(step.graphs, contended, recorded=known.seconds)  # what was measured has factors in it
    assert undisturbed.seconds == found.seconds and undisturbed.hardware.slowdown("h2d") == 1.0
    step.record(x, steps=1, costs=file)
    again = RecordedCosts.load(file, machine=Machine.of(torch.device("cpu")))
    assert {len(runs) for runs in again.runs.values()} == {2}
    with pytest.raises(CaptureError, match=r"step.record.*expected a folder that exists"):
        step.record(x, costs=tmp_path / "none" / "costs.json")
