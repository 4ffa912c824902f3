"""Attention by tokens: keys gathered or in a ring, causal or not, forward and backward; which of the two is cheaper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding import ring_attention, token_attention
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Message, Strategy
from tests.sharding.by_execution import fault_of, split
from tests.sharding.further_calls import made
from tests.sharding.recorded_calls import RecordedCall

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
TOKENS = shard(2)
FORMS = {"gathered": REPLICATED, "ring": TOKENS}  # how keys and values lie


def calls(
    *, causal: bool, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32, kv_heads: int = 3
) -> list[RecordedCall]:
    """Forward and backward of 3 heads, which ranks do not divide; scores are large, so that parts differ in weight."""
    generator = torch.Generator().manual_seed(0)
    heads = (3, kv_heads, kv_heads, 3)
    q, k, v, slope = ((2 * torch.randn(2, n, 16, 8, generator=generator)).to(dtype) for n in heads)
    output, weight = FORWARD(q, k, v, 0.0, causal, attn_mask=mask)
    given: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    return [
        made(FORWARD, q, k, v, 0.0, causal, **given),
        made(BACKWARD, slope, q, k, v, output, weight, 0.0, causal, **given),
    ]


def by_tokens(call: RecordedCall, ranks: int, form: str | None = None) -> list[Strategy]:
    """The ways that split queries on tokens, of a form or of both."""
    ways = [way for way in Rules(ranks).of(call.node) if way.outputs[0] == TOKENS]
    key = 1 if len(call.tensors) == 3 else 2  # backward's first tensor is the gradient
    return [way for way in ways if form is None or way.inputs[key] == FORMS[form]]


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_queries_have_together_what_one_device_has(
    ranks: int, form: str, causal: bool, dtype: torch.dtype, kv_heads: int
) -> None:
    of_keys = partial() if form == "gathered" else TOKENS
    for call, outputs in zip(
        calls(causal=causal, dtype=dtype, kv_heads=kv_heads), [(TOKENS,) * 2, (TOKENS, of_keys, of_keys)], strict=True
    ):
        (way,) = by_tokens(call, ranks, form)
        assert way.outputs == outputs
        assert way.inputs.count(FORMS[form]) == (2 if form == "gathered" else len(call.tensors))
        assert fault_of(call, way, ranks) is None


def test_a_mask_leaves_no_way_by_tokens() -> None:
    for call in calls(causal=False, mask=torch.zeros(16, 16)):
        assert by_tokens(call, 2) == []


def test_tokens_that_ranks_do_not_divide_leave_no_way() -> None:
    for call in calls(causal=True):
        assert by_tokens(call, 3) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_part_that_must_not_be_seen_is_found(number: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_attention, "_NOTHING", 0)
    call = calls(causal=True)[number]
    (way,) = by_tokens(call, 2, form)
    assert fault_of(call, way, 2) is not None


# ---- the ring


def in_ring(number: int, ranks: int, *, causal: bool = True) -> tuple[StepGraph, Strategy]:
    """What a rank does of a call in the ring's way."""
    call = calls(causal=causal)[number]
    (way,) = by_tokens(call, ranks, "ring")
    return split(call, way, ranks), way


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("number", [0, 1])
def test_a_ring_sends_parts_to_the_next_rank_and_says_so(number: int, ranks: int) -> None:
    step, way = in_ring(number, ranks)
    launches = [node for node in step.calls() if c10d.is_collective(node)]
    assert {node.target for node in launches} == {c10d.shift}
    assert {node.args[1] for node in launches} == {1}
    sent = [Message("shift", node.meta["val"].nbytes) for node in launches]
    assert len(sent) == (ranks - 1) * (2, 4)[number] == len(way.messages)
    assert sorted(map(str, sent)) == sorted(str(Message("shift", each.num_bytes)) for each in way.messages)
    assert [each.is_beside for each in way.messages].count(False) == (0, 2)[number]  # what goes home


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_is_under_way_while_another_one_is_asked(number: int) -> None:
    step, way = in_ring(number, 4)
    position = step.positions()
    asks = [position[node] for node in step.calls() if "scaled_dot_product" in str(node.target)]
    assert len(asks) == 4
    beside = 0
    for node in step.calls(c10d.shift):
        (wait,) = node.users
        beside += any(position[node] < ask < position[wait] for ask in asks)
    assert beside == sum(each.is_beside for each in way.messages)


def test_a_rank_holds_two_parts_of_keys_and_values() -> None:
    """Of what arrives, the part before the last is read by nobody when the next one is launched."""
    step, _ = in_ring(0, 4)
    position = step.positions()
    spans = []
    for wait in step.calls(c10d.wait):
        readers = [position[user] for user in wait.users if user.target is not c10d.shift]
        passed_on = [position[next(iter(user.users))] for user in wait.users if user.target is c10d.shift]
        spans.append((position[wait.args[0]], max([*readers, *passed_on])))  # type: ignore[index]
    assert len(spans) == 6
    held = [sum(begin <= at <= end for begin, end in spans) for at in range(len(position))]
    assert max(held) <= 4 + 2, "two of keys and two of values, and at a wait those that are let go"


def test_a_gradient_of_another_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_attention, "_sums", lambda local, found, travelling: found)
    call = calls(causal=False)[1]
    (way,) = by_tokens(call, 2, "ring")
    assert fault_of(call, way, 2) is not None


def test_nodes_of_a_ring_have_no_placements_of_other_ranks_parts() -> None:
    step, _ = in_ring(1, 4)
    arrived: list[fx.Node] = step.calls(c10d.wait)
    assert not any("placements" in node.meta for node in arrived)
