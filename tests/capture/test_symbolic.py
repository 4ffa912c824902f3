"""One capture for all sizes: at each, the text is that of a direct capture; where it would not be, `at` refuses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero import Plan
from fxzero.capture import CaptureOptions, Inventory, capture_step
from fxzero.capture.batch_dims import find_dims, resized
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.symbolic import SymbolicStep
from fxzero.errors import CaptureError
from fxzero.graph.text import to_text
from fxzero.recipe import captured_as, recipe
from tests.hf.models import CASES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llama_meta.py"
SIZES = ((7, 13), (1, 1))

Build = Callable[[], tuple[nn.Module, torch.optim.Optimizer, tuple[Any, ...], dict[str, Any]]]


class GPT(nn.Module):
    """Learned positions, dropout, a mask made from the length, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(31, 16), nn.Embedding(48, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        hidden = self.tokens(x) + self.positions(torch.arange(length))
        logits = self.head(self.blocks(hidden, mask=mask))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()) / x.numel()


class Branching(nn.Module):
    """Another program for long sequences, and one for those whose positions say so."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.lin(x)
        if x.shape[1] > 16:
            out = out.relu()
        if (torch.arange(x.shape[1]) > 11).any():
            out = out.sigmoid()
        return out.square().mean()


def gpt() -> Any:
    model = GPT()
    tokens = torch.zeros(3, 24, dtype=torch.int64)
    return model, torch.optim.AdamW(model.parameters()), (tokens, tokens.clone()), {}


def llama() -> Any:
    spec = importlib.util.spec_from_file_location("llama_meta", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, optimizer, _ = module.llama(layers=2, dim=32, ffn=48, heads=4, kv_heads=2, vocab=64, seq=48)
    tokens = torch.zeros(3, 24, dtype=torch.int64)
    return model, optimizer, (tokens, tokens), {}  # one tensor in two places


def hugging_face(name: str) -> Build:
    def build() -> Any:
        pytest.importorskip("transformers")
        model = CASES[name].model()
        tokens = torch.zeros(3, 24, dtype=torch.int64)
        return model, torch.optim.AdamW(model.parameters()), (), {"input_ids": tokens, "labels": tokens.clone()}

    return build


BUILDS: dict[str, Build] = {
    "gpt": gpt,
    "llama": llama,
    "hf_llama": hugging_face("llama"),
    "hf_gpt2": hugging_face("gpt2"),
}


def prepared(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Inventory, bool]:
    return rehearse(Inventory.of(model, optimizer))


@pytest.mark.parametrize("name", BUILDS)
def test_a_specialised_step_is_the_one_that_is_captured_directly(name: str) -> None:
    model, optimizer, args, kwargs = BUILDS[name]()
    inventory, fresh = prepared(model, optimizer)
    options = captured_as(Plan(precision="bf16", clip_grad_norm=1.0)) if name == "hf_llama" else CaptureOptions()
    how: Any = {"fresh": fresh, "options": options}
    symbolic = SymbolicStep(inventory, None, args, kwargs, **how)
    assert symbolic.sizes == {"batch": 3, "sequence": 24}
    for batch, sequence in SIZES if name == "gpt" else SIZES[:1]:
        sizes = {"batch": batch, "sequence": sequence}
        args_at, kwargs_at = resized(args, kwargs, dims=symbolic.dims, sizes=sizes)
        if name == "llama":
            args_at = (args_at[0], args_at[0])
        direct = capture_step(inventory, None, args_at, kwargs_at, **how).step
        assert to_text(symbolic.at(**sizes)) == to_text(direct), sizes


def test_the_recipe_runs_on_a_specialised_step() -> None:
    model, optimizer, args, _ = gpt()
    inventory, fresh = prepared(model, optimizer)
    symbolic = SymbolicStep(inventory, None, args, {}, fresh=fresh)
    texts = {}
    for world in (2, 4):
        plan = Plan(zero=3).resolve(world)
        args_at, _ = resized(args, {}, dims=symbolic.dims, sizes={"batch": 2, "sequence": 16})
        for kind, step in (
            ("symbolic", symbolic.at(batch=2, sequence=16)),
            ("direct", capture_step(inventory, None, args_at, {}, fresh=fresh).step),
        ):
            step.mesh = dict(plan.axes)
            texts[kind, world] = to_text(recipe(plan, backend="gloo").run(step))
        assert texts["symbolic", world] == texts["direct", world]


def branching() -> SymbolicStep:
    model = Branching()
    inventory, fresh = prepared(model, torch.optim.SGD(model.parameters()))
    return SymbolicStep(inventory, None, (torch.zeros(2, 14, 8),), {}, fresh=fresh)


@pytest.mark.parametrize(
    ("sequence", "said"), [(17, "sequence <= 16"), (10**6, "sequence <= 16"), (12, "that the model computes")]
)
def test_sizes_of_another_program_are_refused(sequence: int, said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        branching().at(sequence=sequence)


def test_without_the_refusal_the_program_would_be_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    step = branching()
    for check in ("_check_conditions", "_check_derived"):
        monkeypatch.setattr(f"fxzero.capture.symbolic.{check}", lambda *args: None)
    for sequence in (12, 17):
        batch = (torch.zeros(2, sequence, 8),)
        model = Branching()
        inventory, fresh = prepared(model, torch.optim.SGD(model.parameters()))
        direct = capture_step(inventory, None, batch, {}, fresh=fresh).step
        assert to_text(step.at(sequence=sequence)) != to_text(direct)
    assert "relu" not in to_text(step.at(sequence=17))


class ByLength(torch.optim.SGD):
    """An optimizer whose branch depends on a hyperparameter and on the batch's size together."""

    length: object = 0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                rate = group["lr"] if group["lr"] * ByLength.length < 1.0 else 2 * group["lr"]  # type: ignore[operator]
                parameter.add_(parameter.grad, alpha=-1.0)
                parameter.mul_(1.0 - rate)


def test_a_condition_on_a_size_and_a_hyperparameter_is_asked_with_its_present_value() -> None:
    model = nn.Linear(8, 8)
    inventory, fresh = prepared(model, ByLength(model.parameters(), lr=0.1))

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ByLength.length = x.shape[0]
        return model(x).mean()

    symbolic = SymbolicStep(inventory, loss, (torch.zeros(4, 8),), {}, fresh=fresh, dims={"args.0": {0: "rows"}})
    assert "f32[9, 8]" in to_text(symbolic.at(rows=9))
    with pytest.raises(CaptureError, match="sizes for which"):
        symbolic.at(rows=11)


def test_a_size_that_the_model_fixes_is_refused_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))
    inventory, fresh = prepared(model, torch.optim.SGD(model.parameters()))
    step = SymbolicStep(inventory, lambda m, x: m(x).mean(), (torch.zeros(4, 8),), {}, fresh=fresh)
    assert "f32[6, 8]" in to_text(step.at(batch=6))  # dim 1 looks like a sequence, but is the width
    with pytest.raises(CaptureError, match=r"Eq\(sequence, 8\)|sequence"):
        step.at(sequence=9)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"length": 3}, "names among batch, sequence, got 'length'"),
        ({"batch": 0}, "batch: expected a positive number, got 0"),
        ({"batch": 2.5}, "got 2.5"),
        ({"batch": True}, "got True"),
    ],
)
def test_wrong_sizes_are_named(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        branching().at(**sizes)


def test_dims_are_found_and_can_be_named() -> None:
    leaves = [
        ("args.0", torch.zeros(2, 7, dtype=torch.int64)),
        ("args.1", torch.zeros(2, 1, 7, 7)),
        ("args.2", torch.zeros(7)),
        ("args.3", torch.zeros(())),
        ("args.4", 3),
    ]
    assert find_dims(leaves) == {
        "args.0": {0: "batch", 1: "sequence"},
        "args.1": {0: "batch", 2: "sequence", 3: "sequence"},
        "args.2": {0: "sequence"},
    }
    model = nn.Linear(8, 8)
    inventory, fresh = prepared(model, torch.optim.SGD(model.parameters()))

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).mean()

    named = SymbolicStep(inventory, loss, (torch.zeros(4, 8),), {}, fresh=fresh, dims={"args.0": {0: "rows"}})
    assert named.sizes == {"rows": 4} and "f32[9, 8]" in to_text(named.at(rows=9))
    for dims, said in (
        ({"args.1": {0: "rows"}}, "dim 0 of args.1: expected a dim of the batch"),
        ({"args.0": {2: "rows"}}, "dim 2 of args.0"),
        ({"args.0": {0: "rows", 1: "rows"}}, "expected rows = 4, as elsewhere"),
    ):
        with pytest.raises(CaptureError, match=said):
            SymbolicStep(inventory, loss, (torch.zeros(4, 8),), {}, fresh=fresh, dims=dims)
    transposed = SymbolicStep(inventory, loss, (torch.zeros(8, 4).t(),), {}, fresh=fresh)
    with pytest.raises(CaptureError, match="expected a contiguous tensor"):
        transposed.at(batch=3)
