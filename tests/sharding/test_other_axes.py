"""A step that is split over one axis after another: what the first puts in, over the second."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import fx, nn

from fxzero import Plan, StepGraph, compat, compat_distributed
from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, placement_of, shard
from fxzero.graph.step_graph import Result, StateEntry
from fxzero.passes.split_tensors import rewrite
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Strategy
from tests.hf.models import CASES, TOKENS, Batch, HFCase
from tests.numerics.local_ranks import compile_for, train_ranks
from tests.sharding.by_execution import compare, greatest, launched, parts_of
from tests.sharding.machines import free_network_file

MESH = {"sp": 2, "tp": 2}
SP, TP = MESH.values()

# what a call of the first axis makes of what its ranks have, beside its name
CALLS: dict[str, Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]] = {
    "gather": lambda g, x, _: g.call_function(c10d.all_gather, (x, SP, "sp")),
    "scatter": lambda g, x, _: g.call_function(c10d.reduce_scatter, (x, "sum", SP, "sp")),
    "sum": lambda g, x, _: g.call_function(c10d.all_reduce, (x, "sum", "sp")),
    "greatest": lambda g, x, _: g.call_function(c10d.all_reduce, (x, "max", "sp")),
    "exchange": lambda g, x, _: g.call_function(c10d.all_to_all, (x, [4, 4], [4, 4], "sp")),
    "shift": lambda g, x, index: g.call_function(c10d.shift, (x, 1, SP, index, "sp")),
    "part": lambda g, x, index: g.call_function(ops.local_part, (x, 1, SP, index)),
    "put": lambda g, x, index: g.call_function(ops.put_part, (x, 1, SP, index)),
    "part of blocks": lambda g, x, index: g.call_function(ops.local_part, (x, 1, SP, index, 2)),
    "put in blocks": lambda g, x, index: g.call_function(ops.put_part, (x, 1, SP, index, 2)),
    "own": lambda g, x, index: g.call_function(ops.on_rank, (x, 0, index)),
}


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    """A process group of four ranks, in place of what others have made, and of which none stays."""
    if dist.is_initialized():
        dist.destroy_process_group()
    compat_distributed.fake_process_group(SP * TP)
    yield
    dist.destroy_process_group()


def call_over_sp(name: str) -> tuple[StepGraph, fx.Node]:
    """A step of one such call (and its wait), and the call."""
    graph = fx.Graph()
    step = StepGraph(graph, mesh=dict(MESH))
    x, index = graph.placeholder("x"), graph.placeholder("sp_index")
    x.meta = {"entry": StateEntry("buffer", "x"), "phase": "forward", "module": ""}
    index.meta = {"entry": StateEntry("coordinate", "sp"), "val": 0, "phase": "forward", "module": ""}
    mode = compat.new_fake_mode()
    with mode:
        x.meta["val"] = torch.empty(8, 8, 2)
    found = graph.placeholder("found")
    call = result = CALLS[name](graph, x, index)
    if c10d.is_collective(call):
        result = graph.call_function(c10d.wait, (call,))
    for node in dict.fromkeys((call, result)):
        node.meta = {"phase": "forward", "module": ""}
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        with mode:
            node.meta["val"] = node.target(*args)  # type: ignore[operator]
    found.meta = {"entry": StateEntry("buffer", "found"), "val": result.meta["val"], "phase": "forward", "module": ""}
    output = graph.output((result,))
    output.meta = {"results": (Result("buffer", "found"),)}
    return step, call


def by_rank(step: StepGraph, parts: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What each rank of sp and tp yields, of what it has."""
    group = {"sp": dist.new_group([0, TP]), "tp": dist.new_group(range(TP))}
    coordinates = {"sp": [rank // TP for rank in range(SP * TP)], "tp": [rank % TP for rank in range(SP * TP)]}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), compat_distributed.local_tensor_mode(SP * TP):
        for node in step.graph.nodes:
            if node.op == "placeholder" and node.meta["entry"].kind == "coordinate":
                indices = coordinates[node.meta["entry"].name]
                values[node] = compat_distributed.local_int(dict(enumerate(indices)))
            elif node.op == "placeholder":
                each = {rank: parts[rank // TP][rank % TP] for rank in range(SP * TP)}
                values[node] = compat_distributed.local_tensor(each) if node.name == "x" else None
            elif node.op == "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                if c10d.is_collective(node):
                    args = tuple(group[arg].group_name if isinstance(arg, str) and arg in MESH else arg for arg in args)
                values[node] = launched(node.target)(*args)
    found = compat_distributed.local_values(values[step.results[("buffer", "found")]])
    return [[found[i * TP + j] for j in range(TP)] for i in range(SP)]


def difference(name: str, strategy: Strategy) -> str | None:
    """What ranks of tp have together of a call over sp, made in a way, beside the call on what is whole over tp."""
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(8, 8, 2, generator=generator) for _ in range(SP)]
    (before,), (after,) = strategy.inputs, strategy.outputs
    assert after is not None
    if before.reduction in ("max", "norm2"):
        wholes = [whole.abs() for whole in wholes]
    alone, _ = call_over_sp(name)
    expected = by_rank(alone, [[whole] * TP for whole in wholes])
    step, call = call_over_sp(name)
    x, found = (step.input("buffer", key) for key in ("x", "found"))
    assert x is not None and found is not None
    rewrite(step, axis="tp", ways={x: Strategy((), (before,)), found: Strategy((), (after,)), call: strategy})
    assert [c10d.axis_of(node) for node in step.calls() if c10d.is_collective(node)] in ([], ["sp"])
    parts = by_rank(step, [parts_of(whole, before, TP, generator) for whole in wholes])
    faults = [compare(mine, whole[0], after) for mine, whole in zip(parts, expected, strict=True)]
    return next((fault for fault in faults if fault is not None), None)


@pytest.mark.parametrize("name", CALLS)
def test_every_way_over_tp_of_a_call_over_sp_is_right(name: str) -> None:
    _, call = call_over_sp(name)
    ways = Rules(TP).of(call)
    assert len(ways) > 3
    faults = {str(way): difference(name, way) for way in ways}
    assert not {way: fault for way, fault in faults.items() if fault is not None}


WRONG: list[tuple[str, Placement, Placement]] = [
    ("gather", shard(0), shard(0)),
    ("scatter", shard(0), shard(0)),
    ("exchange", shard(0), shard(0)),
    ("greatest", partial(), partial()),
    ("sum", partial(), REPLICATED),
    ("shift", partial(), REPLICATED),
    ("part", shard(1), shard(1)),
    ("put", shard(1), shard(1)),
    ("part of blocks", shard(1, 2), shard(1)),
    ("put in blocks", shard(1), shard(1, 2)),
]


@pytest.mark.parametrize(("name", "before", "after"), WRONG, ids=str)
def test_a_wrong_way_is_found(name: str, before: Placement, after: Placement) -> None:
    assert difference(name, Strategy((before,), (after,))) is not None


# ---- whole steps


class Called(nn.Module):
    """A model of `tests/hf` that is called with the values of its batch alone, and yields its loss."""

    def __init__(self, case: HFCase) -> None:
        super().__init__()
        self.inner, self.case, self.names = case.model(), case, ("input_ids", "labels")

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.case.train(self.inner, dict(zip(self.names, values, strict=True)))


def llama_of_heads(heads: int) -> HFCase:
    """The Llama of `tests/hf`, with so many heads of keys and values, and of queries."""
    sizes = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "use_cache": False}
    config = transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads, **sizes)
    return HFCase(lambda: transformers.LlamaForCausalLM(config).train(), CASES["llama"].batch)


@functools.cache
def machine() -> str:
    """One on which messages take no time."""
    return free_network_file(Path(tempfile.mkdtemp()))


def split_llama(
    mesh: dict[str, int], *, rows: int, case: HFCase = CASES["llama"], **keys: Any
) -> tuple[StepGraph, Called, tuple[torch.Tensor, ...]]:
    """A step of a Llama, split over sp and tp where there is nothing to pay for messages; its model and batch."""
    torch.manual_seed(0)
    model = Called(case)
    batch: Batch = model.case.batch(torch.Generator().manual_seed(0))
    values = tuple(batch[name][:rows] for name in model.names)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = compile_for(model, optimizer, values, Plan(mesh={"dp": 1, **mesh}, hardware=machine(), **keys))
    return step, model, values


def far(step: StepGraph, model: Called, values: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """How far parameters and losses are from those of one device after a step, as parts of their greatest element."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outcome = train_ranks(model, optimizer, [[values]], Plan(zero=0), step=step)
    loss = model(*values)
    loss.backward()
    optimizer.step()
    found = {f"loss of {rank}": (other - loss) / loss for rank, other in outcome.losses.items()}
    for name, parameter in model.named_parameters():
        found[name] = (outcome.state[("parameter", name)] - parameter) / greatest(parameter)
    return {name: greatest(each) for name, each in found.items()}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("mesh", [MESH, {"sp": 4}], ids=str)
def test_a_llama_split_over_sp_and_tp_is_that_of_one_device(mesh: dict[str, int], rows: int) -> None:
    step, model, values = split_llama(mesh, rows=rows)
    assert {placement_of(node, "sp") for node in step.inputs("parameter")} == {REPLICATED}
    found = far(step, model, values)
    assert max(found.values()) < 1e-5, found


def test_ranks_of_sp_share_the_heads_of_a_rank_of_tp() -> None:
    step, model, values = split_llama(MESH, rows=1, case=llama_of_heads(4))
    attention = [node for node in step.calls() if "scaled_dot_product" in str(node.target)]
    assert len(attention) == 4
    for node in attention:
        lies = [source.meta["placements"] for source in node.all_input_nodes[:3]]
        assert lies == [{"sp": shard(1, TP), "tp": shard(1)}] * 3
    found = far(step, model, values)
    assert max(found.values()) < 1e-5, found


def test_heads_that_ranks_do_not_divide_are_attended_by_tokens() -> None:
    step, model, values = split_llama({"sp": 4}, rows=1, case=llama_of_heads(3))
    attention = [node for node in step.calls() if "scaled_dot_product" in str(node.target)]
    own = [node for node in attention if node.args[0].meta["val"].shape == (1, 3, TOKENS // 4, 16)]
    assert len(own) == len(attention) == 2 * 2 * 4, "of two layers, forward and backward, one call for each part"
    found = far(step, model, values)
    assert max(found.values()) < 1e-5, found
