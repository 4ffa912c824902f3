"""Fused rotary embeddings: the same queries, keys and gradients, pairs of halves or of neighbours; else they stay."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero import StepGraph
from fxzero.graph import kernel_ops
from fxzero.graph.edit import Editor
from fxzero.graph.verify import verify
from fxzero.passes.fuse_rotary import fuse_rotary
from tests.lower.interpreted import interpreted
from tests.passes.kernel_steps import (
    captured,
    difference,
    far_apart,
    fused_difference,
    is_no_less_accurate,
    outcome,
    trained,
    values_of,
)

aten = torch.ops.aten
RTOL = 1e-5
ROTARY, ROTARY_BACKWARD = kernel_ops.OPS["rotary"]
ELEMENTS = 8


# ---- forms


def _halves(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _chunks(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second.neg(), first), dim=-1)


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _other_way(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


def _swapped(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), dim=-1)


ROTATIONS: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "halves": (False, _halves),
    "chunks": (False, _chunks),
    "neighbours": (True, _neighbours),
    "swapped": (False, _swapped),
    "other_way": (False, _other_way),
}


class Attention(nn.Module):
    """Rotated queries and keys of two heads.

    Args:
        rotation: one of ROTATIONS.
        rows: tables for each row of the batch; else one for all.
    """

    def __init__(self, rotation: str = "halves", *, rows: bool = False) -> None:
        super().__init__()
        self.rotate, self.rows = ROTATIONS[rotation][1], rows
        self.qkv, self.out = nn.Linear(2 * ELEMENTS, 6 * ELEMENTS), nn.Linear(2 * ELEMENTS, 2 * ELEMENTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        angle = torch.arange(length * ELEMENTS, dtype=torch.float32).view(1, 1, length, ELEMENTS)
        if self.rows:
            angle = angle + torch.arange(batch).view(batch, 1, 1, 1)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        q, k = (part * cos + self.rotate(part) * sin for part in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@functools.cache
def form_step(rotation: str, *, rows: bool = False, precision: str = "fp32") -> StepGraph:
    torch.manual_seed(0)
    loss = lambda model, x: model(x).square().sum()  # noqa: E731
    return captured(Attention(rotation, rows=rows), loss, (torch.ones(3, 5, 2 * ELEMENTS),), precision=precision)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("rotation", ["halves", "chunks", "neighbours"])
def test_forms(rotation: str, rows: bool) -> None:
    error, fused = fused_difference(form_step(rotation, rows=rows), fuse_rotary.run)
    assert [node.args[3] for node in fused.calls(ROTARY)] == [ROTATIONS[rotation][0]] * 2, fused.remarks
    assert len(fused.calls(ROTARY_BACKWARD)) == 2
    assert error < 1e-6
    tables = {tuple(node.args[1].meta["val"].shape) for node in fused.calls(ROTARY)}  # type: ignore[union-attr]
    assert tables == {(3, 5, ELEMENTS) if rows else (5, ELEMENTS)}


@pytest.mark.parametrize("rotation", ["swapped", "other_way"])
def test_what_is_no_such_rotation_stays(rotation: str) -> None:
    step = form_step(rotation).copy()
    text = str(step)
    assert fuse_rotary.run(step) == 0 and str(step) == text
    expected = "rotary: none found; nearest, %add: %cat is no rotation by pairs of what the other product reads"
    assert step.remarks["fuse_rotary"] == expected


def test_bf16_is_no_less_accurate() -> None:
    def rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        table = angle.detach().view(1, 1, 6, ELEMENTS)
        return x * table + _halves(x) * (0.5 * table)

    single, fused = is_no_less_accurate(fuse_rotary.run, rotated, (2, 3, 6, ELEMENTS), (6, ELEMENTS), edits=2)
    assert fused <= single


def test_a_rotation_whose_inside_counts_stays() -> None:
    step = form_step("halves").copy()
    for turned in step.calls(aten.cat.default)[:1]:
        with Editor(step, phase="forward").after(turned) as editor:
            step.set_result("metric", "turned", editor.call(aten.mean.default, turned))
    error, fused = fused_difference(step, fuse_rotary.run)
    assert error < 1e-6 and len(fused.calls(ROTARY)) == 1


def test_gradients_have_the_strides_that_their_readers_knew() -> None:
    """But where a reader copies them anyway."""
    step = form_step("halves").copy()
    fuse_rotary.run(step)
    for node in step.calls():
        if node.target is aten.clone.default:
            assert node.meta["val"].is_contiguous()
    assert step.calls(ROTARY_BACKWARD)
    verify(step)


KEYS: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"precision": "bf16", "recompute": ["rotated"]}, 2**-6),
    "regions": ({"lowering": "inductor"}, RTOL),
}


class Model(nn.Module):
    """An attention between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rotated, self.head = nn.Embedding(50, 16), Attention(), nn.Linear(16, 50)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.rotated(self.embed(x))).flatten(0, 1), y.flatten())


@pytest.mark.parametrize(("keys", "rtol"), KEYS.values(), ids=KEYS)
def test_with_other_keys_of_a_plan(keys: dict[str, Any], rtol: float) -> None:
    with interpreted():
        whole = trained(Model, **keys)
        assert far_apart(trained(Model, **keys, kernels=("rotary",)), whole, rtol=rtol) == []


# ---- planted faults


def sign_of_sin(step: StepGraph) -> None:
    for node in step.calls(ROTARY):
        with Editor(step, phase="forward").before(node) as editor:
            node.args = (*node.args[:2], editor.call(aten.neg.default, node.args[2]), node.args[3])


def sign_of_sin_in_backward(step: StepGraph) -> None:
    for node in step.calls(ROTARY_BACKWARD):
        with Editor(step, phase="backward").before(node) as editor:
            node.args = (*node.args[:2], editor.call(aten.neg.default, node.args[2]), node.args[3])


def other_pairs(step: StepGraph) -> None:
    for node in step.calls(ROTARY, ROTARY_BACKWARD):
        node.args = (*node.args[:3], not node.args[3])


@pytest.mark.parametrize("fault", [sign_of_sin, sign_of_sin_in_backward, other_pairs])
def test_a_fault_is_seen(fault: Callable[[StepGraph], None]) -> None:
    step = form_step("neighbours", rows=True)
    fused = step.copy()
    fuse_rotary.run(fused)
    fault(fused)
    values = values_of(step)
    assert difference(outcome(fused, values), outcome(step, values)) > RTOL


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    step = form_step("halves").copy()
    old = str(step)
    fuse_rotary.run(step)
    sides = [re.sub(r"(?<=\S) {2,}", "  ", text).splitlines() for text in (old, str(step))]
    diff = difflib.unified_diff(*sides, "capture", "fuse_rotary", n=0, lineterm="")
    golden("fuse_rotary", "\n".join(line for line in diff if not line.startswith("@@")) + "\n")
