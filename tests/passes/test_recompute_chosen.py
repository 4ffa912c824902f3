"""Chosen values computed again: one copy each, before its first reader; what cannot be had again is refused."""

import pytest
import torch

import fxzero
from fxzero.decide import decide
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import tensor_val
from fxzero.graph.verify import verify
from fxzero.passes.recompute_chosen import recompute_chosen
from fxzero.recipe import Decided, recipe
from tests.decide.test_decision import between, captured, plan_of

aten = torch.ops.aten
SETTING = "zero 3, four ranks"


@pytest.fixture
def step() -> StepGraph:
    return captured(plan_of(SETTING))


def first(step: StepGraph, target: object, module: str) -> torch.fx.Node:
    return next(n for n in step.phase("forward") if n.target is target and n.meta["module"].startswith(module))


def test_one_copy_serves_all_readers_and_the_rest_is_read_where_it_is(step: StepGraph) -> None:
    gelu = first(step, aten.gelu.default, "layers.1")
    wide = gelu.all_input_nodes[0]  # a view of the linear layer's result
    before = len(step.calls())
    assert recompute_chosen.run(step, names=(wide.name, wide.all_input_nodes[0].name)) == 1
    verify(step)
    copies = [n for n in step.phase("backward") if n.target is aten.addmm.default]
    assert len(copies) == 1 and len(step.calls()) == before + 2
    assert copies[0].all_input_nodes[1].meta["phase"] == "forward"  # the normalized input is not chosen
    assert not any(user.meta["phase"] == "backward" for user in wide.users)


def test_a_mask_is_kept_as_bool(step: StepGraph) -> None:
    mask = first(step, aten.bernoulli.p, "layers.0.drop")
    scaled = next(iter(mask.users))
    drawn = [n.name for n in step.calls() if is_random(n)]
    assert recompute_chosen.run(step, names=(mask.name, scaled.name)) == 2
    verify(step)
    assert [n.name for n in step.calls() if is_random(n)] == drawn
    kept = [n for n in mask.users if n.target is aten._to_copy.default]
    assert [tensor_val(n).dtype for n in kept] == [torch.bool]
    assert not any(user.meta["phase"] == "backward" for node in (mask, scaled) for user in node.users)


def test_nothing_chosen_changes_nothing(step: StepGraph) -> None:
    before = str(step)
    assert recompute_chosen.run(step) == 0
    assert str(step) == before


def test_what_cannot_be_had_again_is_refused(step: StepGraph) -> None:
    with pytest.raises(RewriteError, match="recompute_chosen, %nowhere: expected a node of forward, got none of that"):
        recompute_chosen.run(step, names=("nowhere",))
    backward = step.phase("backward")[0]
    with pytest.raises(RewriteError, match=f"recompute_chosen, %{backward.name}: expected a node of forward"):
        recompute_chosen.run(step, names=(backward.name,))
    mask = first(step, aten.bernoulli.p, "layers.0")
    mask.target = aten.bernoulli.default
    mask.args = mask.args[:1]
    says = (
        f"%{mask.name} of layers.0: expected a tensor that follows from others, got aten.bernoulli.default, which draws"
    )
    with pytest.raises(RewriteError, match=says):
        recompute_chosen.run(step, names=(mask.name,))


def readers_of_forward_gathers(step: StepGraph) -> list[torch.fx.Node]:
    """Calls of backward that read a parameter which was gathered for forward."""
    return [
        node
        for node in step.phase("backward")
        for source in node.all_input_nodes
        if c10d.is_wait(source) and source.meta["phase"] == "forward" and "param" in source.meta
    ]


def test_backward_gathers_anew_what_it_recomputes_with(step: StepGraph) -> None:
    plan = plan_of(SETTING, recompute="auto", memory_budget=between(SETTING, 0.1), bucket_bytes=0)
    names = decide(step, plan=plan, backend="nccl").names
    program = recipe(plan, backend="nccl", decided=Decided(recomputed=names)).run(step)
    products = [n for n in program.phase("backward") if n.target is aten.addmm.default]
    assert products, "no linear layer is computed again"
    assert not readers_of_forward_gathers(program)
    # the twin of this check: one that does is found
    wait = next(n for n in program.calls(c10d.wait) if n.meta["phase"] == "forward" and "param" in n.meta)
    products[0].args = (products[0].args[0], products[0].args[1], wait)
    assert readers_of_forward_gathers(program) == [products[0]]


def test_the_pass_is_in_the_recipe_of_auto_alone() -> None:
    auto = fxzero.Plan(recompute="auto", memory_budget=1).resolve(1)
    assert "recompute_chosen" in [p.name for p in recipe(auto, backend="gloo").passes]
    assert "recompute_chosen" not in [p.name for p in recipe(fxzero.Plan().resolve(1), backend="gloo").passes]
