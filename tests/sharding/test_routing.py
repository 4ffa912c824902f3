"""Rows that are sorted by expert: which values have them, and how they are taken and put back by all ranks."""

import itertools

import pytest
import torch
from torch import fx, nn

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, local_shape, partial, routed, shard
from fxzero.graph.edit import Editor, coordinate
from fxzero.graph.step_graph import Result, StateEntry
from fxzero.sharding.conversions import Axis, OfRows, conversion, convert, route
from fxzero.sharding.routing import Routing
from fxzero.sharding.rules import Rules
from tests.sharding.by_execution import AXIS, parts_of, run_ranks
from tests.sharding.test_experts import captured

RANKS, ROWS, ROOM = 2, 8, 6
ENDS = torch.tensor([1, 5, 5, 8], dtype=torch.int32)
LIES = (REPLICATED, shard(0), shard(1), partial())
BY_EXPERT = routed(0, room=ROOM, rows=ROWS)

pytest.importorskip("transformers")


def converted(whole: torch.Tensor, *way: Placement) -> list[torch.Tensor]:
    """What each rank has of a value that lies in one way after the other."""
    step = StepGraph(fx.Graph(), mesh={AXIS: RANKS})
    nodes = {}
    with compat.new_fake_mode():
        vals = {
            "x": torch.empty(local_shape(whole.shape, way[0], RANKS), dtype=whole.dtype),
            "ends": torch.empty_like(ENDS),
        }
    for name, val in vals.items():
        nodes[name] = step.graph.placeholder(name)
        nodes[name].meta = {"entry": StateEntry("buffer", name), "phase": "forward", "module": "", "val": val}
    axis = Axis(AXIS, RANKS, coordinate(step, AXIS))
    output = step.graph.output((nodes["x"],))
    output.meta = {"results": (Result("buffer", "x"),)}
    made, of_rows = nodes["x"], OfRows(nodes["ends"], ROOM)
    editor = Editor(step, phase="forward")
    with editor.before(output):
        steps = [step for pair in itertools.pairwise(way) for step in route(tuple(whole.shape), *pair, RANKS)]
        for before, after in itertools.pairwise((way[0], *steps)):
            made = convert(editor, made, tuple(whole.shape), before, after, axis, of_rows=of_rows)
            assert tuple(made.meta["val"].shape) == local_shape(whole.shape, after, RANKS)
    step.set_result("buffer", "x", made)
    for call in filter(c10d.is_collective, step.calls()):
        assert call.meta["val"].dtype is not torch.bool, "not every backend sends truth values"
    parts = parts_of(whole, way[0], RANKS, torch.Generator().manual_seed(0))
    return run_ranks(step, [parts, [ENDS] * RANKS], RANKS)["x"]


@pytest.mark.parametrize("before", LIES, ids=str)
def test_each_rank_takes_the_rows_of_its_experts(before: Placement) -> None:
    whole = torch.arange(16.0).view(ROWS, 2)
    found = converted(whole, before, BY_EXPERT)
    torch.testing.assert_close(torch.cat([found[0][:5], found[1][:3]]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("after", LIES, ids=str)
def test_rows_of_experts_go_back_where_they_stood(after: Placement, dtype: torch.dtype) -> None:
    if after.is_partial and dtype is torch.bool:
        pytest.skip("truth values are not added up")
    whole = (torch.arange(16).view(ROWS, 2) % 3).to(dtype)
    found = converted(whole, REPLICATED, BY_EXPERT, after)
    if after.is_partial:
        assert torch.equal(sum(found), whole)
        return
    expected = whole.chunk(RANKS, after.dim) if after.is_shard else [whole] * RANKS
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_rows_go_by_way_of_what_is_whole_or_added_up() -> None:
    assert conversion(REPLICATED, BY_EXPERT) == "take" and conversion(BY_EXPERT, partial()) == "lay"
    for lies in (shard(0), shard(1), shard(0, 2), partial(), partial("max")):
        assert route((ROWS, 2), lies, BY_EXPERT, RANKS) == (REPLICATED, BY_EXPERT)
    for lies in (REPLICATED, shard(0), shard(1), shard(0, 2)):
        assert route((ROWS, 2), BY_EXPERT, lies, RANKS) == (partial(), lies)
    for lies in (partial("max"), routed(0, room=4, rows=ROWS), routed(1, room=2, rows=2)):
        assert route((ROWS, 2), BY_EXPERT, lies, RANKS) == ()
    assert route((ROWS + 2, 2), REPLICATED, BY_EXPERT, RANKS) == ()


def routing_of_mixtral(factor: float = 0.0) -> tuple[StepGraph, Routing]:
    step = captured("mixtral")[-1].step.copy()
    step.mesh = {"dp": 1, "ep": RANKS}
    return step, Routing.of(step, Rules(RANKS).of, ranks=RANKS, factor=factor)


def test_rows_are_followed_from_products_to_the_sort_and_no_further() -> None:
    step, routing = routing_of_mixtral()
    named = {node.name: node for node in step.graph.nodes}
    of_first = {(node.name, dim) for (node, dim), ends in routing.ends.items() if ends is named["cumsum_1"]}
    assert {
        ("silu", 0),
        ("index_4", 0),
        ("floor_divide", 0),
        ("getitem_5", 0),
        ("index_5", 0),
        ("cat_7", 0),
    } <= of_first
    tokens = {"view_9", "topk", "view_12", "sort", "index_6", "index_put", "view_14", "index_put_7"}
    assert not tokens & {name for name, _ in of_first}
    assert len(routing.number) == 2 and set(routing.number.values()) == {48}


def test_ends_stand_before_the_first_call_on_rows() -> None:
    step, _ = routing_of_mixtral()
    order = {node.name: index for index, node in enumerate(step.graph.nodes)}
    assert order["cumsum_1"] < order["floor_divide"]
    step.graph.lint()
    assert order["floor_divide"] < order["cumsum_2"] < order["floor_divide_1"]


def test_room_is_a_factor_on_an_even_load() -> None:
    assert routing_of_mixtral()[1].room(48) == 48
    assert routing_of_mixtral(1.25)[1].room(48) == 30
    assert routing_of_mixtral(1.01)[1].room(48) == 25
    assert routing_of_mixtral(9.0)[1].room(48) == 48


def test_products_of_experts_have_no_other_ways() -> None:
    step, routing = routing_of_mixtral()
    rules = Rules(RANKS)
    rules.routing = routing
    grouped = [node for node in step.calls() if "grouped_mm_fallback" in str(node.target)]
    assert len(grouped) == 8
    for node in grouped:
        (way,) = rules.of(node)
        assert way.inputs[:3] == (routed(0, room=48, rows=48), shard(0), routed(0, room=2, rows=4))


class TwoSorts(nn.Module):
    """Two grouped products by unlike ends, on one input, with one scale for each row; they may meet."""

    def __init__(self, *, meet: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 8)), nn.Parameter(torch.randn(4, 8, 8))
        self.meet = meet

    def forward(self, x: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        fallback = torch.ops.transformers.grouped_mm_fallback
        one, other = fallback(x, self.up, ends) * scale, fallback(x, self.down, others) * scale
        return (one * other).sum() if self.meet else one.sum() + other.sum()


@pytest.mark.parametrize("meet", [False, True])
def test_what_two_sorts_reach_is_routed_by_none(meet: bool) -> None:
    import transformers.integrations.moe  # noqa: F401  its op is made when it is imported

    from tests.sharding.test_expert_parameters import captured as captured_step

    ends = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    step = captured_step(TwoSorts(meet=meet), torch.randn(8, 8), torch.ones(8, 1), ends, ends + 0)
    routing = Routing.of(step, Rules(RANKS).of, ranks=RANKS)
    assert len(routing.number) == (0 if meet else 2)
    assert not any(node.op == "placeholder" for node, _ in routing.ends)
