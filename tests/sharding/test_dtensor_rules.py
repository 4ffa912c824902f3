"""What DTensor says is taken as it is only where it can be: rules that fail, and what is known to be wrong, are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import OpStrategy

from fxzero.graph.axis_placement import REPLICATED
from fxzero.sharding import dtensor_rules
from fxzero.sharding.dtensor_mistakes import mistakes
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Call, Strategy
from tests.sharding.by_execution import fault_of
from tests.sharding.further_calls import further_calls, made

aten = torch.ops.aten

RANKS = 2
Plant = Callable[[str, Any, Any], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """`plant(registry, op, rule)` puts a rule of ours among DTensor's."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    kinds = ("op_single_dim_strategy_funcs", "op_strategy_funcs")

    def put(kind: str, op: Any, rule: Any) -> None:
        for other in kinds:
            monkeypatch.delitem(getattr(propagator, other), op, raising=False)
        monkeypatch.setitem(getattr(propagator, kind), op, rule)

    return put


def ways_of_relu() -> list[str]:
    return [str(way) for way in Rules(RANKS).of(made(aten.relu.default, torch.randn(4, 8)).node)]


def fails(*args: Any) -> Any:
    raise ValueError("planted")


ALL_OF_IT = "(R) -> (R)"


@pytest.mark.parametrize("kind", ["op_single_dim_strategy_funcs", "op_strategy_funcs"])
@pytest.mark.parametrize("rule", [fails, lambda *args: None, lambda *args: 3, lambda *args: [[3, 4]]])
def test_a_rule_that_fails_leaves_all_of_a_call_to_every_rank(plant: Plant, kind: str, rule: Any) -> None:
    plant(kind, aten.relu.default, rule)
    assert ways_of_relu() == [ALL_OF_IT]


@pytest.mark.parametrize(
    "row",
    [
        [],
        [Shard(0)],
        [Shard(0), Shard(0), Shard(0), Shard(0)],
        [Shard(2), Shard(2)],  # no such dim
        [Shard(-1), Shard(-1)],
        [Shard(0), Shard(1)],  # another part than it makes of this
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Partial("avg"), Partial("avg")],
        [None, Shard(0)],
        ["S(0)", "S(0)"],
    ],
)
def test_what_a_rule_cannot_mean_is_left_out(plant: Plant, row: list[Any]) -> None:
    plant("op_single_dim_strategy_funcs", aten.relu.default, lambda *args: [row, [Shard(1), Shard(1)]])
    assert ways_of_relu() == [ALL_OF_IT, "(S(1)) -> (S(1))"]


def test_a_strategy_without_specs_is_left_out(plant: Plant) -> None:
    plant("op_strategy_funcs", aten.relu.default, lambda schema: OpStrategy([None]))
    assert ways_of_relu() == [ALL_OF_IT]


def test_ops_that_no_rule_knows_are_counted() -> None:
    rules, x = Rules(RANKS), torch.randn(4, 8)
    for call in (made(aten.argsort.default, x), made(aten.argsort.default, x, 0), made(aten.relu.default, x)):
        assert str(rules.of(call.node)[0]) == ALL_OF_IT
    assert rules.unknown == {"aten.argsort.default": 2}


def test_what_was_found_to_be_wrong_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is all that is wrong of these ops: the others of their ways are tested beside those of all calls."""
    calls = [call for call in further_calls() if call.node.target.name() in mistakes()]  # type: ignore[union-attr]
    told = [list(by_dtensor(Call.of(call.node, RANKS))) for call in calls]
    monkeypatch.setattr(dtensor_rules, "is_mistake", lambda call, strategy: False)
    seen = set()
    for call, right in zip(calls, told, strict=True):
        for strategy in by_dtensor(Call.of(call.node, RANKS)):
            if strategy in right:
                continue
            seen.add(call.node.target.name())  # type: ignore[union-attr]
            assert fault_of(call, strategy, RANKS) is not None, f"{call.node.target}: {strategy}"
    assert seen == set(mistakes())


def test_truth_values_are_not_added_up() -> None:
    rules = Rules(RANKS)
    for call in further_calls():
        for strategy in rules.of(call.node):
            taken = zip(call.tensors, strategy.inputs, strict=True)
            assert not any(p.is_partial and t.dtype is torch.bool for t, p in taken), f"{call.node.target}: {strategy}"


def test_a_part_of_one_row_is_not_squeezed() -> None:
    call = made(aten.squeeze.dim, torch.randn(4, 8), 0)
    assert Strategy((REPLICATED,), (REPLICATED,)) in Rules(4).of(call.node)
    assert not any(strategy.inputs[0].is_shard and strategy.inputs[0].dim == 0 for strategy in Rules(4).of(call.node))


def test_a_copy_that_names_its_device_is_split_as_one_that_does_not() -> None:
    x = torch.randn(4, 8)
    told = {"dtype": torch.bfloat16, "layout": torch.strided, "device": torch.device("cpu")}
    named = Rules(RANKS).of(made(aten._to_copy.default, x, **told).node)
    assert {"(S(0)) -> (S(0))", "(S(1)) -> (S(1))"} <= set(map(str, named))
