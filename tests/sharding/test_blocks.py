"""Shards of several blocks are tried where they are of use, found there, and nowhere else."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import known_hardware
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import Placement, shard
from fxzero.passes.split_tensors import split_tensors
from fxzero.sharding.blocks import Blocks
from fxzero.sharding.problem import Value, problem_of
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import Answer, solve
from fxzero.sharding.strategy import Call, Strategy, with_blocks
from tests.sharding.further_calls import made
from tests.sharding.steps import step_on
from tests.sharding.test_solve import megatron_bytes

aten = torch.ops.aten


@functools.cache
def gpt2_step(layers: int, *, width: int = 2048, tokens: int = 1024) -> StepGraph:
    """A step of a GPT-2, whose queries, keys and values are one product."""
    config = transformers.GPT2Config(
        n_embd=width, n_head=width // 64, n_layer=layers, n_positions=tokens, vocab_size=50304, loss_type="ForCausalLM"
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    inventory = rehearse(Inventory.of(model, torch.optim.SGD(model.parameters())))[0]
    step = capture_step(inventory, None, (), {"input_ids": ids, "labels": ids}).step
    step.mesh = {"tp": 8}
    return step


def blocks_of(answer: Answer) -> dict[str, set[Placement]]:
    """Op -> the shards of several blocks that its calls take."""
    found: dict[str, set[Placement]] = {}
    for node in answer.problem.of_node:
        lies = {placement for placement in answer.strategy(node).inputs if placement.blocks > 1}
        found.setdefault(str(node.target), set()).update(lies)
    return found


def test_a_fused_product_is_split_by_heads() -> None:
    found = blocks_of(solve(problem_of(gpt2_step(1, tokens=4096), "tp", Rules(8), known_hardware("h100"))))
    assert found["aten.addmm.default"] == {shard(0, 3), shard(1, 3)}, "bias and weight of three projections in one"
    assert found["aten.split.Tensor"] == {shard(2, 3)}


def test_what_goes_by_another_dim_is_paid_for_twice() -> None:
    problem = problem_of(gpt2_step(2), "tp", Rules(8), known_hardware("h100"))
    weight = Value(0, 0, (2048, 6144), 2, 0, ())
    both = problem.conversion_seconds(weight, shard(1), shard(1, 3))
    first = problem.conversion_seconds(weight, shard(1), shard(0))
    assert both == first + problem.conversion_seconds(weight, shard(0), shard(1, 3))


def test_the_problem_of_blocks_does_not_grow_with_depth() -> None:
    problems = [problem_of(gpt2_step(layers), "tp", Rules(8), known_hardware("h100")) for layers in (2, 4)]
    ways = [sum(len(unit.strategies) for unit in problem.units) for problem in problems]
    assert ways[0] == ways[1]


def test_a_llama_of_one_row_has_no_ways_of_blocks() -> None:
    step = step_on(2, tp=8)
    rules = Rules(8)
    blocks = Blocks(step, rules)
    calls = [node for node in step.calls() if node.meta["val"] is not None]
    assert all(blocks.ways(node) == rules.of(node) for node in calls)


def test_rows_that_ranks_do_not_divide_are_split_by_tokens() -> None:
    tp, layers, rows, tokens, width = 4, 1, 2, 2048, 4096
    step = step_on(layers, tp=tp, rows=rows, tokens=tokens, width=width)
    split_tensors.run(step, axis="tp", hardware="h100")
    moved = sum(c10d.wire_bytes(node, step.mesh) for node in step.calls() if c10d.is_collective(node))
    assert moved <= megatron_bytes(layers, tokens=rows * tokens, width=width, tp=tp)


def test_rows_of_tokens_are_tried_as_blocks() -> None:
    step, rules = step_on(2, tp=4, rows=2, tokens=2048), Rules(4)
    blocks = Blocks(step, rules)
    products = [node for node in step.calls() if node.target is aten.mm.default]
    asked = [way.inputs[0] for node in products for way in blocks.ways(node)]
    assert shard(0, 2) in asked


@pytest.mark.parametrize(
    ("way", "holds"),
    [
        (Strategy((shard(0),), (shard(0),)), True),
        (Strategy((shard(0),), (shard(0),), lambda local: ()), False),
        (Strategy((shard(0),), (shard(0),), lambda local: (), in_blocks=True), True),
        (Strategy((shard(1),), (shard(1),)), False),  # 6 columns are no two blocks of four parts
        (Strategy((shard(0, 2),), (shard(0, 2),)), False),
    ],
)
def test_a_form_says_itself_that_it_is_right_for_blocks(way: Strategy, holds: bool) -> None:
    call = Call.of(made(aten.neg.default, torch.randn(8, 6)).node, 4)
    found = with_blocks(call, way, 2)
    assert (found is not None) == holds
    assert found is None or found.inputs == found.outputs == (shard(0, 2),)


def test_draws_are_of_one_block() -> None:
    node = made(aten.bernoulli.p, torch.randn(16, 16), 0.5).node
    assert {placement.blocks for way in Rules(2).of(node, (1, 2)) for placement in way.inputs} == {1}
