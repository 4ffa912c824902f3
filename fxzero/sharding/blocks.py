"""Which calls are asked how they run on shards of several blocks, and of how many.

[Note: blocks that are tried]
A rule that lets a dim be split lets it be split in blocks: S(d, k) over n ranks is S(d) over n * k, of which each rank
has k parts one after the other and makes them by one call. So every dim could be tried with every number of blocks. Of
use are few. They begin
    where a view joins the first dim, a batch's rows, with the next: S(1) of [k, n, ..] is S(0, k) of [k * n, ..]
    where a dim is joined of pieces or cut into them: S(d) of each of k is S(d, k) of the whole
and are followed from value to value through the ways of calls, as long as there are no more blocks than before (or
every view of heads would ask for as many). Pieces are of use where that leads to a matrix that is a parameter: a
product of several at once, [H, 3H]. The halves of a head that a rotary embedding swaps lead nowhere.
A parameter rests in one block, so it is converted where it is read, and its gradient where it is made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import Placement, shard
from fxzero.sharding.joined import pieces_of
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Call, Strategy
from fxzero.sharding.taken import Yielded, is_alias, tensors_taken, value_taken
from fxzero.sharding.views import joined_rows

_MOST_PIECES = 16  # of a dim; an image's patches behind the token of its class are no fused product

_Slot = int  # number of a tensor that a call takes; ~number of one that it yields
_Lies = tuple[Yielded, Placement]


class Blocks:
    """The shards of several blocks that values of a step are tried as; see [Note: blocks that are tried].

    Args:
        step: as captured.
        rules: of the axis.
    """

    def __init__(self, step: StepGraph, rules: Rules) -> None:
        self.rules = rules
        self._tried: dict[Yielded, set[Placement]] = {}
        self._readers: dict[Yielded, list[tuple[fx.Node, _Slot]]] = {}
        self._starts: dict[Hashable, tuple[list[tuple[_Slot, Placement]], bool]] = {}
        self._linked: dict[Hashable, list[tuple[_Slot, Placement]]] = {}
        calls = [node for node in step.calls() if node.meta["phase"] != "update" and not is_alias(node)]
        for node in calls:
            for slot, source in enumerate(tensors_taken(node)):
                self._readers.setdefault(value_taken(source), []).append((node, slot))
        in_vain: set[_Lies] = set()
        for node in calls:
            self._try_from(node, in_vain)

    def ways(self, node: fx.Node) -> tuple[Strategy, ...]:
        """The ways of a call: those of one block, and those that take and yield what is tried."""
        plain = self.rules.of(node)
        if node.meta["phase"] == "update":
            return plain
        tried = {(slot, lies) for slot, value in _slots(node).items() for lies in self._tried.get(value, ())}
        if not tried:
            return plain
        numbers = sorted({lies.blocks for _, lies in tried})
        known = {(way.inputs, way.outputs) for way in plain}
        more = [way for way in self.rules.of(node, (1, *numbers)) if (way.inputs, way.outputs) not in known]
        return (*plain, *(way for way in more if tried.issuperset(_in_blocks(way))))

    def _try_from(self, node: fx.Node, in_vain: set[_Lies]) -> None:
        key = self.rules.signature(node)
        if key not in self._starts:
            self._starts[key] = _starts(Call.of(node, self.rules.ranks))
        starts, always = self._starts[key]
        slots = _slots(node) if starts else {}
        for slot, lies in starts:
            value = slots[slot]
            if lies in self._tried.get(value, ()) or (value, lies) in in_vain:
                continue
            reached = self._reached((value, lies))
            if not always and not any(_is_matrix_of_model(source) for (source, _), _ in reached):
                in_vain |= reached
                continue
            for found, placement in reached:
                self._tried.setdefault(found, set()).add(placement)

    def _reached(self, start: _Lies) -> set[_Lies]:
        """What a shard of blocks leads to, from value to value."""
        found, waiting = {start}, [start]
        while waiting:
            (source, output), lies = waiting.pop()
            if source.op == "placeholder":
                continue  # it is converted for each of its readers
            for node, slot in [(source, ~output), *self._readers.get((source, output), ())]:
                slots = _slots(node)
                new = {(slots[other], placement) for other, placement in self._links(node, slot, lies)} - found
                found |= new
                waiting += new
        return found

    def _links(self, node: fx.Node, slot: _Slot, lies: Placement) -> list[tuple[_Slot, Placement]]:
        """What others of a call's tensors lie as in the ways in which one lies so."""
        key = (self.rules.signature(node), slot, lies)
        if key not in self._linked:
            ways = [list(_in_blocks(way)) for way in self.rules.of(node, (1, lies.blocks))]
            linked = {other for way in ways if (slot, lies) in way for other in way}
            self._linked[key] = [other for other in linked if other[1].blocks <= lies.blocks]
        return self._linked[key]


def _starts(call: Call) -> tuple[list[tuple[_Slot, Placement]], bool]:
    """(what is tried because of this call, whether it is wherever that leads)."""
    rows = list(joined_rows(call))
    if rows:
        return rows, True
    cut = pieces_of(call)
    if cut is None:
        return [], False
    joins, dim, sizes = cut
    unit, total = math.gcd(*sizes), sum(sizes)
    fused = unit > 0 and 1 < total // unit <= _MOST_PIECES
    return ([(~0 if joins else 0, shard(dim, total // unit))] if fused else []), False


def _slots(node: fx.Node) -> dict[_Slot, Yielded]:
    taken = {slot: value_taken(source) for slot, source in enumerate(tensors_taken(node))}
    val = node.meta["val"]
    return taken | {~output: (node, output) for output in range(len(val) if isinstance(val, (list, tuple)) else 1)}


def _in_blocks(way: Strategy) -> Iterator[tuple[_Slot, Placement]]:
    """The tensors of a way that lie in several blocks."""
    for slot, lies in [*enumerate(way.inputs), *((~output, lies) for output, lies in enumerate(way.outputs))]:
        if lies is not None and lies.blocks > 1:
            yield slot, lies


def _is_matrix_of_model(node: fx.Node) -> bool:
    is_parameter = node.op == "placeholder" and node.meta["entry"].kind == "parameter"
    return is_parameter and node.meta["val"].dim() > 1
