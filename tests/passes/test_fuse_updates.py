"""Fused updates: those of the plain loop within rounding, in place, where the single calls stood."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import fxzero
from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.lifetimes import storages
from fxzero.cost.memory import memory_profile
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph import update_ops
from fxzero.graph.edit import Editor, fake_mode
from fxzero.graph.order_rules import required_order
from fxzero.graph.patterns import Call, match
from fxzero.graph.step_graph import yields_tensor
from fxzero.graph.storage import InPlace
from fxzero.passes.fuse_updates import fuse_updates
from fxzero.recipe import captured_as, recipe
from tests.kernels.interpreter import interpreter
from tests.lower.models import Decoder, tokens
from tests.numerics.local_ranks import compile_for, run_ranks
from tests.numerics.models import all_cases, clipped_cases, rarer_cases
from tests.numerics.reference import Outcome, first_difference, run_compiled, run_plain
from tests.numerics.sparing import verifying_less

aten = torch.ops.aten
FUSED = tuple(update_ops.IN_PLACE)
BY_KERNEL = {
    "adamw": update_ops.adamw_by_kernel,
    "sgd": update_ops.sgd_by_kernel,
    "lion": update_ops.lion_by_kernel,
}
RTOL = 2e-6
CASES = {**all_cases(), **rarer_cases(), **clipped_cases()}
WITH_UPDATES = {
    **dict.fromkeys(("adam", "adamw_amsgrad", "one_cycle_adamw", "clip_norm2"), True),
    **dict.fromkeys(("sgd_nesterov", "metrics_of_state"), True),
    "third_party": False,
}


@pytest.mark.parametrize(("name", "is_fused"), WITH_UPDATES.items())
def test_updates_are_those_of_the_plain_loop(name: str, is_fused: bool) -> None:
    got, step = run_compiled(CASES[name], Plan(zero=0, kernels=True))
    difference = first_difference(run_plain(CASES[name]), got, rtol=RTOL)
    assert difference is None, str(difference)
    assert bool(step.graph.calls(*FUSED)) is is_fused
    if is_fused:
        left = {n.target for n in step.graph.phase("update") if n.meta["val"] is not None}
        assert not left & {aten.addcdiv.default, aten.lerp.Scalar, aten.sqrt.default, aten.addcmul.default}


@functools.cache
def captured(optimizer: Any = torch.optim.AdamW, **keys: Any) -> StepGraph:
    torch.manual_seed(0)
    model = Decoder(2)
    inventory = rehearse(Inventory.of(model, optimizer(model.parameters(), lr=1e-2, **keys)))[0]
    return capture_step(inventory, None, tokens(0), {}, options=captured_as(Plan())).step


def rewritten(plan: Plan, **keys: Any) -> StepGraph:
    step = captured(**keys).copy()
    step.mesh = dict(plan.axes)
    return recipe(plan, backend="gloo").run(step)


PLANS: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 1, "bucket_bytes": 0},
    {"zero": 3, "bucket_bytes": 0},
    {"zero": 3, "schedule": "cost", "hardware": "h100"},
    {"zero": 3, "lowering": "inductor"},
]


@pytest.mark.parametrize("keys", PLANS, ids=str)
def test_fused_updates_write_over_state_and_wait_for_no_more_gradients(keys: dict[str, Any]) -> None:
    plan = Plan(mesh={"dp": 4}, **keys)
    single, fused = rewritten(plan), rewritten(plan.replace(kernels=True))
    in_place = InPlace(fused)
    calls = fused.calls(*FUSED)
    assert calls and all(call in in_place.forms for call in calls)
    state = {node.meta["entry"].key: node for node in fused.inputs("parameter", "optimizer")}
    gathered = keys["zero"] in (1, 2)  # then it is rows that are written, of a parameter that rests whole
    for key, value in fused.results.items():
        if key in state and not (key[0] == "parameter" and gathered):
            assert in_place.storage[value] is state[key], key
    # new counts of steps wait for a shared call, 4 bytes each
    assert memory_profile(fused).peak_bytes <= memory_profile(single).peak_bytes + 4 * len(state)
    before, after = waits_before(single), waits_before(fused)
    assert all(after[name] <= before[name] for name in before)


def waits_before(step: StepGraph) -> dict[str, int]:
    """Name of a parameter -> how many waits stand before its update is made."""
    count, found = 0, {}
    for node in step.calls():
        count += c10d.is_wait(node)
        if node.target is aten.addcdiv.default or node.target in FUSED:
            made = node.users if node.target in FUSED else [node]
            found.update({user.meta["param"]: count for user in made})
    return found


@pytest.mark.parametrize("zero", [1])  # where rows of a whole parameter are written
def test_four_ranks_take_the_same_step(zero: int) -> None:
    torch.manual_seed(0)
    model = Decoder(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for keys in ({}, {"kernels": ("adamw",)}):
        plan = Plan(zero=zero, mesh={"dp": 4}, **keys)
        step = compile_for(model, optimizer, tokens(0), plan)
        outcome = run_ranks(model, optimizer, [tokens(i) for i in range(4)], plan, step=step)
        found.append(outcome.state)
    for key, expected in found[0].items():
        assert torch.allclose(found[1][key], expected, rtol=RTOL, atol=RTOL * float(expected.abs().max())), key


KEYS: dict[str, dict[str, Any]] = {
    "scaled": {"loss_scale": 8.0, "clip_grad_norm": 0.3},
    "on_host": {"offload_optimizer": "host", "offload_below": 0, "update_on_host": 0.5},
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_with_other_keys_of_a_plan(keys: dict[str, Any]) -> None:
    def run(**more: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Decoder(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = fxzero.compile(model, optimizer, Plan(zero=0, **keys, **more))
        return [step(*tokens(i)).detach() for i in range(3)] + [p.detach() for p in model.parameters()]

    for a, b in zip(run(kernels=True), run(), strict=True):
        assert torch.allclose(a, b, rtol=RTOL, atol=RTOL * float(b.abs().max()))


# ---- by kernels, which run by their references here


class Lion(torch.optim.Optimizer):
    """Lion, as program 1 of the paper.

    Args:
        form: how averages are written: "add", "mul" or "lerp".
    """

    def __init__(self, parameters: Any, *, lr: float, form: str = "add", weight_decay: float = 0.1) -> None:
        self.form = form
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                if group["weight_decay"]:
                    parameter.mul_(1.0 - lr * group["weight_decay"])
                mixed = self.averaged(state["exp_avg"].clone(), parameter.grad, beta1)
                parameter.add_(mixed.sign(), alpha=-lr)
                state["exp_avg"].copy_(self.averaged(state["exp_avg"].clone(), parameter.grad, beta2))

    def averaged(self, average: torch.Tensor, grad: torch.Tensor, beta: float) -> torch.Tensor:
        if self.form == "lerp":
            return average.lerp_(grad, 1.0 - beta)
        if self.form == "mul":
            return average.mul_(beta) + grad * (1.0 - beta)
        return average.mul_(beta).add_(grad, alpha=1.0 - beta)


def small_step(optimizer: Any, *, plan: Plan | None = None, **keys: Any) -> StepGraph:
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 60)
    inventory = rehearse(Inventory.of(model, optimizer(model.parameters(), lr=1e-2, **keys)))[0]
    loss = lambda m, x: m(x).square().sum()  # noqa: E731
    return capture_step(inventory, loss, (torch.ones(2, 40),), {}, options=captured_as(plan or Plan())).step


NUMBERS = {
    "lr": 0.1,
    "betas.0": 0.8,
    "betas.1": 0.6,
    "eps": 0.01,
    "weight_decay": 0.3,
    "momentum": 0.7,
    "dampening": 0.0,
}


def run_small(step: StepGraph) -> dict[tuple[str, str], torch.Tensor]:
    """What a step makes of random state, none of it negative, counted from 3; no two numbers of the host are equal."""
    generator = torch.Generator().manual_seed(1)
    values: list[Any] = []
    for node in step.placeholders:
        val, name = node.meta["val"], node.meta["entry"].name
        if not isinstance(val, torch.Tensor):
            values.append(NUMBERS[name.removeprefix("groups.0.")])
        elif not val.is_floating_point():
            values.append(torch.zeros(val.shape, dtype=val.dtype))
        elif val.dim():
            values.append(torch.rand(val.shape, generator=generator))
        else:
            values.append(torch.tensor(3.0 if name.endswith(":step") else 4.0))
    made = torch.fx.GraphModule({}, step.graph)(*values)
    return {key: value for key, value in zip(step.results, made, strict=True) if isinstance(value, torch.Tensor)}


def assert_same(found: dict[tuple[str, str], torch.Tensor], expected: dict[tuple[str, str], torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=RTOL, atol=RTOL * float(value.abs().max())), key


KERNELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "adamw": ("adamw", torch.optim.AdamW, {}),
    "amsgrad": ("adamw", torch.optim.Adam, {"amsgrad": True}),
    "sgd": ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "lion": ("lion", Lion, {}),
    "lion_mul": ("lion", Lion, {"form": "mul", "weight_decay": 0.0}),
    "lion_lerp": ("lion", Lion, {"form": "lerp"}),
}


@pytest.mark.parametrize(("name", "optimizer", "keys"), KERNELS.values(), ids=KERNELS)
def test_a_kernel_makes_the_same_update(name: str, optimizer: Any, keys: dict[str, Any]) -> None:
    step = small_step(optimizer, **keys)
    fused = step.copy()
    assert fuse_updates.run(fused, ops="triton") == 2, fused.remarks
    (call,) = fused.calls(BY_KERNEL[name])
    assert call in InPlace(fused).forms
    assert_same(run_small(fused), run_small(step))


def test_a_kernel_runs_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    step = small_step(torch.optim.AdamW, plan=Plan(clip_grad_norm=0.3))
    fused = step.copy()
    fuse_updates.run(fused, ops="triton")
    with interpreter():
        assert_same(run_small(fused), run_small(step))


SCALED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "clipped": ({"clip_grad_norm": 0.3}, {"clip"}),
    "unscaled": ({"loss_scale": 8.0}, {"clip"}),
    "both": ({"loss_scale": 8.0, "clip_grad_norm": 0.3}, {"clip"}),
    "by_value": ({"clip_grad_value": 0.1}, set()),
}


@pytest.mark.parametrize(("keys", "factors"), SCALED.values(), ids=SCALED)
def test_a_kernel_multiplies_gradients_by_what_only_it_reads(keys: dict[str, Any], factors: set[str]) -> None:
    step = small_step(torch.optim.AdamW, plan=Plan(**keys))
    fused = step.copy()
    assert fuse_updates.run(fused, ops="triton") == 2
    (call,) = fused.calls(update_ops.adamw_by_kernel)
    assert {"clip", "inverse_scale"} & call.kwargs.keys() == factors
    assert_same(run_small(fused), run_small(step))


def test_two_factors_are_those_of_the_kernel() -> None:
    step = small_step(torch.optim.AdamW, plan=Plan(clip_grad_norm=0.3))
    for scaled in [node for node in step.calls(aten.lerp.Scalar)]:
        grad = scaled.args[1]
        with Editor(step, phase="update").before(scaled) as editor:
            half = editor.call(aten.full.default, [], 0.5)
            twice = editor.call(aten.mul.Tensor, grad, half)
        for user in list(grad.users):  # type: ignore[union-attr]
            if user is not twice:
                user.replace_input_with(grad, twice)  # type: ignore[arg-type]
    fused = step.copy()
    assert fuse_updates.run(fused, ops="triton") == 2
    calls = fused.calls(update_ops.adamw_by_kernel)
    assert all({"clip", "inverse_scale"} <= call.kwargs.keys() for call in calls)
    assert_same(run_small(fused), run_small(step))


def test_a_kernel_writes_the_copy_that_the_step_makes() -> None:
    step = small_step(torch.optim.SGD, momentum=0.9)
    for name in ("weight", "bias"):
        new = step.results[("parameter", name)]
        with Editor(step, phase="update").before(step.output) as editor:
            step.set_result("metric", f"copy.{name}", editor.call(aten._to_copy.default, new, dtype=torch.bfloat16))
    fused = step.copy()
    assert fuse_updates.run(fused, ops="triton") == 2
    (call,) = fused.calls(update_ops.sgd_by_kernel)
    assert call.kwargs["copy_dtype"] == torch.bfloat16 and not fused.calls(aten._to_copy.default)
    in_place = InPlace(fused)
    assert call in in_place.forms
    copies = [fused.results[("metric", f"copy.{name}")] for name in ("weight", "bias")]
    assert all(in_place.written_by(copy) is None for copy in copies)
    with_memory = {member for storage in storages(fused, device="cpu") for member in storage.members}
    assert with_memory.issuperset(copies)
    assert_same(run_small(fused), run_small(step))


def test_on_a_gpu_kernels_are_chosen() -> None:
    step = small_step(torch.optim.AdamW)
    with fake_mode(step):
        for node in step.graph.nodes:
            if yields_tensor(node) and node.meta["val"].dim():
                val = node.meta["val"]
                node.meta["val"] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="cuda")
    assert fuse_updates.run(step) == 2
    assert step.calls(update_ops.adamw_by_kernel) and not step.calls(update_ops.adamw)


def test_lion_is_a_kernel_where_it_is_named() -> None:
    step = small_step(Lion)
    assert fuse_updates.run(step.copy()) == 0
    assert fuse_updates.run(step, names=("lion",)) == 2


def unscaled_twice(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw_by_kernel):
        node.kwargs = {**node.kwargs, "inverse_scale": node.kwargs["clip"]}


def not_unscaled(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw_by_kernel):
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "clip"}


@pytest.mark.parametrize("fault", [unscaled_twice, not_unscaled])
def test_a_fault_of_a_kernels_call_is_seen(fault: Callable[[StepGraph], None]) -> None:
    step = small_step(torch.optim.AdamW, plan=Plan(loss_scale=8.0))
    fused = step.copy()
    fuse_updates.run(fused, ops="triton")
    fault(fused)
    with pytest.raises(AssertionError):
        assert_same(run_small(fused), run_small(step))


# ---- planted faults


def other_beta(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw):
        node.kwargs = {**node.kwargs, "beta2": node.kwargs["beta1"]}


def decayed_twice(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw):
        node.kwargs = {**node.kwargs, "weight_decay": 0.2}


def larger_eps(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw):
        node.kwargs = {**node.kwargs, "eps": 1e-6}


def count_behind(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw):
        node.args = (*node.args[:5], [count.args[0] for count in node.args[5]])  # type: ignore[union-attr]


def swapped_state(step: StepGraph) -> None:
    for node in step.calls(update_ops.adamw):
        node.args = (*node.args[:2], node.args[3], node.args[2], *node.args[4:])


@pytest.mark.parametrize("fault", [other_beta, decayed_twice, larger_eps, count_behind, swapped_state])
def test_a_fault_is_seen(fault: Callable[[StepGraph], None]) -> None:
    run = fuse_updates.run

    def faulty(step: StepGraph, **options: Any) -> int:
        edits = run(step, **options)
        fault(step)
        return edits

    broken = fxzero.graph.contract.Pass(**{**vars(fuse_updates), "run": faulty})
    with mock.patch("fxzero.recipe.fuse_updates", broken), verifying_less({"zero": 0}):
        got, _ = run_compiled(CASES["adamw"], Plan(zero=0, kernels=True))
    assert first_difference(plain_adamw(), got, rtol=RTOL) is not None


@functools.cache
def plain_adamw() -> Outcome:
    return run_plain(CASES["adamw"])


class Misplaced(torch.optim.Optimizer):
    """Adam, but that eps is added below the root."""

    def __init__(self, parameters: Any, *, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["m"].lerp_(parameter.grad, 0.1)
            state["v"].mul_(0.9).addcmul_(parameter.grad, parameter.grad, value=0.1)
            parameter.addcdiv_(state["m"], state["v"].add(1e-8).sqrt(), value=-self.param_groups[0]["lr"])


def test_an_update_of_another_form_stays() -> None:
    step = captured(Misplaced).copy()
    text = str(step)
    assert fuse_updates.run(step) == 0 and str(step) == text
    nearest = "nearest, %addcdiv: %groups_0_lr is placeholder, not truediv"
    assert step.remarks["fuse_updates"] == f"adamw: no update fused; {nearest}; sgd: no update fused"


def test_an_update_whose_inside_is_read_stays() -> None:
    step = captured().copy()
    root = step.calls(aten.sqrt.default)[0]
    step.set_result("metric", "root", root)
    count = len(step.inputs("parameter"))
    assert fuse_updates.run(step) == count - 1
    assert step.remarks["fuse_updates"].startswith(f"adamw: {count - 1} parameters updated by ")


def test_a_value_that_is_read_before_the_update_ends_leaves_it() -> None:
    step = captured().copy()
    average = step.calls(aten.lerp.Scalar)[0]
    with Editor(step, phase="update").after(average) as editor:
        step.set_result("metric", "average", editor.call(aten.sum.default, average))
    assert fuse_updates.run(step) == len(step.inputs("parameter")) - 1
    step.graph.lint()


def test_state_that_is_read_behind_its_update_is_copied() -> None:
    """A skipped step selects the old values."""
    step = rewritten(Plan(zero=0, mesh={"dp": 1}, kernels=True))
    in_place, call = InPlace(step), step.calls(update_ops.adamw)[0]
    assert call in in_place.forms
    assert any(later is call for _, later in required_order(step))
    with Editor(step, phase="update").before(step.output) as editor:
        step.set_result("metric", "old", editor.call(aten.sum.default, call.args[0][0]))
    in_place = InPlace(step)
    assert call not in in_place.forms and not any(node in in_place.forms for node in call.users)
    assert all(in_place.storage[node] is not call.args[0][0] for node in call.users)


def test_updates_with_other_numbers_have_a_call_of_their_own() -> None:
    got, step = run_compiled(CASES["groups"], Plan(zero=0, kernels=True))
    assert first_difference(run_plain(CASES["groups"]), got, rtol=RTOL) is None
    rates = {node.kwargs["weight_decay"] for node in step.graph.calls(update_ops.adamw)}
    assert len(rates) == 2


def test_names_choose() -> None:
    step = captured().copy()
    assert fuse_updates.run(step, names=("sgd",)) == 0
    assert fuse_updates.run(step, names=("adamw",)) > 0
    with pytest.raises(PlanError, match=r"Plan.kernels: expected 'adamw' or 'sgd' or .*, got 'dropout'"):
        Plan(kernels=["adamw", "dropout"])


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    inventory = rehearse(Inventory.of(model, optimizer))[0]
    step = capture_step(inventory, lambda m, x: m(x).square().sum(), (torch.ones(2, 4),), {}).step
    old = str(step)
    fuse_updates.run(step)
    sides = [re.sub(r"(?<=\S) {2,}", "  ", text).splitlines() for text in (old, str(step))]
    diff = difflib.unified_diff(*sides, "capture", "fuse_updates", n=0, lineterm="")
    golden("fuse_updates", "\n".join(line for line in diff if not line.startswith("@@")) + "\n")


def test_what_commutes_is_matched_either_way_and_names_are_bound_once() -> None:
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    product = graph.call_function(aten.mul.Tensor, (b, a))
    total = graph.call_function(aten.add.Tensor, (a, product))
    pattern = Call(aten.add.Tensor, Call(aten.mul.Tensor, "x", "y", name="product"), "x")
    found = match(pattern, total)
    assert found is None or found.found["x"] is a
    other = match(Call(aten.add.Tensor, Call(aten.mul.Tensor, "y", "x"), "x"), total)
    assert other is not None and other.found == {"y": b, "x": a}
    assert match(Call(aten.sub.Tensor, "x", "y"), total) is None
    assert match(Call(aten.add.Tensor, "x", "x"), total) is None
