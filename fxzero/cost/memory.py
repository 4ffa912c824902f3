"""Memory of a step on one rank: what is alive after each node, from the graph alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import num_bytes
from fxzero.graph.storage import InPlace


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of tensors on this rank.

    Args:
        state_bytes: parameters, buffers and optimizer state, as they rest between steps.
        peak_bytes: the most that is alive at any node, state included.
        peak_node: the node at which that is.
        alive: what is alive there beyond the state, largest first: (node name, bytes).
    """

    state_bytes: int
    peak_bytes: int
    peak_node: fx.Node
    alive: tuple[tuple[str, int], ...]


def memory_profile(step: StepGraph) -> MemoryProfile:
    """Follow the memory of a program that frees each tensor at its last use and updates in place.

    A collective's input stays alive until its wait. Workspace inside ops is not counted.
    """
    storage = InPlace(step)
    nodes = list(step.graph.nodes)
    position = storage.position
    state = sum(num_bytes(n.meta["val"]) for n in step.placeholders)
    ends: dict[int, list[fx.Node]] = {}
    sizes: dict[fx.Node, int] = {}
    for root, members in storage.members.items():
        if root.op != "call_function":
            continue
        sizes[root] = num_bytes(root.meta.get("val")) * (_parts_received(root, step.mesh))
        readers = [u for member in members for u in member.users]
        waits = [w for u in readers if c10d.is_collective(u) for w in _waits(u)]
        last = max((position[n] for n in (*readers, *waits, *members) if n.op != "output"), default=position[root])
        ends.setdefault(last, []).append(root)
    alive: set[fx.Node] = set()
    current = peak = state
    peak_node, at_peak = nodes[0], set()
    for index, node in enumerate(nodes):
        if node in sizes:
            alive.add(node)
            current += sizes[node]
        if current > peak:
            peak, peak_node, at_peak = current, node, set(alive)
        for dead in ends.get(index, ()):
            alive.discard(dead)
            current -= sizes[dead]
    largest = sorted(((n.name, sizes[n]) for n in at_peak), key=lambda item: -item[1])
    return MemoryProfile(state, peak, peak_node, tuple(largest))


def _parts_received(node: fx.Node, mesh: dict[str, int]) -> int:
    """A reduce-scatter by messages receives the rows of every peer before it sums them."""
    by_messages = node.meta.get("algorithm") == "send_recv" and node.target is c10d.reduce_scatter
    return mesh[c10d.axis_of(node)] if by_messages else 1


def _waits(launch: fx.Node) -> list[fx.Node]:
    return [w for u in launch.users for w in (u, *u.users) if c10d.is_wait(w)]
