"""The ways of attention ops that only a GPU runs: the parts that they yield have the shapes that are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxzero.graph.axis_placement import REPLICATED, Placement, shard
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Strategy
from tests.sharding.by_execution import split
from tests.sharding.further_calls import made
from tests.sharding.recorded_calls import RecordedCall

aten = torch.ops.aten


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_calls(heads: int, dropout: float = 0.0) -> Iterator[RecordedCall]:
    """Forward and backward of each; 8 heads of queries, and so many of keys and values."""
    q, k, bias = on_meta(4, 8, 16, 8), on_meta(4, heads, 16, 8), on_meta(4, 8, 16, 16)
    forward = made(aten._scaled_dot_product_flash_attention.default, q, k, k, dropout, True)
    yield forward
    yield backward(aten._scaled_dot_product_flash_attention_backward.default, forward, q, k, dropout, None)
    for mask in (None, bias):
        forward = made(aten._scaled_dot_product_efficient_attention.default, q, k, k, mask, True, dropout)
        yield forward
        yield backward(aten._scaled_dot_product_efficient_attention_backward.default, forward, q, k, dropout, mask)
        forward = made(aten._scaled_dot_product_cudnn_attention.default, q, k, k, mask, True, dropout)
        yield forward
        yield backward(aten._scaled_dot_product_cudnn_attention_backward.default, forward, q, k, dropout, mask)


def backward(
    op: Any, forward: RecordedCall, q: torch.Tensor, k: torch.Tensor, dropout: float, bias: torch.Tensor | None
) -> RecordedCall:
    """The gradient of a forward call: arguments by name, of what it has yielded."""
    val, returns = forward.node.meta["val"], forward.node.target._schema.returns  # type: ignore[union-attr]
    yielded = dict(zip([each.name for each in returns], val, strict=True))
    logs = val[1]
    seed = yielded.get("philox_seed", yielded.get("rng_state"))
    offset = yielded.get("philox_offset", yielded.get("unused"))
    named = {
        "grad_out": q, "grad_out_": q, "query": q, "key": k, "value": k, "out": q, "attn_bias": bias,
        "logsumexp": on_meta(*logs.shape, dtype=logs.dtype),
        "cum_seq_q": None, "cum_seq_k": None, "max_q": 16, "max_k": 16, "dropout_p": dropout, "is_causal": False,
        "philox_seed": on_meta(*seed.shape, dtype=seed.dtype),
        "philox_offset": on_meta(*offset.shape, dtype=offset.dtype),
        "grad_input_mask": [True, True, True, bias is not None],
    }  # fmt: skip
    return made(op, *(named[a.name] for a in op._schema.arguments if a.name in named))


def parts(call: RecordedCall, ranks: int) -> list[Strategy]:
    return [way for way in Rules(ranks).of(call.node)[1:] if split(call, way, ranks) is not None]


def by_tokens(call: RecordedCall) -> list[Placement]:
    """Of flash attention, queries may be split on tokens: keys are gathered, or travel."""
    return [shard(2)] * 2 if "flash_attention" in str(call.node.target) else []


@pytest.mark.parametrize("ranks", [2, 4])
def test_samples_heads_and_tokens_are_split(ranks: int) -> None:
    for call in attention_calls(heads=8):
        queries = {way.inputs[1 if "backward" in str(call.node.target) else 0] for way in parts(call, ranks)}
        assert queries == {shard(0), shard(1), *by_tokens(call)}, call.node.target


def test_heads_that_ranks_share_are_whole_on_each() -> None:
    for call in attention_calls(heads=2):
        ways, first = parts(call, 4), 1 if "backward" in str(call.node.target) else 0
        if "efficient_attention_backward" in str(call.node.target):  # which knows no groups of queries
            assert [way.inputs[first] for way in ways] == [shard(0)]
            continue
        assert [way.inputs[first] for way in ways] == [shard(0), shard(1), *by_tokens(call)], call.node.target
        assert ways[1].inputs[first + 1] == REPLICATED
        assert ways[1].form is not None


def test_with_dropout_every_rank_does_all() -> None:
    for call in attention_calls(heads=8, dropout=0.1):
        assert not parts(call, 2), call.node.target
