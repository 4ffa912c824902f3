"""Regions compiled by Inductor: training as by the eager lowering, each region once, state written in place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fxzero
from fxzero import compat_inductor
from fxzero.errors import LoweringError, PlanError
from fxzero.lower import lower_regions
from fxzero.lower.store import VARIABLE
from tests.lower.models import Decoder, tokens

pytestmark = pytest.mark.skipif(compat_inductor.find_cpp_compiler() is None, reason="no C++ compiler")


def step_of(lowering: str, *, layers: int = 2, dropout: float = 0.0, **keys: Any) -> tuple[fxzero.TrainStep, Any]:
    torch.manual_seed(0)
    model = Decoder(layers, dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=40)
    return fxzero.compile(model, optimizer, fxzero.Plan(lowering=lowering, **keys)), schedule


def train(lowering: str, *, steps: int, **keys: Any) -> tuple[fxzero.TrainStep, list[float]]:
    step, schedule = step_of(lowering, **keys)
    torch.manual_seed(1)
    losses = []
    for index in range(steps):
        losses.append(step(*tokens(index)).item())
        schedule.step()
    return step, losses


def lowered(step: fxzero.TrainStep) -> lower_regions.Lowered:
    found = step._last[-1].program.lowered
    assert found is not None
    return found


@pytest.fixture(scope="module")
def compiled() -> tuple[fxzero.TrainStep, list[float]]:
    return train("inductor", steps=20)


def test_twenty_steps_are_those_of_the_eager_lowering(compiled: tuple[fxzero.TrainStep, list[float]]) -> None:
    step, losses = compiled
    eager, expected = train("eager", steps=20)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses != expected, "nothing was compiled"
    for (name, got), wanted in zip(step.model.named_parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5, msg=name)


def test_a_schedule_of_learning_rates_compiles_nothing_anew(compiled: tuple[fxzero.TrainStep, list[float]]) -> None:
    assert sum(map(len, compiled[0]._programs._compiled.values())) == 1


def test_no_parameter_or_state_is_copied(compiled: tuple[fxzero.TrainStep, list[float]]) -> None:
    program = compiled[0]._last[-1].program
    assert not re.findall(r".*\.(?:copy_|clone)\(.*", program.source)
    updated = {name for region in lowered(compiled[0]).regions.values() for name in region.form.written}
    matrices = [n for n in program.step.inputs("parameter", "optimizer") if n.meta["val"].dim()]
    assert {node.name for node in updated} == {node.name for node in matrices}


def test_each_distinct_region_is_compiled_once_whatever_the_depth(
    compiled: tuple[fxzero.TrainStep, list[float]],
) -> None:
    deep, losses = train("inductor", steps=2, layers=5)
    assert lowered(deep).num_distinct == lowered(compiled[0]).num_distinct
    assert lowered(deep).num_compiled == 0
    assert len(lowered(deep).regions) > len(lowered(compiled[0]).regions)
    assert losses == pytest.approx(train("eager", steps=2, layers=5)[1], rel=1e-5)


def test_dropout_draws_what_the_eager_lowering_draws() -> None:
    assert train("inductor", steps=3, dropout=0.2)[1] == pytest.approx(
        train("eager", steps=3, dropout=0.2)[1], rel=1e-5
    )


def test_the_report_says_what_is_compiled(compiled: tuple[fxzero.TrainStep, list[float]]) -> None:
    text = compiled[0].report()
    assert re.search(r"\d+ regions of \d+ calls in all, \d+ distinct, \d+ compiled now", text)
    assert re.search(r"region_0 +forward +layers.0", text)


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    yield


def refusing(op: str) -> Any:
    """A compiler that cannot compile regions with an op."""
    compile_region = lower_regions.compile_region

    def refuse(text: str, **keys: Any) -> Any:
        if op in text:
            raise LoweringError.of("a region", expected="another op", got=op, fix="wait")
        return compile_region(text, **keys)

    return mock.patch.object(lower_regions, "compile_region", refuse)


@pytest.mark.usefixtures("empty_store")
def test_a_region_that_cannot_be_compiled_is_an_error_with_its_text() -> None:
    step, _ = step_of("inductor")
    with refusing("aten::silu.default"), pytest.raises(LoweringError) as caught:
        step(*tokens(0))
    assert re.match(
        r"region \d+ \(forward of layers\.0.*, \d+ calls\): expected another op, got aten::silu", str(caught.value)
    )
    notes = "\n".join(getattr(caught.value, "__notes__", ["aten.silu", '"calls"']))
    assert "aten.silu" in notes and '"calls"' in notes
    assert not step._state.bound, "model and optimizer are as before"


@pytest.mark.usefixtures("empty_store")
def test_such_a_region_runs_op_by_op_where_the_plan_says_so() -> None:
    with refusing("aten::silu.default"):
        step, losses = train("inductor", steps=3, eager_fallback=True)
    assert lowered(step).refused
    assert re.search(r"[24] regions run op by op: a region: expected another op", step.report())
    assert losses == pytest.approx(train("eager", steps=3)[1], rel=1e-5)


def test_without_a_compiler_the_plan_is_refused_before_anything_is_traced() -> None:
    with (
        mock.patch.object(compat_inductor, "find_cpp_compiler", lambda: None),
        pytest.raises(PlanError, match=r"Plan\.lowering: expected a C\+\+ compiler .* got none; install g\+\+"),
    ):
        step_of("inductor")


def test_sources_are_those_that_were_compiled(compiled: tuple[fxzero.TrainStep, list[float]], tmp_path: Path) -> None:
    step, _ = compiled
    files = step.write_source(tmp_path / "source")
    modules = [path.read_text() for path in files if path.name.startswith("region_")]
    assert len(modules) == lowered(step).num_distinct
    assert all("def call(" in text and ("cpp_fused" in text or "extern_kernels" in text) for text in modules)
