"""What ways and conversions cost: messages beside products, several calls for one, what waits for backward."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.communication import collective_seconds, layout_of, message_seconds
from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware, Link, known_hardware
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.graph.edit import Editor, coordinate
from fxzero.sharding.attention import is_attention
from fxzero.sharding.conversions import Axis, convert, route
from fxzero.sharding.problem import Problem, Value, problem_of
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Message, Strategy
from tests.sharding.test_conversions import AXIS, one_value

RANKS, TOKENS = 4, 4096
RING = shard(2)


class Attention(nn.Module):
    """One layer of attention that yields a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(384, 3 * 384)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).square().mean()


@functools.cache
def attention_step() -> StepGraph:
    with torch.device("meta"):
        model = Attention()
    inventory = rehearse(Inventory.of(model, torch.optim.SGD(model.parameters(), lr=1.0)))[0]
    step = capture_step(inventory, None, (torch.zeros(1, TOKENS, 384),), {}).step
    step.mesh = {"sp": RANKS}
    return step


def machine(bytes_s: float) -> Hardware:
    """An H100 with such links, which have no latency."""
    return dataclasses.replace(known_hardware("h100"), node_link=Link(0.0, bytes_s), collectives={})


def ring(phase: str, bytes_s: float) -> tuple[Strategy, float, float]:
    """The ring's way of attention, its seconds, and those of one device."""
    step, hardware = attention_step(), machine(bytes_s)
    problem = problem_of(step, "sp", Rules(RANKS), hardware)
    node = next(n for n in step.calls() if is_attention(n.target) and n.meta["phase"] == phase)
    unit = problem.units[problem.of_node[node]]
    number = next(i for i, way in enumerate(unit.strategies) if set(way.inputs) == {RING})
    return unit.strategies[number], unit.seconds[number], compute_seconds(node, hardware)


def sent_s(messages: list[Message], problem: Problem) -> float:
    return sum(message_seconds(each.algorithm, each.num_bytes, problem.layout, problem.hardware) for each in messages)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_messages_beside_products_cost_what_they_take_longer(phase: str) -> None:
    way, alone_s, whole_s = ring(phase, 1e30)
    problem = problem_of(attention_step(), "sp", Rules(RANKS), machine(1e30))
    overhead_s = problem.hardware.op_overhead_s
    own_s = (whole_s - overhead_s) / RANKS
    moved_s = way.traffic / problem.hardware.memory_bytes_s
    assert alone_s == pytest.approx(RANKS * overhead_s + own_s + moved_s)
    beside = [each for each in way.messages if each.is_beside]
    last = [each for each in way.messages if not each.is_beside]
    assert (len(beside), len(last)) == ((6, 0) if phase == "forward" else (10, 2))
    for factor in (0.5, 3.0):  # of the time of the products that they are beside
        total = sum(each.num_bytes for each in beside)
        bytes_s = total / (own_s * 3 / 4 * factor)
        slow = dataclasses.replace(problem, hardware=machine(bytes_s))
        found = ring(phase, bytes_s)[1]
        longer_s = max(0.0, factor - 1) * own_s * 3 / 4
        assert found == pytest.approx(alone_s + longer_s + sent_s(last, slow))


def test_what_is_made_for_forward_and_read_in_backward_costs_its_memory() -> None:
    problem = problem_of(attention_step(), "sp", Rules(RANKS), machine(1e30))
    kept = [value for value in problem.values if value.is_kept_as_made and len(value.shape) == 4]
    assert kept, "queries, keys and values of attention are read in both"
    for value in kept:
        plain = dataclasses.replace(value, is_kept_as_made=False)
        for after, part in ((REPLICATED, 1), (shard(3), RANKS)):
            more_s = problem.conversion_seconds(value, RING, after) - problem.conversion_seconds(plain, RING, after)
            assert more_s == pytest.approx(value.kept / part / problem.hardware.memory_bytes_s)
    assert not any(value.is_kept_as_made for value in problem.values if not value.kept)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (shard(0), REPLICATED),
        (shard(0), shard(1)),
        (shard(1), shard(0)),
        (shard(0), shard(0, 2)),
        (partial(), shard(0)),
        (partial(), REPLICATED),
    ],
    ids=str,
)
def test_a_conversion_costs_what_the_collectives_do_that_make_it(before: Placement, after: Placement) -> None:
    shape, hardware = (4096, 1024), dataclasses.replace(known_hardware("h100"), memory_bytes_s=1e30, op_overhead_s=0.0)
    step, node = one_value(torch.empty(shape, device="meta"), before, ranks=RANKS)
    axis, editor, made, lies = Axis(AXIS, RANKS, coordinate(step, AXIS)), Editor(step, phase="forward"), node, before
    with editor.before(step.output):
        for following in route(shape, before, after, RANKS):
            made, lies = convert(editor, made, shape, lies, following, axis), following
    launches = list(filter(c10d.is_collective, step.calls()))
    expected = sum(collective_seconds(launch, step.mesh, hardware) for launch in launches)
    problem = Problem(RANKS, layout_of(AXIS, step.mesh, hardware.ranks_per_node), hardware)
    found = problem.conversion_seconds(Value(0, 0, shape, 4, 0, ()), before, after)
    assert launches and found == pytest.approx(expected)
