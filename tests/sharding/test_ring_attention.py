"""Attention by tokens: every rank's queries against all keys, causal or not, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding import ring_attention
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Strategy
from tests.sharding.by_execution import fault_of
from tests.sharding.further_calls import made
from tests.sharding.recorded_calls import RecordedCall

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
TOKENS = shard(2)


def calls(*, causal: bool, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> list[RecordedCall]:
    """Forward and backward of 3 heads, which ranks do not divide; scores are large, so that parts differ in weight."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, slope = ((2 * torch.randn(2, 3, 16, 8, generator=generator)).to(dtype) for _ in range(4))
    output, weight = FORWARD(q, k, v, 0.0, causal, attn_mask=mask)
    given: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    return [
        made(FORWARD, q, k, v, 0.0, causal, **given),
        made(BACKWARD, slope, q, k, v, output, weight, 0.0, causal, **given),
    ]


def by_tokens(call: RecordedCall, ranks: int) -> list[Strategy]:
    return [way for way in Rules(ranks).of(call.node) if way.outputs[0] == TOKENS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_queries_have_together_what_one_device_has(ranks: int, causal: bool, dtype: torch.dtype) -> None:
    for call, outputs in zip(
        calls(causal=causal, dtype=dtype), [(TOKENS,) * 2, (TOKENS, partial(), partial())], strict=True
    ):
        (way,) = by_tokens(call, ranks)
        assert way.outputs == outputs
        assert way.inputs.count(REPLICATED) == 2 and not way.messages
        assert fault_of(call, way, ranks) is None


def test_a_mask_leaves_no_way_by_tokens() -> None:
    for call in calls(causal=False, mask=torch.zeros(16, 16)):
        assert by_tokens(call, 2) == []


def test_tokens_that_ranks_do_not_divide_leave_no_way() -> None:
    for call in calls(causal=True):
        assert by_tokens(call, 3) == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_that_must_not_be_seen_is_found(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_attention, "_NOTHING", 0)
    call = calls(causal=True)[number]
    (way,) = by_tokens(call, 2)
    assert fault_of(call, way, 2) is not None
