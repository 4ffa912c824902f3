"""Fused gates: the same numbers, forward and backward, in whatever form a model writes them; else they stay."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero import StepGraph
from fxzero.graph import kernel_ops
from fxzero.graph.edit import Editor
from fxzero.passes.fuse_gates import fuse_gates
from tests.passes.kernel_steps import (
    captured,
    difference,
    fused_difference,
    is_no_less_accurate,
    outcome,
    values_of,
)

aten = torch.ops.aten
RTOL = 1e-5
GATE, GATE_BACKWARD = kernel_ops.OPS["gated_activation"]


def _tanh(a: torch.Tensor) -> torch.Tensor:
    return 0.5 * a * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * torch.pow(a, 3.0))))


# (gate, other) -> product, and the form that it is
FORMS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "silu": ("silu", lambda a, b: F.silu(a) * b),
    "turned": ("silu", lambda a, b: b * F.silu(a)),
    "sigmoid": ("silu", lambda a, b: a * torch.sigmoid(a) * b),
    "gelu": ("gelu_erf", lambda a, b: F.gelu(a) * b),
    "erf": ("gelu_erf", lambda a, b: 0.5 * a * (1 + torch.erf(a / math.sqrt(2))) * b),
    "tanh_gelu": ("gelu_tanh", lambda a, b: F.gelu(a, approximate="tanh") * b),
    "gelu_new": ("gelu_tanh", lambda a, b: _tanh(a) * b),
    "by_itself": ("silu", lambda a, b: F.silu(a) * a + b),
    "relu": ("", lambda a, b: F.relu(a) * b),
    "sigmoid_only": ("", lambda a, b: torch.sigmoid(a) * b),
    "scaled": ("", lambda a, b: F.gelu(1.1 * a) / 1.1 * b + F.silu(b).sum() * 0),
    "of_both": ("", lambda a, b: torch.tanh(a + b) * b),
}


class Gated(nn.Module):
    """Two halves of one product, one of which gates the other.

    Args:
        form: one of FORMS.
        halves: "chunk", "split" or "slices" of one tensor, or "apart".
    """

    def __init__(self, form: str, halves: str) -> None:
        super().__init__()
        self.form, self.halves = form, halves
        self.up, self.down = nn.Linear(6, 20), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.up(x)
        if self.halves == "apart":
            a, b = both[..., :10].contiguous(), both[..., 10:].contiguous()
        elif self.halves == "slices":
            a, b = both[..., :10], both[..., 10:]
        else:
            a, b = both.chunk(2, -1) if self.halves == "chunk" else both.split([10, 10], -1)
        return self.down(FORMS[self.form][1](a, b))


@functools.cache
def form_step(form: str, halves: str = "chunk", precision: str = "fp32") -> StepGraph:
    torch.manual_seed(0)
    loss = lambda model, x: torch.tanh(model(x)).square().sum()  # noqa: E731
    return captured(Gated(form, halves), loss, (torch.ones(2, 5, 6),), precision=precision)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    error, fused = fused_difference(form_step(form), fuse_gates.run)
    expected = FORMS[form][0]
    assert [node.args[2] for node in fused.calls(GATE)] == [expected] * bool(expected), fused.remarks
    assert len(fused.calls(GATE_BACKWARD)) == bool(expected)
    assert error < 1e-6


@pytest.mark.parametrize("halves", ["split", "slices", "apart"])
def test_halves(halves: str) -> None:
    error, fused = fused_difference(form_step("silu", halves), fuse_gates.run)
    assert len(fused.calls(GATE_BACKWARD)) == 1 and error < 1e-6


@pytest.mark.parametrize("form", ["silu", "gelu", "tanh_gelu"])
def test_bf16_is_no_less_accurate(form: str) -> None:
    single, fused = is_no_less_accurate(fuse_gates.run, FORMS[form][1], (64, 40), (64, 40))
    assert fused <= single


def test_a_gate_whose_inside_counts_stays() -> None:
    step = form_step("silu").copy()
    activated = step.calls(aten.silu.default)[0]
    with Editor(step, phase="forward").after(activated) as editor:
        step.set_result("metric", "active", editor.call(aten.mean.default, activated))
    error, fused = fused_difference(step, fuse_gates.run)
    assert error == 0 and not fused.calls(GATE)
    assert "0 of 1 gates; %mul: a value inside of it, %silu, is also read by %mean" in fused.remarks["fuse_gates"]


def test_what_is_no_gate_is_told() -> None:
    step = form_step("sigmoid_only").copy()
    text = str(step)
    assert fuse_gates.run(step) == 0 and str(step) == text
    reason = "%sigmoid is aten.sigmoid.default, which is no silu or gelu of one value"
    assert step.remarks["fuse_gates"] == f"gated_activation: none found; nearest, %mul: {reason}"


# ---- planted faults


def other_form(step: StepGraph) -> None:
    for node in step.calls(GATE):
        node.args = (*node.args[:2], "gelu_tanh" if node.args[2] == "gelu_erf" else "gelu_erf")


def other_form_in_backward(step: StepGraph) -> None:
    for node in step.calls(GATE_BACKWARD):
        node.args = (*node.args[:3], "gelu_tanh" if node.args[3] == "gelu_erf" else "gelu_erf")


def gate_and_other(step: StepGraph) -> None:
    for node in step.calls(GATE_BACKWARD):
        node.args = (node.args[0], node.args[2], node.args[1], node.args[3])


@pytest.mark.parametrize("fault", [other_form, other_form_in_backward, gate_and_other])
@pytest.mark.parametrize("form", ["gelu", "tanh_gelu"])
def test_a_fault_is_seen(fault: Callable[[StepGraph], None], form: str) -> None:
    step = form_step(form)
    fused = step.copy()
    fuse_gates.run(fused)
    fault(fused)
    values = values_of(step)
    assert difference(outcome(fused, values), outcome(step, values)) > RTOL


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    step = form_step("silu", "chunk", "bf16").copy()
    old = str(step)
    fuse_gates.run(step)
    sides = [re.sub(r"(?<=\S) {2,}", "  ", text).splitlines() for text in (old, str(step))]
    diff = difflib.unified_diff(*sides, "capture", "fuse_gates", n=0, lineterm="")
    golden("fuse_gates", "\n".join(line for line in diff if not line.startswith("@@")) + "\n")
