"""ZeRO's passes on a graph of one tp rank: what dp shards are the rows of its parts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED, local_shape, shard
from fxzero.graph.collective_rules import check_sharding
from fxzero.graph.edit import Editor, replace_uses
from fxzero.graph.rules import Context
from fxzero.plan import Plan
from fxzero.recipe import recipe
from fxzero.runtime.agreement import agreed_text
from fxzero.runtime.layout import Layouts, laid_out_by
from tests.runtime.test_layout import OneRank

aten = torch.ops.aten
MESH = {"dp": 2, "tp": 2}
WHOLE = {"0.weight": (20, 6), "0.bias": (20,), "2.weight": (3, 20), "2.bias": (3,)}
OVER_TP = {"0.weight": shard(0), "0.bias": shard(0), "2.weight": shard(1), "2.bias": REPLICATED}


@functools.cache
def captured() -> StepGraph:
    """What a tp rank would run, without its collectives: two linear layers, each half as wide inside."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    inventory, _ = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters(), foreach=False)))
    loss: Any = lambda m, x: m(x).sum()  # noqa: E731
    step = capture_step(inventory, loss, (torch.ones(2, 6),), {}).step
    for node in step.inputs("parameter", "optimizer"):
        entry = node.meta["entry"]
        name = entry.param or entry.name
        if entry.shape:
            assert tuple(node.meta["val"].shape) == local_shape(WHOLE[name], OVER_TP[name], 2)
            node.meta["entry"] = dataclasses.replace(entry, shape=WHOLE[name])
            node.meta["placements"] = {"tp": OVER_TP[name]}
    return step


def keep_whole(step: StepGraph, param: str, key: str) -> None:
    """Let each tp rank have the whole of a state, of which the update reads the first half."""
    node = step.input("optimizer", f"{param}:{key}")
    assert node is not None
    users = list(node.users)
    editor = Editor(step, phase="update", param=param)
    with editor.mode:
        node.meta["val"] = node.meta["val"].new_empty(WHOLE[param])
    node.meta["placements"] = {"tp": REPLICATED}
    with editor.before(min(users, key=step.positions().__getitem__)):
        replace_uses(node, editor.call(aten.slice.Tensor, node, 0, 0, WHOLE[param][0] // 2), users)
    new = step.results[("optimizer", f"{param}:{key}")]
    with editor.before(step.output):
        step.set_result("optimizer", f"{param}:{key}", editor.call(aten.cat.default, [new, new]))


def rewritten(*, change: Callable[[StepGraph], None] | None = None, **keys: Any) -> StepGraph:
    """After the passes for dp, which find tp done; they would find two ranks of it."""
    plan = Plan(mesh={"dp": 2}, **keys)
    step = captured().copy()
    if change is not None:
        change(step)
    step.mesh = {"dp": 2, "tp": 2}
    step = recipe(plan, backend="fake").run(step, check=False)
    assert list(check_sharding(Context(step))) == []
    return step


def shapes(step: StepGraph, kind: str) -> dict[str, tuple[int, ...]]:
    return {n.meta["entry"].name: tuple(n.meta["val"].shape) for n in step.inputs(kind) if n.meta["entry"].shape}


def test_rows_are_those_of_a_part() -> None:
    step = rewritten()
    assert shapes(step, "parameter") == {"0.weight": (5, 6), "0.bias": (5,), "2.weight": (2, 10), "2.bias": (2,)}
    rows = {n.meta["entry"].name: n.meta["sharding"].rows for n in step.inputs("parameter")}
    assert rows == {"0.weight": 10, "0.bias": 10, "2.weight": 3, "2.bias": 3}
    state = shapes(step, "optimizer")
    assert state["0.weight:exp_avg"] == (5, 6) and state["2.weight:exp_avg_sq"] == (2, 10)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("persist_below", [0, 31])
def test_the_state_at_run_time_is_what_the_graph_takes(zero: int, persist_below: int) -> None:
    """30 elements of 60 are left of one weight, 60 of 120 of the other."""
    step = rewritten(zero=zero, persist_below=persist_below)
    layouts = Layouts(OneRank(Plan(mesh=MESH, zero=zero, persist_below=persist_below), None, "none"))
    layouts.give(laid_out_by(step))
    for name, shape in shapes(step, "parameter").items():
        assert layouts.of_parameter(name, WHOLE[name]).memory_shape == shape, name
    for name, shape in shapes(step, "optimizer").items():
        owner = WHOLE[name.partition(":")[0]]
        assert layouts.of_state(name, owner, owner=owner).memory_shape == shape, name
    assert (shapes(step, "parameter")["2.weight"] == (3, 10)) == (zero < 3 or persist_below == 31)


def test_state_that_lies_otherwise_than_its_parameter_is_not_sharded() -> None:
    """Its rows are others than those that a rank updates."""
    step = rewritten(change=lambda step: keep_whole(step, "0.bias", "exp_avg"))
    state = shapes(step, "optimizer")
    assert state["0.bias:exp_avg"] == (20,) and state["0.bias:exp_avg_sq"] == (5,)
    assert laid_out_by(step)[("optimizer", "0.bias:exp_avg")] == {"tp": REPLICATED}
    assert laid_out_by(step)[("optimizer", "0.bias:exp_avg_sq")] == {"tp": shard(0)}


def test_a_program_of_one_tp_rank_lays_out_nothing() -> None:
    step = captured().copy()
    step.mesh = {"dp": 4}
    assert laid_out_by(step) == {}


def test_ranks_agree_on_how_state_lies_over_tp() -> None:
    lines = agreed_text(rewritten(), plan="", passes="").splitlines()
    assert "parameter 0.weight [20, 6] torch.float32 S(0) over tp, rows over dp" in lines
    assert "optimizer 2.weight:exp_avg [3, 20] torch.float32 S(1) over tp, rows over dp" in lines


def test_elements_of_a_part_count_for_compression() -> None:
    """The largest part has 60 elements, a row of a part of the second weight 10."""
    with pytest.raises(PlanError, match="got none; the largest parameter has 60"):
        rewritten(compress_gathers="int8", compress_below=61)
    step = rewritten(compress_gathers="fp8_rows", compress_below=0)
    blocks = {n.meta["param"]: n.args[2] for n in step.calls(torch.ops.fxzero.quantize_blockwise.default)}
    assert blocks == {"0.weight": 6, "2.weight": 10}
