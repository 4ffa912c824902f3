"""Seconds of a collective by itself: by algorithm, size, group, and where the ranks of its axis stand.

[Note: axes over nodes]
Ranks are numbered with the last mesh axis running fastest, and a node holds `ranks_per_node` neighbours. So the ranks
of an axis lie as far apart as the axes behind it have ranks, and as many of them share a node as fit at that distance.

[Note: algorithms]
S bytes of the whole tensor, n ranks on m nodes, w of them in each:
    ring        n - 1 steps (an all-reduce twice that); each link carries S (n - 1) / n. Between nodes the w ranks
                of a node each carry a part of what leaves it, by their own part of the network: S (m - 1) / m / w.
    tree        all-reduce only: 2 log2 n steps, 2 S bytes. Taken where it is faster: small messages.
    messages    all_to_all and send_recv: one message to each peer, all at once; no rank passes on what is another's.
    shift       one message of S bytes to one peer, all ranks at once. Where the axis spans nodes, some rank's goes
                between them, and those behind it wait; its overhead and rate are those of the all-to-all that
                carries it ([Note: shifts] in graph/shift_op.py), with as much to send.
    memory      shared_memory: nothing travels. The launch writes what is sent to memory that all ranks of a host map,
                and the wait reads what all have written; both hold the compute lane. shared_rows: what is gathered
                rests in such memory, and nothing is copied.
Parts within and between nodes overlap: the longer counts. The steps of a ring wait for each other, so latencies add.
Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009); Thakur et al., Optimization of collective
communication operations in MPICH (2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxzero.cost.compute import fresh_seconds
from fxzero.cost.hardware import CollectiveRate, Hardware
from fxzero.graph import collectives as c10d
from fxzero.graph.collectives import node_axis
from fxzero.graph.step_graph import num_bytes, tensor_val

_EXACT = CollectiveRate(0.0, (1.0,), (1.0,))


@dataclass(frozen=True)
class Layout:
    """Where the ranks of an axis stand.

    Args:
        ranks: of the axis.
        within: how many of them share a node.
    """

    ranks: int
    within: int

    @property
    def nodes(self) -> int:
        """Nodes that the axis spans."""
        return -(-self.ranks // self.within)


def layout_of(axis: str, mesh: Mapping[str, int], ranks_per_node: int) -> Layout:
    """How an axis lies over nodes; see [Note: axes over nodes].

    Args:
        axis: of the mesh, or the part of one within a node.
        mesh: axis -> size, outermost first.
        ranks_per_node: devices of a node.
    """
    parts = {node_axis(name) for name in mesh}
    behind = list(mesh)[list(mesh).index(axis) + 1 :]
    distance = math.prod(mesh[name] for name in behind if name not in parts)
    return Layout(mesh[axis], max(1, min(mesh[axis], ranks_per_node // distance)))


def algorithm_of(node: fx.Node) -> str:
    """How a collective is carried, as the file of a machine names it: "all_gather", .., or its carrier."""
    return str(c10d.carrier_of(node) or c10d.TABLE[node.target].name.removesuffix("_coalesced"))


def message_bytes(node: fx.Node) -> int:
    """Bytes of the whole tensor of a collective: what is gathered, or each rank has to reduce, or passes on."""
    return max(num_bytes([source.meta["val"] for source in c10d.sent(node)]), num_bytes(node.meta["val"]))


def collective_seconds(node: fx.Node, mesh: Mapping[str, int], hardware: Hardware) -> float:
    """Seconds from a launch to its end, when no other collective is under way.

    Args:
        node: the launch.
        mesh: of its graph.
        hardware: the machine.
    """
    layout = layout_of(c10d.axis_of(node), mesh, hardware.ranks_per_node)
    algorithm = algorithm_of(node)
    seconds = message_seconds(algorithm, message_bytes(node), layout, hardware)
    return seconds if algorithm == c10d.SHARED_ROWS else seconds + fresh_seconds(node, hardware)


def message_seconds(algorithm: str, size: float, layout: Layout, hardware: Hardware) -> float:
    """Seconds of one message, or of several that are launched as one coalesced collective.

    Args:
        algorithm: as `algorithm_of` names it.
        size: bytes of the whole tensor, or of all of them together.
        layout: of the ranks.
        hardware: the machine.
    """
    rate = hardware.collectives.get(algorithm, _EXACT)
    if layout.ranks == 1 or algorithm in c10d.IN_MEMORY:
        return rate.overhead_s
    if algorithm == "shift":
        return _shift_s(size, layout, hardware)
    efficiency = rate.part(size)
    if algorithm in ("all_to_all", "send_recv"):
        return rate.overhead_s + _messages_s(size, layout, hardware, efficiency)
    ring = _ring_s(size, layout, hardware, efficiency)
    if algorithm != "all_reduce":
        return rate.overhead_s + ring
    return rate.overhead_s + min(2 * ring, _tree_s(size, layout, hardware, efficiency))


def launch_seconds(node: fx.Node, hardware: Hardware) -> float:
    """Seconds for which launching a collective holds the compute lane.

    Where a machine does not say what handing over a message takes, point-to-point gathers copy their own rows.
    """
    carrier = c10d.carrier_of(node)
    if carrier == c10d.SHARED_ROWS:
        return hardware.launch_s
    if carrier == c10d.SHARED_MEMORY:
        return _copy_s(2 * num_bytes([source.meta["val"] for source in c10d.sent(node)]), hardware)
    if hardware.launch_bytes_s:
        return hardware.launch_s + message_bytes(node) / hardware.launch_bytes_s
    seconds = hardware.launch_s
    if carrier == c10d.SEND_RECV and node.target is c10d.all_gather:
        seconds += _copy_s(2 * num_bytes([source.meta["val"] for source in c10d.sent(node)]), hardware)
    return seconds


def wait_seconds(wait: fx.Node, mesh: Mapping[str, int], hardware: Hardware) -> float:
    """Seconds that a wait computes once all is there: to copy what others have written, and to sum what is theirs."""
    launch = c10d.launched_by(wait)
    carrier = c10d.carrier_of(launch)
    if carrier == c10d.SHARED_MEMORY and launch.target is not c10d.reduce_scatter:
        return _copy_s(2 * num_bytes(tensor_val(wait)), hardware)
    if carrier is None or launch.target is not c10d.reduce_scatter:
        return 0.0
    rows = num_bytes(tensor_val(wait))
    sums = mesh[c10d.axis_of(launch)] - 1
    return sums * _copy_s(3 * rows, hardware) + (_copy_s(2 * rows, hardware) if launch.args[1] == "avg" else 0.0)


def _ring_s(size: float, layout: Layout, hardware: Hardware, efficiency: float) -> float:
    """One way round: a gather, or a reduce-scatter."""
    n, m, w = layout.ranks, layout.nodes, layout.within
    latency_s = (n - m) * hardware.node_link.latency_s + (m - 1) * hardware.network_link.latency_s
    within_s = size * (n - 1) / n / hardware.node_link.bytes_s if w > 1 else 0.0
    between_s = size * (m - 1) / m / w / hardware.network_link.bytes_s if m > 1 else 0.0
    return latency_s + max(within_s, between_s) / efficiency


def _tree_s(size: float, layout: Layout, hardware: Hardware, efficiency: float) -> float:
    """Up to a root and down again."""
    m, w = layout.nodes, layout.within
    node, network = hardware.node_link, hardware.network_link
    steps_s = math.ceil(math.log2(w)) * node.latency_s + math.ceil(math.log2(m)) * network.latency_s
    within_s = size / node.bytes_s if w > 1 else 0.0
    between_s = size / w / network.bytes_s if m > 1 else 0.0
    return 2 * (steps_s + max(within_s, between_s) / efficiency)


def _messages_s(size: float, layout: Layout, hardware: Hardware, efficiency: float) -> float:
    """One message to each peer."""
    n, w = layout.ranks, layout.within
    network = hardware.network_link
    within_s = size * (w - 1) / n / hardware.node_link.bytes_s
    between_s = size * (n - w) / n / network.bytes_s
    latency_s = network.latency_s if layout.nodes > 1 else hardware.node_link.latency_s
    return latency_s + max(within_s, between_s) / efficiency


def _shift_s(size: float, layout: Layout, hardware: Hardware) -> float:
    """One message to one peer; `size` is what a rank sends."""
    rate = hardware.collectives.get("all_to_all", _EXACT)
    as_exchange = size * layout.ranks / (layout.ranks - 1)
    link = hardware.network_link if layout.nodes > 1 else hardware.node_link
    return rate.overhead_s + link.latency_s + size / link.bytes_s / rate.part(as_exchange)


def _copy_s(traffic: float, hardware: Hardware) -> float:
    rate = hardware.ops.get("pointwise")
    return rate.seconds(traffic) if rate else hardware.op_overhead_s + traffic / hardware.memory_bytes_s
