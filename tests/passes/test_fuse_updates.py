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
from fxzero.cost.memory import memory_profile
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph import update_ops
from fxzero.graph.edit import Editor
from fxzero.graph.order_rules import required_order
from fxzero.graph.patterns import Call, match
from fxzero.graph.storage import InPlace
from fxzero.passes.fuse_updates import fuse_updates
from fxzero.recipe import captured_as, recipe
from tests.lower.models import Decoder, tokens
from tests.numerics.local_ranks import compile_for, run_ranks
from tests.numerics.models import all_cases, clipped_cases, rarer_cases
from tests.numerics.reference import Outcome, first_difference, run_compiled, run_plain
from tests.numerics.sparing import verifying_less

aten = torch.ops.aten
FUSED = tuple(update_ops.IN_PLACE)
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
    assert step.remarks["fuse_updates"] == "adamw: no update fused; sgd: no update fused"


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
