"""Recorded costs: exact as text, merged across runs, refused for another machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxzero.cost.recorded import KEPT_RUNS, Machine, RecordedCosts, costs_from
from fxzero.errors import HardwareError
from fxzero.graph import StepGraph

HERE = Machine("a CPU, 2 cores", "2.13.0", 1)
COSTS = RecordedCosts(HERE).adding({"aten.mm.default(f32[2, 2], f32[2, 2])": 0.1, "aten.add.Tensor(f32[2])": 1e-6 / 3})


def test_this_machine_has_a_name() -> None:
    machine = Machine.of(torch.device("cpu"))
    assert "cores" in machine.device and machine.torch_version == torch.__version__ and machine.threads >= 1
    assert RecordedCosts.here(torch.device("cpu")).seconds == {}


def test_text_is_exact_and_the_same_for_the_same_costs() -> None:
    text = COSTS.as_text()
    assert RecordedCosts.from_text(text) == COSTS
    backwards = RecordedCosts(HERE, dict(reversed(list(COSTS.runs.items()))))
    assert backwards.as_text() == text
    assert replace(COSTS, machine=replace(HERE, threads=2)).as_text() != text


def test_runs_are_merged_and_their_median_counts(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for seconds in (1.0, 9.0, 2.0):
        RecordedCosts(HERE).adding({"op": seconds}).merged_into(path)
    found = RecordedCosts.load(path, machine=HERE)
    assert found.runs == {"op": (1.0, 9.0, 2.0)} and found.seconds == {"op": 2.0}
    for number in range(2 * KEPT_RUNS):
        found = found.adding({"op": float(number)})
    assert found.runs["op"] == tuple(map(float, range(KEPT_RUNS, 2 * KEPT_RUNS)))
    assert [item.name for item in tmp_path.iterdir()] == ["costs.json"]  # nothing half written is left


@pytest.mark.parametrize(
    "other",
    [replace(HERE, device="NVIDIA H200"), replace(HERE, torch_version="2.12.0"), replace(HERE, threads=8)],
    ids=str,
)
def test_another_machines_costs_are_refused_unless_forced(other: Machine, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    COSTS.merged_into(path)
    with pytest.raises(HardwareError) as info:
        RecordedCosts.load(path, machine=other)
    assert str(HERE) in str(info.value) and str(other) in str(info.value)
    assert RecordedCosts.load(path, machine=other, force=True) == COSTS
    with pytest.raises(HardwareError, match="costs to merge"):
        RecordedCosts(other).merged(COSTS)
    assert RecordedCosts(other).merged(COSTS, force=True).machine == other
    with pytest.raises(HardwareError):
        RecordedCosts(other).adding({"op": 1.0}).merged_into(path)
    assert RecordedCosts.load(path, machine=HERE) == COSTS  # the twin: as it was, for the machine that it is of


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        COSTS.as_text()[:-20],
        COSTS.as_text().replace('"format": 1', '"format": 2'),
        json.dumps({"format": 1, "machine": {"device": "x"}, "seconds": {}}),
        json.dumps(
            {"format": 1, "machine": {"device": "x", "torch_version": "2", "threads": 1}, "seconds": {"op": 1.0}}
        ),
        json.dumps(
            {"format": 1, "machine": {"device": "x", "torch_version": "2", "threads": 1}, "seconds": {"op": []}}
        ),
    ],
)
def test_a_file_that_is_no_record_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HardwareError, match=r"costs.json: expected recorded costs, format 1, got .*record again"):
        RecordedCosts.load(path, machine=HERE)
    with pytest.raises(HardwareError, match=r"step\.record"):
        RecordedCosts.load(tmp_path / "none.json", machine=HERE)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(HardwareError, match="cost of op: expected seconds"):
        RecordedCosts(HERE).adding({"op": value})


def test_a_name_that_is_no_call_is_refused() -> None:
    graph = torch.fx.Graph()
    graph.output(()).meta["results"] = ()
    step = StepGraph(graph)
    with pytest.raises(HardwareError, match="calls of this program, got 'mm_7'"):
        costs_from(step, {"mm_7": 1.0})
