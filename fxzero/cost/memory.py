"""Memory of a step on one rank: what is alive at each node, from the graph alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import CARRIED_KINDS, STATE_KINDS, num_bytes
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
    """Follow the memory of a program to its peak; see `memory_timeline`."""
    state = sum(num_bytes(n.meta["val"]) for n in step.placeholders if not _is_handed_over(n))
    peak, peak_node, at_peak = state, step.placeholders[0], {}
    for node, total, alive in memory_timeline(step):
        if state + total > peak:
            peak, peak_node, at_peak = state + total, node, dict(alive)
    largest = sorted(((n.name, size) for n, size in at_peak.items()), key=lambda item: -item[1])
    return MemoryProfile(state, peak, peak_node, tuple(largest))


def memory_timeline(step: StepGraph) -> Iterator[tuple[fx.Node, int, Mapping[fx.Node, int]]]:
    """For each call, in order: it, the bytes alive beside the state while it runs, and the node that made each.

    The program frees each tensor at its last use, and updates in place. A collective's input stays alive until its
    wait. Gradients that an earlier microbatch hands over die like any other value; what the step returns stays.
    Workspace inside ops is not counted. The mapping is one and the same object, changed from call to call.
    """
    storage = InPlace(step)
    position = storage.position
    ends: dict[int, list[fx.Node]] = {}
    sizes: dict[fx.Node, int] = {}
    returned = {storage.storage[node] for (kind, _), node in step.results.items() if kind not in STATE_KINDS}
    for root, members in storage.members.items():
        if root.op != "call_function" and not _is_handed_over(root):
            continue
        sizes[root] = num_bytes(root.meta.get("val")) * _parts_received(root, step.mesh)
        readers = [u for member in members for u in member.users]
        waits = [w for u in readers if c10d.is_collective(u) for w in _waits(u)]
        last = max(position[n] for n in (*readers, *waits, *members) if n.op != "output" or root in returned)
        ends.setdefault(last, []).append(root)
    alive: dict[fx.Node, int] = {}
    total = 0
    for index, node in enumerate(step.graph.nodes):
        if node in sizes:
            alive[node] = sizes[node]
            total += sizes[node]
        if node.op == "call_function":
            yield node, total, alive
        for dead in ends.get(index, ()):
            total -= alive.pop(dead)


def _is_handed_over(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["entry"].kind in CARRIED_KINDS


def _parts_received(node: fx.Node, mesh: dict[str, int]) -> int:
    """A reduce-scatter by messages receives the rows of every peer before it sums them."""
    by_messages = node.meta.get("algorithm") == "send_recv" and node.target is c10d.reduce_scatter
    return mesh[c10d.axis_of(node)] if by_messages else 1


def _waits(launch: fx.Node) -> list[fx.Node]:
    return [w for u in launch.users for w in (u, *u.users) if c10d.is_wait(w)]
