"""What the pass tells, and what it refuses: that what it makes computes the same is tested in tests/sharding."""

import re
from typing import Any
from unittest import mock

import pytest
import torch

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import placement_of, shard
from fxzero.passes.split_tensors import split_tensors
from fxzero.sharding import rules
from fxzero.sharding.strategy import Call, Tensor
from fxzero.sharding.whole import undivided
from tests.sharding.steps import linears_step, step_on

pytest.importorskip("transformers")

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default


def step() -> StepGraph:
    """A Llama's, large enough that it pays to split it."""
    return step_on(1, tp=8)


def without_rule_for_silu() -> Any:
    """As if nobody knew how silu can be split."""
    known = rules._has_rule
    return mock.patch.object(
        rules, "_has_rule", lambda call: call.target is not torch.ops.aten.silu.default and known(call)
    )


def test_it_tells_the_cost_beside_its_bound_and_how_parameters_lie() -> None:
    graph = step()
    assert split_tensors.run(graph, axis="tp", hardware="h100") > 100
    first, *lines = graph.remarks["split_tensors"].splitlines()
    assert first.startswith("tensors over tp=8 on H100: ")
    assert re.search(r"at least \(gap 0\.\d\d%\)", first)
    assert "  S(1)  model.layers.*.mlp.down_proj.weight [4096, 14336]" in lines
    assert not any("no rule" in line for line in lines)


def test_every_conversion_says_why_it_is_there() -> None:
    graph = step()
    split_tensors.run(graph, axis="tp", hardware="h100")
    told = [node.meta["because"] for node in graph.calls() if "because" in node.meta]
    launched = [node for node in graph.calls() if c10d.is_collective(node) and node.target is not c10d.all_reduce]
    assert len(told) >= len(launched) >= 8
    assert any(text.startswith("a gradient lies as its parameter") for text in told)


def test_an_op_that_no_rule_knows_is_done_by_every_rank_and_told() -> None:
    graph = step()
    with without_rule_for_silu():
        split_tensors.run(graph, axis="tp", hardware="h100")
    (line,) = [line for line in graph.remarks["split_tensors"].splitlines() if "no rule" in line]
    assert line.startswith("  no rule for aten.silu.default: every rank does all of it (1 calls, ")


def test_it_is_an_error_where_the_plan_is_strict() -> None:
    with (
        without_rule_for_silu(),
        pytest.raises(PlanError, match=r"Plan\.tp_strict: .* none for aten\.silu\.default, first in forward of"),
    ):
        split_tensors.run(step(), axis="tp", hardware="h100", strict=True)


def test_sizes_that_ranks_do_not_divide_are_told() -> None:
    graph = linears_step(width=8191, tokens=4095, tp=4)
    split_tensors.run(graph, axis="tp", hardware="h100")
    lines = [
        line for line in graph.remarks["split_tensors"].splitlines() if "every rank does all of aten::mm in " in line
    ]
    assert len(lines) == 2
    assert lines[0].endswith("(4095 is not divided by 4, 4096 is; 8191 is not divided by 4, 8192 is)")


def test_they_are_an_error_where_the_plan_is_strict() -> None:
    expected = (
        r"Plan\.tp_strict: expected sizes that tp=4 divides, .* 8191 is not divided by 4, 8192 is\); change tp or"
    )
    with pytest.raises(PlanError, match=expected):
        split_tensors.run(linears_step(width=8191, tokens=4095, tp=4), axis="tp", hardware="h100", strict=True)


def test_heads_that_ranks_do_not_divide_are_told_with_ranks_that_would() -> None:
    tensors = Tensor((1, 12, 63, 8), (6048, 504, 8, 1), torch.float32)
    found = undivided(Call(ATTENTION, (tensors,) * 3, {}, (tensors,), 8))
    assert found == ["12 heads: 6 or 12 ranks would divide them"]


@pytest.mark.parametrize(("form", "dim"), [("heads", 1), ("gather", 2), ("ring", 2)])
def test_attention_is_made_in_the_form_that_is_asked_for(form: str, dim: int) -> None:
    graph = step_on(1, tp=4, tokens=64, width=1024)
    split_tensors.run(graph, axis="tp", attention=form, hardware="h100")
    asks = [node for node in graph.calls() if "scaled_dot_product" in str(node.target)]
    assert len(asks) == (2 if form == "heads" else 8)
    queries: list[Any] = [node.args[1 if "backward" in str(node.target) else 0] for node in asks]
    assert {placement_of(query, "tp") for query in queries} == {shard(dim)}
    assert bool(graph.calls(c10d.shift)) == (form == "ring")


@pytest.mark.parametrize(
    ("form", "tp", "got"),
    [
        ("heads", 3, "sizes that do: 2, 4, 8; or leave it at 'auto'"),
        ("ring", 3, "sizes that do: 2, 4, 8, 16, 32, 64; or leave it at 'auto'"),
    ],
)
def test_a_form_that_sizes_do_not_allow_names_those_that_do(form: str, tp: int, got: str) -> None:
    graph = step_on(1, tp=tp, tokens=64, width=1024)
    with pytest.raises(
        PlanError, match=rf"Plan\.tp_attention: expected .* tp=3 .* '{form}', got .*flash.*\[1, 8, 64, 128\]"
    ) as e:
        split_tensors.run(graph, axis="tp", attention=form, hardware="h100")
    assert got in str(e.value) and "\n" not in str(e.value)


def test_one_rank_has_nothing_to_split() -> None:
    graph = step_on(1, tp=1)
    split_tensors.run(graph, axis="tp", hardware="h100")
    assert not any(placement_of(node, "tp").is_shard for node in graph.inputs("parameter"))
    assert not any(map(c10d.is_collective, graph.calls()))
