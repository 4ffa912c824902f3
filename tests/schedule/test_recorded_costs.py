"""Schedules by recorded costs: they decide, other machines' are refused, and so are those of another step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero import StepGraph
from fxzero.cost.recorded import RecordedCosts, costs_from
from fxzero.errors import HardwareError
from fxzero.passes.schedule_step import schedule_step
from tests.schedule.steps import rewritten

STEP = rewritten(1)


def scheduled(**options: Any) -> StepGraph:
    out = STEP.copy()
    schedule_step.run(out, hardware="h100", **options)
    return out


def costs(scale: float) -> RecordedCosts:
    """Of every call of the step, growing with its place in the program, or shrinking."""
    seconds = {node: 1e-3 * (1 + place) ** scale for place, node in enumerate(STEP.calls())}
    return RecordedCosts.here(torch.device("cpu")).adding(costs_from(STEP, seconds))


def test_recorded_costs_decide_from_a_file_as_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs(1.0).merged_into(path)
    texts = [str(scheduled(costs=source)) for source in (costs(1.0), str(path), costs(-1.0), None)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_ranks_compare_a_digest_of_all_costs() -> None:
    assert repr(costs(1.0)) == repr(costs(1.0)) != repr(costs(-1.0))
    assert len(repr(costs(1.0))) < 200


def test_costs_of_another_machine_are_refused_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    found = costs(1.0)
    replace(found, machine=replace(found.machine, device="NVIDIA H200")).merged_into(path)
    with pytest.raises(HardwareError, match="costs of NVIDIA H200"):
        scheduled(costs=str(path))
    assert str(scheduled(costs=str(path), any_machine=True)) == str(scheduled(costs=found))


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"none.json: expected recorded costs.*step.record\(\*batch\)"):
        scheduled(costs=str(tmp_path / "none.json"))


def test_costs_of_another_step_are_refused() -> None:
    other = RecordedCosts.here(torch.device("cpu")).adding({"aten.mm.default(f32[7, 7], f32[7, 7])": 1.0})
    with pytest.raises(HardwareError, match=r"expected costs of calls of this step.*got 1 others, such as 'aten.mm"):
        scheduled(costs=other)
