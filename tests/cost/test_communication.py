"""Seconds of collectives: algorithms, sizes, and axes laid over nodes; each figure worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

import fxzero.cost.communication as module
from fxzero.cost.communication import Layout, collective_seconds, launch_seconds, layout_of, wait_seconds
from fxzero.cost.hardware import CollectiveRate, Hardware, Link
from fxzero.graph import collectives as c10d

# no latency; a byte a second in a node, a tenth of it between nodes
SLOW = Hardware(
    "slow",
    {torch.float32: 1.0},
    1e9,
    1.0,
    1.0,
    1.0,
    0.0,
    ranks_per_node=4,
    node_link=Link(0, 1),
    network_link=Link(0, 0.1),
)
LATENT = replace(SLOW, node_link=Link(1.0, 1e18), network_link=Link(10.0, 1e18))


def launched(target: Any, elements: int, ranks: int, *, algorithm: str | None = None) -> tuple[fx.Node, fx.Node]:
    """(launch, wait) of a collective over axis dp of a tensor that is whole in its larger end."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    gathers = target is c10d.all_gather
    rows = torch.empty(elements // ranks if gathers else elements, device="meta")
    source.meta["val"] = rows
    if gathers:
        args: tuple[Any, ...] = (source, ranks, "dp")
    elif target is c10d.reduce_scatter:
        args = (source, "avg", ranks, "dp")
    elif target is c10d.all_to_all:
        args = (source, [1] * ranks, [1] * ranks, "dp")
    elif target is c10d.shift:
        args = (source, 1, ranks, 0, "dp")
    else:
        args = (source, "sum", "dp")
    node = graph.call_function(target, args)
    made = {c10d.all_gather: elements, c10d.reduce_scatter: elements // ranks}.get(target, elements)
    node.meta["val"] = torch.empty(made, device="meta")
    if algorithm:
        node.meta["algorithm"] = algorithm
    wait = graph.call_function(c10d.wait, (node,))
    wait.meta["val"] = node.meta["val"]
    return node, wait


def seconds(target: Any, elements: int, mesh: dict[str, int], hardware: Hardware, **how: Any) -> float:
    return collective_seconds(launched(target, elements, mesh["dp"], **how)[0], mesh, hardware)


@pytest.mark.parametrize(
    ("axis", "mesh", "expected"),
    [
        ("dp", {"dp": 2}, Layout(2, 2)),
        ("dp", {"dp": 16}, Layout(16, 8)),
        ("dp", {"dp_replicate": 4, "dp": 8}, Layout(8, 8)),
        ("dp_replicate", {"dp_replicate": 4, "dp": 8}, Layout(4, 1)),  # eight ranks apart: each on a node of its own
        ("dp", {"dp": 16, "tp": 4}, Layout(16, 2)),
        ("tp", {"dp": 16, "tp": 4}, Layout(4, 4)),
        ("dp_node", {"dp": 16, "dp_node": 8}, Layout(8, 8)),  # no axis of its own
        ("dp", {"dp": 16, "dp_node": 8}, Layout(16, 8)),
    ],
)
def test_an_axis_lies_over_nodes(axis: str, mesh: dict[str, int], expected: Layout) -> None:
    assert layout_of(axis, mesh, 8) == expected
    assert expected.nodes == expected.ranks // expected.within


def test_a_ring_in_a_node_moves_all_but_one_part() -> None:
    assert seconds(c10d.all_gather, 100, {"dp": 4}, SLOW) == 400 * 3 / 4
    assert seconds(c10d.reduce_scatter, 100, {"dp": 4}, SLOW) == 400 * 3 / 4
    assert seconds(c10d.all_reduce, 100, {"dp": 4}, SLOW) == 2 * 400 * 3 / 4
    assert seconds(c10d.all_to_all, 100, {"dp": 4}, SLOW) == 400 * 3 / 4


def test_between_nodes_each_rank_carries_a_part() -> None:
    # two nodes of four: half of 800 bytes goes between nodes, a quarter of it over each rank's part of the network
    assert seconds(c10d.all_gather, 200, {"dp": 8}, SLOW) == pytest.approx(max(800 * 7 / 8, 800 / 2 / 4 / 0.1))
    # messages carry each peer's rows by themselves: four of eight are on the other node
    assert seconds(c10d.all_gather, 200, {"dp": 8}, SLOW, algorithm="send_recv") == pytest.approx(800 * 4 / 8 / 0.1)
    one_node = replace(SLOW, ranks_per_node=8)  # the twin: where the nodes' size is not seen, these are the same
    assert seconds(c10d.all_gather, 200, {"dp": 8}, one_node) == 800 * 7 / 8


def test_steps_of_a_ring_wait_for_each_other_and_messages_do_not() -> None:
    assert seconds(c10d.all_gather, 8, {"dp": 8}, LATENT) == pytest.approx(6 * 1 + 1 * 10)
    assert seconds(c10d.all_to_all, 8, {"dp": 8}, LATENT) == pytest.approx(10)
    assert seconds(c10d.all_to_all, 8, {"dp": 4}, LATENT) == pytest.approx(1)


def test_a_shift_is_one_message_of_all_bytes() -> None:
    assert seconds(c10d.shift, 100, {"dp": 4}, SLOW) == 400
    assert seconds(c10d.shift, 100, {"dp": 8}, SLOW) == pytest.approx(400 / 0.1)  # one of four leaves its node
    assert seconds(c10d.shift, 8, {"dp": 4}, LATENT) == pytest.approx(1)
    assert seconds(c10d.shift, 8, {"dp": 8}, LATENT) == pytest.approx(10)
    assert c10d.wire_bytes(launched(c10d.shift, 100, 4)[0], {"dp": 4}) == 400


def test_a_shift_has_the_rate_of_an_exchange_that_sends_as_much() -> None:
    rate = CollectiveRate(7.0, (400.0, 800.0), (0.25, 0.5))
    hardware = replace(SLOW, collectives={"all_to_all": rate})
    assert seconds(c10d.shift, 100, {"dp": 2}, hardware) == 7 + 400 / 0.5
    assert seconds(c10d.all_to_all, 200, {"dp": 2}, hardware) == 7 + 400 / 0.5


def test_a_small_all_reduce_goes_by_a_tree_and_a_large_one_by_a_ring() -> None:
    hardware = replace(SLOW, node_link=Link(1.0, 1.0), ranks_per_node=16)
    assert seconds(c10d.all_reduce, 16, {"dp": 16}, hardware) == pytest.approx(2 * (4 + 64))
    assert seconds(c10d.all_reduce, 1600, {"dp": 16}, hardware) == pytest.approx(2 * (15 + 6400 * 15 / 16))


def test_rates_of_kinds_count() -> None:
    hardware = replace(SLOW, collectives={"all_gather": CollectiveRate(7.0, (1.0,), (0.5,))})
    assert seconds(c10d.all_gather, 100, {"dp": 4}, hardware) == 7 + 2 * 300
    assert seconds(c10d.all_reduce, 100, {"dp": 4}, hardware) == 600
    assert seconds(c10d.all_gather, 100, {"dp": 1}, hardware) == 7


def test_messages_copy_at_launch_and_sum_at_the_wait() -> None:
    gather, _ = launched(c10d.all_gather, 100, 2, algorithm="send_recv")
    assert launch_seconds(gather, SLOW) == 2 * 200  # reads and writes its own rows
    assert launch_seconds(launched(c10d.all_gather, 100, 2)[0], SLOW) == 0
    _, wait = launched(c10d.reduce_scatter, 100, 4, algorithm="send_recv")
    assert wait_seconds(wait, {"dp": 4}, SLOW) == 3 * (3 * 100) + 2 * 100  # three sums, and the mean
    assert wait_seconds(launched(c10d.reduce_scatter, 100, 4)[1], {"dp": 4}, SLOW) == 0


def test_new_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = replace(SLOW, fresh_bytes_s=2.0, fresh_above_bytes=400)
    assert seconds(c10d.all_gather, 100, {"dp": 4}, hardware) == 300 + 200
    assert seconds(c10d.all_gather, 80, {"dp": 4}, hardware) == 240
    monkeypatch.setattr(module, "fresh_seconds", lambda node, hardware: 0.0)
    assert seconds(c10d.all_gather, 100, {"dp": 4}, hardware) == 300
