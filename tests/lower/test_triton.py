"""Regions as generated Triton kernels, in the interpreter: cut by rows, trained with, refused where none can run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.cli import main
from fxzero.errors import LoweringError, PlanError
from fxzero.graph import row_ops
from fxzero.graph.region_rules import check_regions
from fxzero.graph.rules import Context
from fxzero.kernels import region_ops
from fxzero.lower import lower_regions
from fxzero.lower.inductor import Compiled
from fxzero.lower.row_document import row_document
from fxzero.lower.store import VARIABLE, Store
from fxzero.lower.triton import compile_region
from tests.kernels.interpreter import interpreter
from tests.lower.models import Decoder, tokens

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


@pytest.fixture(scope="module", autouse=True)
def _interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with interpreter(), mock.patch.dict("os.environ", {VARIABLE: str(tmp_path_factory.mktemp("kernels"))}):
        yield


def train(model: nn.Module, batches: list[tuple], lowering: str, **keys: Any) -> tuple[fxzero.TrainStep, list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = fxzero.compile(model, optimizer, fxzero.Plan(lowering=lowering, **keys))
    return step, [step(*batch).item() for batch in batches]


def decoder(lowering: str, *, layers: int = 1, **keys: Any) -> tuple[fxzero.TrainStep, list[float]]:
    torch.manual_seed(0)
    return train(Decoder(layers), [tokens(i) for i in range(3)], lowering, **keys)


@pytest.fixture(scope="module")
def trained(_interpreter: None) -> tuple[fxzero.TrainStep, list[float]]:
    return decoder("triton")


def lowered(step: fxzero.TrainStep) -> lower_regions.Lowered:
    found = step._last[-1].program.lowered
    assert found is not None
    return found


def ops(region: lower_regions.LoweredRegion) -> list[str]:
    return [call["op"].removeprefix("aten::") for call in json.loads(region.form.text)["calls"]]


def test_three_steps_are_those_of_the_eager_lowering(trained: tuple[fxzero.TrainStep, list[float]]) -> None:
    step, losses = trained
    eager, expected = decoder("eager")
    assert losses == pytest.approx(expected, rel=1e-5)
    for (name, got), wanted in zip(step.model.named_parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5, msg=name)
    assert any(not torch.equal(a, b) for a, b in zip(step.model.parameters(), eager.model.parameters(), strict=True)), (
        "nothing was compiled"
    )


def test_norms_gates_and_updates_are_kernels(trained: tuple[fxzero.TrainStep, list[float]]) -> None:
    found = [set(ops(region)) for region in lowered(trained[0]).regions.values()]
    assert any({"mean.dim", "rsqrt.default"} <= region for region in found), "no RMS norm"
    assert any({"add.Tensor", "native_layer_norm.default"} <= region for region in found), "no layer norm"
    assert any({"silu_backward.default"} <= region or {"mul.Tensor"} <= region for region in found), "no gate"
    assert any({"sum.dim_IntList", "expand.default"} <= region for region in found), "no backward of a norm"
    assert any({"lerp.Scalar", "addcmul.default", "addcdiv.default"} <= region for region in found), "no AdamW"


def test_each_region_is_one_row_structure_and_the_rest_runs_op_by_op(
    trained: tuple[fxzero.TrainStep, list[float]],
) -> None:
    step = trained[0]._last[-1].program.step
    known = {*row_ops.POINTWISE, *row_ops.ROW_OPS}
    for region in lowered(trained[0]).regions.values():
        document = row_document(region.form.text)
        assert {call["op"] for call in document["calls"]} <= {*known, *region_ops.VIEWS, "getitem"}
    outside = {row_ops.op_name(n.target) for n in step.calls() if "region" not in n.meta and hasattr(n.target, "name")}
    assert {"aten::mm.default", "aten::addmm.default", "aten::embedding.default"} <= outside
    assert not list(check_regions(Context(step, None)))


def test_state_is_written_in_place(trained: tuple[fxzero.TrainStep, list[float]]) -> None:
    program = trained[0]._last[-1].program
    assert not re.findall(r".*\.(?:copy_|clone)\(.*", program.source)
    written = {name for region in lowered(trained[0]).regions.values() for name in region.form.written}
    assert {n.name for n in written} == {
        n.name for n in program.step.inputs("parameter", "optimizer") if n.meta["val"].dim()
    }
    for region in lowered(trained[0]).regions.values():
        over = [buffer for buffer in row_document(region.form.text)["buffers"].values() if buffer["over"]]
        assert all(buffer["direct"] for buffer in over)


def test_the_source_of_a_region_is_on_disk(trained: tuple[fxzero.TrainStep, list[float]]) -> None:
    store = Store(lowering="triton")
    for region in lowered(trained[0]).regions.values():
        source = store.path(region.form.text).read_text()
        assert "tl.store(" in source
        assert all(call["op"] in source for call in row_document(region.form.text)["calls"])


def test_the_report_lists_the_kernels(trained: tuple[fxzero.TrainStep, list[float]]) -> None:
    assert re.search(r"region_0 +forward +layers.0", trained[0].report())


class Attention(nn.Module):
    """Attention by plain ops, with a mask, a bias and a softmax."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) * 0.3 + self.bias).masked_fill(~mask, float("-inf"))
        mixed = scores.softmax(-1) @ v
        return F.mse_loss(F.gelu(self.out(mixed.transpose(1, 2).flatten(2)), approximate="tanh"), y)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_by_plain_ops(precision: str) -> None:
    batches = [(torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(i)),) * 2 for i in range(3)]
    found = {}
    for lowering in ("eager", "triton"):
        torch.manual_seed(0)
        step, found[lowering] = train(Attention(12), batches, lowering, precision=precision)
    assert found["triton"] == pytest.approx(found["eager"], rel=1e-5 if precision == "fp32" else 2e-2)
    regions = [ops(region) for region in lowered(step).regions.values()]
    assert any("_softmax.default" in region and "masked_fill.Scalar" in region for region in regions)
    assert any("_softmax_backward_data.default" in region for region in regions)


@pytest.mark.parametrize("keys", [{"clip_grad_norm": 0.5}, {"accumulate": 2}, {"loss_scale": 64.0}], ids=str)
def test_other_plans(keys: dict[str, Any]) -> None:
    assert decoder("triton", **keys)[1] == pytest.approx(decoder("eager", **keys)[1], rel=1e-5)


def test_another_lowering_has_another_file(tmp_path: Path) -> None:
    text = '{"written": {}}'
    by_triton, by_inductor = Store(tmp_path, lowering="triton"), Store(tmp_path)
    assert by_triton.path(text) != by_inductor.path(text)
    source = "def call(values):\n    values.clear()\n    return ({},)\n"
    assert by_triton.get(text, lambda: Compiled(source.format(1), ()))[0]([]) == (1,)
    assert by_inductor.get(text, lambda: Compiled(source.format(2), ()))[0]([]) == (2,)
    assert by_triton.get(text, lambda: Compiled(source.format(3), ()))[0]([]) == (1,)


def test_a_region_that_no_kernel_holds_is_an_error_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(region_ops.POINTWISE, "aten::rsqrt.default")
    torch.manual_seed(0)
    with mock.patch.object(lower_regions, "Store", lambda **_: Fresh()), pytest.raises(LoweringError) as caught:
        decoder("triton")
    assert re.match(r"region \d+ \(forward of .*\): .*got .*aten::rsqrt.default", str(caught.value))
    with mock.patch.object(lower_regions, "Store", lambda **_: Fresh()):
        step, losses = decoder("triton", eager_fallback=True)
    assert lowered(step).refused
    assert losses == pytest.approx(decoder("eager")[1], rel=1e-5)


class Fresh:
    """Stands for a store in which nothing is."""

    def holds(self, text: str) -> bool:
        return False

    def get(self, text: str, make: Any) -> Any:
        make()
        return Store(lowering="triton").get(text, lambda: compile_region(text))


def test_on_the_cpu_the_plan_is_refused_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        PlanError, match=r"Plan\.lowering: expected a model on a GPU .*got a model on cpu.*; .*INTERPRET=1"
    ):
        decoder("triton")


def test_without_triton_the_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    with pytest.raises(PlanError, match=r"Plan\.lowering: expected the package triton .*got none; pip install triton"):
        decoder("triton")


def test_dump_writes_the_kernels_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.py"
    steps.write_text(
        "import torch\nfrom tests.lower.models import Decoder, tokens\n"
        "def step():\n    model = Decoder(2)\n    return model, torch.optim.AdamW(model.parameters()), tokens(0)\n"
    )
    folder = tmp_path / "regions"
    args = ["--world", "2", "--backend", "gloo", "--lowering", "triton", "--regions", str(folder), "--quiet"]
    assert main(["dump", f"{steps}:step", *args]) == 0
    header = re.search(r"# (\d+) regions of (\d+) functions;", capsys.readouterr().out)
    kernels = sorted(folder.glob("region_*.py"))
    assert header is not None and len(kernels) == int(header[2]) < int(header[1])
    assert all("tl.load(" in path.read_text() and ast.parse(path.read_text()) for path in kernels)
    assert "group_dp" in (folder / "program.py").read_text()
