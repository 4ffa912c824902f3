"""Regions: what is marked, what stays where it was, and what the program may write over."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxzero import Plan, compat
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.graph import StateEntry, StepGraph
from fxzero.graph.edit import reorder
from fxzero.graph.region_rules import is_fence
from fxzero.graph.regions import mark, region_of, regions
from fxzero.graph.step_graph import Result, is_getitem, yields_scalar
from fxzero.graph.storage import InPlace
from fxzero.graph.synchronisation import host_values
from fxzero.lower.region_text import RegionText, region_text
from fxzero.passes.cut_regions import cut_regions
from fxzero.recipe import recipe
from tests.lower.models import Decoder, tokens

aten = torch.ops.aten


def captured(model: nn.Module, *batch: torch.Tensor) -> StepGraph:
    optimizer = torch.optim.AdamW(model.parameters())
    return capture_step(rehearse(Inventory.of(model, optimizer))[0], None, batch, {}).step


@functools.cache
def lowered(zero: int, **keys: Any) -> tuple[StepGraph, StepGraph]:
    """A decoder's program before and after its regions are cut."""
    plan = Plan(zero=zero, mesh={"dp": 4}, lowering="inductor", **keys)
    step = captured(Decoder(2, dropout=0.1), *tokens(0))
    step.mesh = dict(plan.axes)
    before = recipe(plan.replace(lowering="eager"), backend="gloo").run(step)
    return before, recipe(plan, backend="gloo").run(step)


PLANS = [(1, {"clip_grad_norm": 1.0}), (3, {"cross_step": True, "recompute": "blocks"})]


@pytest.mark.parametrize(("zero", "keys"), PLANS, ids=str)
def test_no_call_passes_a_fence_and_fences_keep_their_order(zero: int, keys: dict[str, Any]) -> None:
    places = []
    for step in lowered(zero, **keys):
        place, fences, host = {}, [], host_values(step)
        for node in step.calls():
            fences += [node.name] if is_fence(node) and node.users else []
            # releases stand with the last call before; parts and numbers of the host with what they belong to
            if not (is_getitem(node) or yields_scalar(node) or not node.users or node in host):
                place[node.name] = len(fences)
        places.append((fences, place))
    assert places[0] == places[1]


@pytest.mark.parametrize(("zero", "keys"), PLANS, ids=str)
def test_forward_and_backward_keep_their_order(zero: int, keys: dict[str, Any]) -> None:
    def order(step: StepGraph) -> list[str]:
        calls = (node for node in step.calls() if node.meta["phase"] != "update")
        return [node.name for node in calls if node.users and not is_getitem(node)]

    before, after = lowered(zero, **keys)
    assert order(before) == order(after)


def test_regions_repeat_with_the_layers() -> None:
    def forms(layers: int) -> set[str]:
        step = captured(Decoder(layers), *tokens(0))
        cut_regions.run(step)
        in_place = InPlace(step)
        return {region_text(region, in_place).text for region in regions(step)}

    assert forms(2) == forms(4)


class Crossed(nn.Module):
    """The first block runs again after the second, and reads nothing of it; a mask chooses rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.tanh(self.layers[index](part)) for index, part in zip((0, 1, 0), x.chunk(3), strict=True)]
        chosen = parts[2][x.chunk(3)[2].sum(1) > 0]
        return (parts[0] * parts[1]).sum() + F.relu(chosen * 2).sum()


def test_a_block_that_runs_again_is_another_region_and_stays_behind() -> None:
    step = captured(Crossed(), torch.randn(6, 4))
    before = [node.name for node in step.phase("forward")]
    cut_regions.run(step)
    assert [node.name for node in step.phase("forward")] == before


def test_what_has_sizes_that_only_the_run_knows_is_in_no_region() -> None:
    step = captured(Crossed(), torch.randn(6, 4))
    assert cut_regions.run(step)
    chosen = next(node for node in step.calls() if node.target is aten.index.Tensor)
    after = [user for user in chosen.users if user.meta["phase"] == "forward"]
    assert after and region_of(chosen) is None
    assert all(region_of(user) is None for user in after)


# ---- what a region may write over


def text_of_last(step: StepGraph) -> RegionText:
    return region_text(regions(step)[-1], InPlace(step))


def updated(kind: str, *, read_as_well: bool, before: bool) -> StepGraph:
    """`w * 2 + 1` as a region, where w is state, or made by another region; a view of w may go into it as well."""
    graph, mode = fx.Graph(), compat.new_fake_mode()
    source = graph.placeholder("w")
    first = [graph.call_function(aten.exp.default, (source,)) for _ in range(before)]
    made = first[-1] if first else source
    view = [graph.call_function(aten.t.default, (made,)) for _ in range(read_as_well)]
    total = [graph.call_function(aten.sum.default, tuple(view)) for _ in range(read_as_well)]
    product = graph.call_function(aten.mul.Tensor, (made, 2))
    result = graph.call_function(aten.add.Tensor, (product, 1))
    loss = graph.call_function(aten.sum.default, (result,))
    source.meta = {
        "entry": StateEntry(kind, "w", (4, 4)),
        "val": compat.fake_like(mode, torch.ones(4, 4)),
        "phase": "forward",
        "module": "",
    }
    for node in graph.nodes:
        if node.op == "call_function":
            with mode:
                val = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
            node.meta = {"val": val, "phase": "update", "module": ""}
    graph.output((result, loss, *total)).meta["results"] = (
        Result("metric" if kind == "batch" else kind, "w"),
        Result("loss", "loss"),
        *(Result("metric", "total") for _ in total),
    )
    mark(0, first)
    mark(1, [*total, product, result])
    return StepGraph(graph)


def test_a_region_writes_over_state() -> None:
    form = text_of_last(updated("parameter", read_as_well=False, before=False))
    assert [(source.name, node.name) for source, node in form.written.items()] == [("w", "add_tensor")]
    assert not form.outputs


def test_it_does_not_where_the_state_goes_in_under_two_names() -> None:
    form = text_of_last(updated("parameter", read_as_well=True, before=False))
    assert not form.written
    assert [node.name for node in form.outputs] == ["sum_default", "add_tensor"]


def test_it_does_not_write_over_what_another_region_made() -> None:
    step = updated("batch", read_as_well=False, before=True)
    assert not text_of_last(step).written
    del regions(step)[0].calls[0].meta["region"]
    assert not text_of_last(step).written


@pytest.mark.parametrize("only_rows", [False, True])
def test_a_graph_without_inputs_is_cut_too(only_rows: bool) -> None:
    """Nothing at all, or what is made of nothing: a graph that torch.compile hands over may be so."""
    empty = StepGraph(fx.Graph())
    empty.graph.output(()).meta["results"] = ()
    assert cut_regions.run(empty, only_rows=only_rows) == 0

    graph, mode = fx.Graph(), compat.new_fake_mode()
    ones = graph.call_function(aten.ones.default, ([4, 4],))
    calls = [ones, graph.call_function(aten.sin.default, (ones,))]
    calls.append(graph.call_function(aten.mul.Tensor, (calls[-1], calls[-1])))
    for node in calls:
        with mode:
            node.meta = {"phase": "forward", "module": "", "val": torch.empty(4, 4)}
    graph.output((calls[-1],)).meta["results"] = (Result("loss", "loss"),)
    assert cut_regions.run(StepGraph(graph), only_rows=only_rows) == 1
    assert [node for node in graph.nodes if node.op == "call_function"] == calls


def test_calls_of_a_graph_without_inputs_are_put_in_order() -> None:
    graph = fx.Graph()
    one, two, three = (graph.call_function(aten.ones.default, ([size],)) for size in (1, 2, 3))
    graph.output(()).meta["results"] = ()
    assert reorder(StepGraph(graph), [three, one, two]) == 3
    assert [node for node in graph.nodes if node.op == "call_function"] == [three, one, two]
