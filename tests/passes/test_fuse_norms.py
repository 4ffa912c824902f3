"""Fused norms: the same numbers, forward and backward, in whatever form a model writes them; else they stay."""

from __future__ import annotations

import difflib
import functools
import operator
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fxzero import Plan, StepGraph
from fxzero.graph import kernel_ops
from fxzero.graph.edit import Editor
from fxzero.graph.verify import verify
from fxzero.passes import fuse_norms as pass_module
from fxzero.passes.fuse_norms import fuse_norms
from fxzero.passes.recompute_pointwise import backward_readers
from fxzero.recipe import recipe
from tests.lower.interpreted import interpreted
from tests.lower.models import tokens
from tests.numerics.local_ranks import compile_for, run_ranks
from tests.passes.kernel_steps import (
    captured,
    decoder,
    difference,
    far_apart,
    fused_difference,
    is_no_less_accurate,
    kept_bytes,
    long_step,
    outcome,
    trained,
    values_of,
)

aten = torch.ops.aten
RTOL = 1e-5
NORMS = ("rms_norm", "layer_norm")
RMS, RMS_BACKWARD = kernel_ops.OPS["rms_norm"]
COLUMNS = 24


# ---- forms


class Norm(nn.Module):
    """A norm in one of FORMS, with a weight."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.norm_weight = form, nn.Parameter(torch.ones(COLUMNS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FORMS[self.form](x, self.norm_weight)


def _llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _t5(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype)


def _gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return (x * x).mean(-1, keepdim=True) + 1e-5


def _deferred(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The sum of squares by columns, as some write the mean."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-5) * w


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "llama": _llama,
    "t5": _t5,
    "gemma": _gemma,
    "torch": lambda x, w: torch.rms_norm(x, (COLUMNS,), w, 1e-5),
    "no_weight": lambda x, w: x * torch.rsqrt(_mean(x)),
    "divided": lambda x, w: x / torch.sqrt(_mean(x)) * w,
    "power": lambda x, w: x * _mean(x) ** -0.5 * w,
    "root": lambda x, w: w * (x / _mean(x) ** 0.5),
    "reciprocal": lambda x, w: x * _mean(x).sqrt().reciprocal() * w,
    "layer_norm": lambda x, w: torch.layer_norm(x, (COLUMNS,), w, None, 1e-5),
    "deferred": _deferred,
    "eps_outside": lambda x, w: x / ((x * x).mean(-1, keepdim=True).sqrt() + 1e-5) * w,
    "of_rows": lambda x, w: x * torch.rsqrt((x * x).mean(0, keepdim=True) + 1e-5) * w,
    "of_others": lambda x, w: x * torch.rsqrt(_mean(x.tanh())) * w,
}
STAY = {
    "deferred": "none found; nearest, %rsqrt of norm: %div is aten.div.Tensor, not a mean of the last dimension",
    "eps_outside": "none found; nearest, %sqrt of norm: %mean is aten.mean.dim, not a mean and a number",
    "of_rows": "none found; nearest, %rsqrt of norm: %mean is aten.mean.dim, not a mean of the last dimension",
    "of_others": "none found; nearest, %rsqrt of norm: %rsqrt scales nothing that it is the root of",
}


class Layer(nn.Module):
    """A product, a norm, a product: with the norm's input beside it, as a residual stream has it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, COLUMNS), Norm(form), nn.Linear(COLUMNS, COLUMNS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return hidden + self.last(self.norm(hidden))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(model(x)).square().sum()


@functools.cache
def form_step(form: str, precision: str = "fp32") -> StepGraph:
    torch.manual_seed(0)
    return captured(Layer(form), loss_of, (torch.ones(2, 5, 6),), precision=precision)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in STAY])
def test_forms(form: str) -> None:
    error, fused = fused_difference(form_step(form), fuse_norms.run)
    kernel = "layer_norm" if form == "layer_norm" else "rms_norm"
    assert [len(fused.calls(op)) for op in kernel_ops.OPS[kernel]] == [1, 1], fused.remarks
    assert (fused.calls(kernel_ops.OPS[kernel][0])[0].args[1] is None) == (form == "no_weight")
    assert error < 1e-6
    weight = fused.input("parameter", "norm.norm_weight")
    kept = {node.target for node in fused.phase("forward") if backward_readers(node)}
    assert weight is not None and not kept & {aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.mul.Tensor}


def test_the_rms_norm_that_torch_has_on_a_gpu() -> None:
    """On the CPU capture makes single ops of it: here it is put back into a graph."""
    step = form_step("torch")
    own = step.copy()
    fuse_norms.run(own)
    (forward,), (backward,) = own.calls(RMS), own.calls(RMS_BACKWARD)
    with Editor(own, phase="forward").before(forward) as editor:
        x, weight, eps = forward.args
        forward.replace_all_uses_with(editor.call(aten._fused_rms_norm.default, x, [COLUMNS], weight, eps))
    with Editor(own, phase="backward").before(backward) as editor:
        dy, x, weight, root = backward.args
        args = (dy, x, [COLUMNS], root, weight, [True, True])
        backward.replace_all_uses_with(editor.call(aten._fused_rms_norm_backward.default, *args))
    for node in (backward, forward):
        own.graph.erase_node(node)
    assert not own.calls(RMS)
    assert fuse_norms.run(own) == 1 and own.remarks["fuse_norms"].startswith("rms_norm: 1 of 1")
    assert len(own.calls(RMS)) == len(own.calls(RMS_BACKWARD)) == 1 and not own.calls(aten._fused_rms_norm.default)
    values = values_of(step)
    assert difference(outcome(own, values), outcome(step, values)) < 1e-6


def test_a_weight_of_another_dtype_stays_outside() -> None:
    """The op yields the dtype of its input."""
    torch.manual_seed(0)
    step = captured(Layer("llama"), loss_of, (torch.ones(2, 5, 6),), precision="bf16", keep_fp32=("norm", "last"))
    error, fused = fused_difference(step, fuse_norms.run)
    (norm,) = fused.calls(RMS)
    assert norm.args[1] is None and norm.meta["val"][0].dtype == torch.bfloat16
    assert error < 2**-6
    verify(fused)


@pytest.mark.parametrize(("form", "reason"), STAY.items())
def test_what_is_no_such_norm_stays(form: str, reason: str) -> None:
    step = form_step(form).copy()
    text = str(step)
    assert fuse_norms.run(step, names=("rms_norm",)) == 0 and str(step) == text
    assert step.remarks["fuse_norms"].startswith(f"rms_norm: {reason}")


@pytest.mark.parametrize("form", ["llama", "t5", "gemma", "torch", "layer_norm"])
def test_bf16_is_no_less_accurate(form: str) -> None:
    single, fused = is_no_less_accurate(fuse_norms.run, FORMS[form], (64, COLUMNS), (COLUMNS,))
    assert fused <= single


# ---- what must not be fused


def read_inside(step: StepGraph) -> None:
    root = step.calls(aten.rsqrt.default)[0]
    with Editor(step, phase="forward").after(root) as editor:
        step.set_result("metric", "root", editor.call(aten.sum.default, root))


def returned_inside(step: StepGraph) -> None:
    step.set_result("metric", "root", step.calls(aten.rsqrt.default)[0])


def other_gradient(step: StepGraph) -> None:
    """Backward of another norm: the gradient of the mean is left out."""
    scale = next(n for n in step.calls(aten.mul.Scalar) if n.meta["phase"] == "backward" and n.args[1] == -0.5)
    scale.args = (scale.args[0], -0.25)


@pytest.mark.parametrize("change", [read_inside, returned_inside, other_gradient])
def test_a_norm_whose_inside_counts_stays(change: Callable[[StepGraph], None]) -> None:
    step = form_step("llama").copy()
    change(step)
    error, fused = fused_difference(step, fuse_norms.run)
    assert error == 0 and not fused.calls(RMS)
    assert fused.remarks["fuse_norms"].startswith("rms_norm: 0 of 1 norms; %rsqrt of norm: a value inside of it")


def test_a_layer_norm_whose_mean_is_read_stays() -> None:
    step = form_step("layer_norm").copy()
    mean = next(node for node in step.calls(operator.getitem) if node.args[1] == 1)
    with Editor(step, phase="forward").after(mean) as editor:
        step.set_result("metric", "mean", editor.call(aten.sum.default, mean))
    assert fuse_norms.run(step) == 0
    assert "0 of 1 norms; %native_layer_norm of norm: its mean or root, %getitem_1, is" in step.remarks["fuse_norms"]


def test_other_gradients_of_input_are_added_as_before() -> None:
    """What reaches the norm's input beside the norm is one more summand, read by what read the sum."""
    step = form_step("torch").copy()
    fuse_norms.run(step)
    dx = next(n for n in step.calls(operator.getitem) if n.args == (step.calls(RMS_BACKWARD)[0], 0))
    (total,) = dx.users
    assert total.target is aten.add.Tensor and total.args[1] is dx


def test_names_and_devices_choose() -> None:
    step = form_step("layer_norm").copy()
    assert fuse_norms.run(step, names=("rms_norm",)) == 0
    assert fuse_norms.run(step, device="cuda") == 0
    assert fuse_norms.run(step, device="cpu") == 1
    names = {p.name: p.options for p in recipe(Plan(zero=0, kernels=["rms_norm"]).resolve(1), backend="gloo").passes}
    assert names["fuse_norms"] == {"names": ("rms_norm",)} and "fuse_updates" not in names
    names = {p.name: p.options for p in recipe(Plan(zero=0, kernels=True).resolve(1), backend="gloo").passes}
    assert names["fuse_norms"] == {"device": "cuda"} and names["fuse_updates"] == {}


# ---- with other keys of a plan

KEYS: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"precision": "bf16", "recompute": "blocks"}, 2**-6),
    "recompute": ({"recompute": "blocks", "lowering": "inductor", "chunk_loss": 32}, RTOL),
    "accumulated": ({"accumulate": 2, "offload_activations": "host", "offload_below": 0}, RTOL),
    "budget": ({"recompute": "auto", "memory_budget": 300_000}, RTOL),
}


@pytest.mark.parametrize(("keys", "rtol"), KEYS.values(), ids=KEYS)
def test_with_other_keys_of_a_plan(keys: dict[str, Any], rtol: float) -> None:
    with interpreted():
        whole = trained(decoder(), **keys)
        assert far_apart(trained(decoder(), **keys, kernels=("gated_activation", *NORMS)), whole, rtol=rtol) == []


def test_two_ranks_take_the_same_step() -> None:
    """By norms and gates of kernels."""
    model = decoder()()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = []
    for kernels in (False, ("gated_activation", *NORMS)):
        plan = Plan(mesh={"dp": 2}, zero=3, bucket_bytes=0, kernels=kernels)
        step = compile_for(model, optimizer, tokens(0), plan)
        assert len(step.calls(RMS)) == (3 if kernels else 0)
        reached = run_ranks(model, optimizer, [tokens(i) for i in range(2)], plan, step=step)
        found.append([*reached.losses.values(), *reached.state.values()])
    assert far_apart(found[1], found[0], rtol=RTOL) == []


def test_less_is_kept_for_backward() -> None:
    """What recompute_pointwise has again of single ops it has again of a kernel's."""
    wide, narrow = long_step("fp32"), long_step("bf16")
    kernels = ["rms_norm", "gated_activation"]
    assert kept_bytes(wide, kernels=kernels) <= kept_bytes(wide)
    assert kept_bytes(narrow, kernels=kernels) < 0.85 * kept_bytes(narrow)


# ---- planted faults


def eps_misplaced(step: StepGraph) -> None:
    for node in step.calls(RMS):
        node.args = (*node.args[:2], 10 * node.args[2])  # type: ignore[operator]


def weight_without_one(step: StepGraph) -> None:
    for node in step.calls(RMS, RMS_BACKWARD):
        place = 1 if node.target is RMS else 2
        args = list(node.args)
        args[place] = args[place].args[0]  # type: ignore[union-attr]
        node.args = tuple(args)


def rows_not_summed(step: StepGraph) -> None:
    """The gradient of the weight is that of the first row of the batch only."""
    for node in step.calls(RMS_BACKWARD):
        dw = next(user for user in node.users if user.args[1] == 1)
        with Editor(step, phase="backward").before(dw) as editor:
            rows = [editor.call(aten.slice.Tensor, arg, 0, 0, 1) for arg in (node.args[0], node.args[1], node.args[3])]
            part = editor.call(RMS_BACKWARD, rows[0], rows[1], node.args[2], rows[2])
        dw.args = (part, 1)


def other_rows_root(step: StepGraph) -> None:
    for node in step.calls(RMS_BACKWARD):
        with Editor(step, phase="backward").before(node) as editor:
            node.args = (*node.args[:3], editor.call(aten.neg.default, node.args[3]))


@pytest.mark.parametrize("fault", [eps_misplaced, weight_without_one, rows_not_summed, other_rows_root])
def test_a_fault_is_seen(fault: Callable[[StepGraph], None]) -> None:
    step = form_step("gemma")
    fused = step.copy()
    fuse_norms.run(fused)
    fault(fused)
    values = values_of(step)
    assert difference(outcome(fused, values), outcome(step, values)) > RTOL


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("rms_norm_reference", lambda x, w, eps: pass_module.rms_norm_reference.real(x, w, 0.0)),
        ("rms_norm_backward_reference", lambda *a: [t[:1] for t in pass_module.rms_norm_backward_reference.real(*a)]),
    ],
)
def test_a_kernel_that_computes_something_else_is_put_nowhere(name: str, faulty: Any) -> None:
    faulty.real = getattr(pass_module, name)
    stand_in = mock.Mock(side_effect=faulty, real=faulty.real)
    with mock.patch.object(pass_module, name, stand_in):
        assert fuse_norms.run(form_step("llama").copy()) == 0


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    step = form_step("gemma", "bf16").copy()
    old = str(step)
    fuse_norms.run(step)
    sides = [re.sub(r"(?<=\S) {2,}", "  ", text).splitlines() for text in (old, str(step))]
    diff = difflib.unified_diff(*sides, "capture", "fuse_norms", n=0, lineterm="")
    golden("fuse_norms", "\n".join(line for line in diff if not line.startswith("@@")) + "\n")
