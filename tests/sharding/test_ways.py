"""Ways that good splits need are there: that what is there is right is tested by execution."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

from fxzero.sharding.rules import Rules
from tests.sharding.further_calls import made
from tests.sharding.recorded_calls import RecordedCall

aten = torch.ops.aten


def needed() -> Iterator[tuple[RecordedCall, list[str]]]:
    """Calls, and ways of theirs."""
    x, wide, row, number = torch.randn(4, 8), torch.randn(8, 4), torch.randn(8), torch.tensor(0.5)
    yield made(aten.mm.default, x, wide), ["(S(0), R) -> (S(0))", "(R, S(1)) -> (S(1))", "(S(1), S(0)) -> (P(sum))"]
    yield made(aten.add.Tensor, row, number), ["(S(0), R) -> (S(0))"]
    yield made(aten.mul.Tensor, row, number), ["(S(0), R) -> (S(0))"]
    yield made(aten.where.self, x > 0, x, number), ["(S(0), S(0), R) -> (S(0))", "(R, P(sum), P(sum)) -> (P(sum))"]
    yield made(aten.copy.default, x, torch.randn(1, 8)), ["(S(0), R) -> (S(0))", "(S(1), S(1)) -> (S(1))"]
    yield made(aten.fill.Tensor, x, number), ["(S(0), R) -> (S(0))"]
    yield made(aten.floor_divide.default, x, row), ["(S(0), R) -> (S(0))", "(S(1), S(0)) -> (S(1))"]
    yield made(aten.clone.default, x), ["(P(sum)) -> (P(sum))", "(S(1)) -> (S(1))"]
    yield made(aten.mean.dim, x, [-1]), ["(S(1)) -> (P(sum))", "(S(0)) -> (S(0))", "(P(sum)) -> (P(sum))"]
    to_half = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    yield made(aten._to_copy.default, x, **to_half), ["(S(0)) -> (S(0))", "(P(sum)) -> (P(sum))"]
    yield made(aten.mean.default, x), ["(S(0)) -> (P(sum))", "(S(1)) -> (P(sum))"]
    yield made(aten.sum.dim_IntList, x, [0]), ["(S(0)) -> (P(sum))", "(S(1)) -> (S(0))"]
    yield made(aten.amax.default, x, [1]), ["(S(1)) -> (R)", "(S(0)) -> (S(0))"]
    yield made(aten.linalg_vector_norm.default, x), ["(R) -> (P(norm2))", "(S(0)) -> (P(norm2))"]
    yield made(aten.linalg_vector_norm.default, x, 2.0, [1]), ["(S(1)) -> (P(norm2))", "(S(0)) -> (S(0))"]
    yield made(aten.mse_loss.default, x, x), ["(S(0), S(0)) -> (P(sum))"]
    yield (
        made(aten.nll_loss_forward.default, x, torch.tensor([1, 0, 2, 3]), None, 0, -100),
        [
            "(S(0), S(0)) -> (S(0), R)",
            "(S(1), R) -> (P(sum), R)",
        ],
    )
    yield from needed_of_images()


def needed_of_images() -> Iterator[tuple[RecordedCall, list[str]]]:
    """Of convolutions and norms of channels."""
    x, weight, bias = torch.randn(4, 8, 6, 6), torch.randn(12, 8, 3, 3), torch.randn(12)
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0])
    yield (
        made(aten.convolution.default, x, weight, bias, *how, 1),
        [
            "(S(0), R, R) -> (S(0))",
            "(R, S(0), S(0)) -> (S(1))",
            "(S(1), S(1), P(sum)) -> (P(sum))",
        ],
    )
    yield made(aten.convolution.default, x, weight[:, :2].clone(), None, *how, 4), ["(S(1), S(0)) -> (S(1))"]
    gradient = torch.randn(4, 12, 6, 6)
    yield (
        made(aten.convolution_backward.default, gradient, x, weight, [12], *how, 1, [True, True, True]),
        [
            "(S(0), S(0), R) -> (S(0), P(sum), P(sum))",
            "(S(1), R, S(0)) -> (P(sum), S(0), S(0))",
            "(R, S(1), S(1)) -> (S(1), S(1), R)",
        ],
    )
    yield (
        made(aten.native_group_norm.default, x, x[0, :, 0, 0], x[0, :, 0, 0], 4, 8, 36, 4, 1e-5),
        [
            "(S(0), R, R) -> (S(0), S(0), S(0))",
            "(S(1), S(0), S(0)) -> (S(1), S(1), S(1))",
        ],
    )
    parameters = (bias[:8],) * 4
    yield (
        made(aten.native_batch_norm.default, x, *parameters, True, 0.1, 1e-5),
        ["(S(1), S(0), S(0), S(0), S(0)) -> (S(1), S(0), S(0))"],
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_ways_that_good_splits_need_are_there(ranks: int) -> None:
    for call, ways in needed():
        found = [str(way) for way in Rules(ranks).of(call.node)]
        assert not set(ways) - set(found), f"{call.node.target}: {found}"
        assert len(found) == len(set(found)), f"{call.node.target}: {found}"


def test_a_batch_norm_is_not_split_by_samples() -> None:
    """Each rank would norm its samples by their own mean."""
    x, parameters = torch.randn(4, 8, 6, 6), (torch.rand(8),) * 4
    ways = Rules(2).of(made(aten.native_batch_norm.default, x, *parameters, True, 0.1, 1e-5).node)
    assert not any(way.inputs[0].is_shard and way.inputs[0].dim == 0 for way in ways)


def test_no_way_rests_on_a_number_that_another_step_has_otherwise() -> None:
    """Zeros may be put into summands, but not what is zero at this step alone."""
    graph = fx.Graph()
    x, mask, number = (graph.placeholder(name) for name in ("x", "mask", "number"))
    x.meta["val"], mask.meta["val"], number.meta["val"] = torch.empty(4, 8), torch.ones(4, 8, dtype=torch.bool), 0.0
    rules, found = Rules(2), []
    for value in (0.0, number, 0.0):
        node = graph.call_function(aten.masked_fill.Scalar, (x, mask, value))
        node.meta["val"] = torch.empty(4, 8)
        found.append("(P(sum), R) -> (P(sum))" in map(str, rules.of(node)))
    assert found == [True, False, True]
