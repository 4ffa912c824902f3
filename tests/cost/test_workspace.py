"""Memory that calls take beside their outputs, against what the CPU's allocator saw (torch 2.13, one thread)."""

from __future__ import annotations

import pytest
import torch

from fxzero.cost.workspace import transport_bytes, workspace_bytes
from fxzero.graph import collectives as c10d
from tests.sharding.further_calls import made

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# queries, keys, width of a head -> bytes in forward and in backward, by tests/benchmarks/memory_counter.cpp
SEEN = {
    (128, 128, 12): (18_200, 32_936),
    (128, 512, 12): (67_352, 131_240),
    (512, 512, 12): (134_744, 262_504),
    (1024, 1024, 64): (591_896, 1_049_640),
}


@pytest.mark.parametrize("sizes", SEEN, ids=str)
def test_attention_has_blocks_of_scores(sizes: tuple[int, int, int]) -> None:
    queries, keys, width = sizes
    q, slope = torch.randn(2, 1, 4, queries, width)
    k, v = torch.randn(2, 1, 2, keys, width)
    output, weight = FORWARD(q, k, v)
    calls = (made(FORWARD, q, k, v, 0.0, False), made(BACKWARD, slope, q, k, v, output, weight, 0.0, False))
    found = [workspace_bytes(call.node, device="cpu") for call in calls]
    assert found == pytest.approx(SEEN[sizes], rel=0.01)
    assert workspace_bytes(calls[0].node, device="cuda") == 0


@pytest.mark.parametrize(
    ("target", "args", "beside"),
    [
        (c10d.all_gather, (4, "dp"), 4 * 32),  # a flat buffer of all
        (c10d.reduce_scatter, ("sum", 4, "dp"), 32),  # a copy of what it is given
        (c10d.all_reduce, ("sum", "dp"), 0),
        (c10d.all_to_all, ([2] * 4, [2] * 4, "dp"), 0),
        (c10d.shift, (1, 4, 0, "dp"), 0),
    ],
    ids=["gather", "scatter", "sum", "exchange", "shift"],
)
def test_gloo_gathers_into_and_scatters_from_a_copy(target: object, args: tuple[object, ...], beside: int) -> None:
    graph = torch.fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(8, device="meta")
    node = graph.call_function(target, (source, *args))  # type: ignore[arg-type]
    node.meta["val"] = torch.empty({c10d.all_gather: 32, c10d.reduce_scatter: 2}.get(target, 8), device="meta")
    assert transport_bytes(node, device="cpu", by_messages=False) == beside
    assert transport_bytes(node, device="cpu", by_messages=True) == 0
    assert transport_bytes(node, device="cuda", by_messages=False) == 0
