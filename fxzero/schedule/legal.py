"""What may not be turned around: the order that every schedule of a step keeps.

Beside what a call reads, there comes first
- for the release of a gathered tensor: all its readers, through views;
- for the next gather of a parameter: the release of the one before;
- for a call that writes over its input, and for the next value of state: all that still read the old value, of a move
  or a collective its wait;
- for an update, or a gradient that goes out: the check whether rows of experts had room;
- for a random call, one with an effect, or one at which the host waits for the device: the one before it of its kind.

Collectives may change places, those of one process group too: ranks agree on the text of the program, and so on theirs.
The verifier's rules structure, release, swaps, random and order reject a graph in which any of this is turned around
(the second reader of memory that is written over only costs a copy).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxzero.cost.lifetimes import waits_of
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.edit import keeps_effect
from fxzero.graph.order_rules import Pair, required_order
from fxzero.graph.randomness import is_random
from fxzero.graph.routing_ops import check_room
from fxzero.graph.step_graph import first_argument, iter_views
from fxzero.graph.storage import InPlace
from fxzero.graph.synchronisation import synchronisations


def kept_order(step: StepGraph, in_place: InPlace) -> Iterator[Pair]:
    """(earlier, later) for all pairs of calls that keep their order, beside what calls read.

    Args:
        step: the graph, in an order that is legal.
        in_place: where it writes over its inputs.
    """
    yield from _chain(node for node in step.calls() if is_random(node))
    yield from _chain(node for node in step.calls() if keeps_effect(node) and not c10d.is_release(node))
    waiting = synchronisations(step)
    yield from _chain(node for node in step.calls() if node.name in waiting)
    for release in filter(c10d.is_release, step.calls()):
        for value in release.all_input_nodes:
            yield from ((reader, release) for reader in _readers_to_release(value) if reader is not release)
    updates = [node for node in step.calls() if node.meta["phase"] == "update"]
    yield from ((check, node) for check in step.calls(check_room) for node in updates)
    position = in_place.position
    pairs = [*required_order(step)]
    pairs += [(reader, node) for node, readers in in_place.written_after.items() for reader in readers]
    for earlier, later in pairs:
        for first in (earlier, *(waits_of(earlier) if c10d.is_collective(earlier) else ())):
            if position[first] < position[later]:
                yield first, later


def _readers_to_release(value: fx.Node) -> Iterator[fx.Node]:
    """The calls that read a gathered tensor, from the wait of its gather on."""
    root = first_argument(value) if value.target is torch.ops.aten.slice.Tensor else value
    for alias in (root, *iter_views(root)):
        yield from (reader for reader in alias.users if reader.op == "call_function")


def _chain(nodes: Iterator[fx.Node]) -> Iterator[Pair]:
    before: fx.Node | None = None
    for node in nodes:
        if before is not None:
            yield before, node
        before = node
