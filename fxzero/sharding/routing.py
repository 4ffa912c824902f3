"""Rows that are sorted by expert: which values have them, and how a call is made on those of a rank's own experts.

[Note: routed values]
A grouped product takes rows along a dim of one of its tensors, and `ends`, which says where each expert's rows end.
From there the rows are followed: where ranks that hold equal parts of a dim could make a call by themselves (S(d) in,
S(e) out), each row of what it yields is made of the same row of what it takes, so a rank can make it on the rows of
its experts as well. All that is reached from products with one `ends` is routed by that, and may lie E over the axis;
what is reached from two may not. Such rows begin where what the sort yields is read: the rows of experts of its
indices pick the tokens.
`ends` stands in the graph behind the sort, and maybe behind the first calls on what is sorted. What it is computed
from is moved before these, so that it is there where rows are taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, routed, shard
from fxzero.graph.routing_ops import keep_rows
from fxzero.graph.step_graph import ancestors, is_getitem, yields_tensor
from fxzero.sharding.strategy import Local, Strategy
from fxzero.sharding.taken import tensors_taken

aten = torch.ops.aten

# one of the dims of a value
Rows = tuple[fx.Node, int]
Ways = Callable[[fx.Node], tuple[Strategy, ...]]

_FALLBACK = "transformers::grouped_mm_fallback"
_ZEROS = (aten.new_zeros.default, aten.zeros_like.default, aten.zeros.default)
_GROUPED = (_FALLBACK, f"{_FALLBACK}_backward", "aten::_grouped_mm")


@dataclasses.dataclass(frozen=True)
class Routing:
    """The routed values of a step.

    Args:
        ranks: of the axis.
        ends: rows -> the node of where their experts' rows end.
        number: node of ends -> how many rows they are of.
        factor: a rank has room for so many times the rows that it would have if all experts had as many; 0: for all.
    """

    ranks: int = 1
    ends: dict[Rows, fx.Node] = dataclasses.field(default_factory=dict)
    number: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    factor: float = 0.0

    @classmethod
    def of(cls, step: StepGraph, ways: Ways, *, ranks: int, factor: float = 0.0) -> Routing:
        """What is routed in a step; what `ends` are computed from is moved to where they are needed.

        Args:
            step: as captured, whole on every rank of the axis.
            ways: of a call over the axis, without those on rows of experts.
            ranks: of the axis, which divide the experts.
            factor: as of `Routing`.
        """
        reached: dict[Rows, set[fx.Node]] = {}
        for node in step.calls():
            for rows, ends in _grouped_rows(node):
                _follow(rows, ends, ways, reached)
        found = {rows: next(iter(all_ends)) for rows, all_ends in reached.items() if len(all_ends) == 1}
        number = {ends: rows[0].meta["val"].shape[rows[1]] for rows, ends in found.items()}
        _hoist(step, found, set(number))
        return cls(ranks, found, number, factor)

    def key(self, node: fx.Node) -> Hashable:
        """What the ways of a call depend on beside the call itself.

        That is which of its tensors are routed, alike or not, and whether it adds to zeros.
        """
        all_ends = list(dict.fromkeys(self.number))
        tensors = [*tensors_taken(node), *(source for source in _yielded(node) if source is not None)]
        dims = [[self.ends.get((tensor, dim)) for dim in range(tensor.meta["val"].dim())] for tensor in tensors]
        known = [ends for of_tensor in dims for ends in of_tensor if ends is not None]
        first = {ends: known.index(ends) for ends in all_ends if ends in known}
        routed = tuple(tuple(first.get(ends, -1) if ends else -1 for ends in of_tensor) for of_tensor in dims)
        return routed, adds_to_zeros(node)

    def ends_of(self, node: fx.Node, before: Placement, after: Placement) -> fx.Node | None:
        """What a conversion of a value from or to rows of experts needs to know: where they end."""
        lies = before if before.is_routed else after
        if node in self.number and lies.is_routed:
            return node
        return self.ends.get((node, lies.dim)) if lies.is_routed else None

    def room(self, rows: int) -> int:
        """For how many of so many rows a rank has room."""
        return min(rows, math.ceil(self.factor * rows / self.ranks)) if self.factor else rows

    def pair_room(self, rows: int) -> int:
        """For how many of so many rows there is room from one rank to another; 0 where there is room for all."""
        return math.ceil(self.factor * rows / self.ranks**2) if 0 < self.factor < self.ranks else 0

    def ways(self, node: fx.Node, plain: Sequence[Strategy]) -> tuple[Strategy, ...]:
        """All ways of a call; a product of experts is made by the ranks that have them, and in no other way.

        Args:
            node: the call.
            plain: its ways on parts of other kinds than rows of experts.
        """
        if grouped := tuple(self._grouped(node)):
            return grouped
        on_rows = filter(None, (self._on_rows(node, strategy) for strategy in plain))
        return (*plain, *self._adding_up(node), *on_rows)

    def lies(self, tensor: fx.Node, dim: int) -> Placement:
        """How a tensor lies whose rows along a dim are those of a rank's experts."""
        rows = tensor.meta["val"].shape[dim]
        return routed(dim, room=self.room(rows), rows=rows)

    def _on_rows(self, node: fx.Node, strategy: Strategy) -> Strategy | None:
        """A way on parts of rows, on those of experts; None where it has none, or they are not routed alike."""
        rows = [*_rows_of(node, strategy)]
        all_ends = {self.ends.get(each) for each in rows}
        if not rows or len(all_ends) != 1 or None in all_ends:
            return None
        taken = zip(tensors_taken(node), strategy.inputs, strict=True)
        yielded = zip(_yielded(node), strategy.outputs, strict=True)
        inputs = tuple(self.lies(tensor, lies.dim) if lies.is_shard else lies for tensor, lies in taken)
        outputs = tuple(self.lies(t, lies.dim) if t and lies and lies.is_shard else lies for t, lies in yielded)
        size = rows[0][0].meta["val"].shape[rows[0][1]]
        return Strategy(inputs, outputs, share=self.room(size) / size)

    def _grouped(self, node: fx.Node) -> Iterator[Strategy]:
        """Each rank multiplies the rows of its experts by their matrices."""
        grouped = dict(_grouped_rows(node))
        if not grouped or any(self.ends.get(rows) is not ends for rows, ends in grouped.items()):
            return
        ends = next(iter(grouped.values()))
        experts = ends.meta["val"].shape[0]
        if experts % self.ranks:
            return
        of_rows = {tensor: self.lies(tensor, dim) for tensor, dim in grouped}
        of_ends = routed(0, room=experts // self.ranks, rows=experts)

        def lies(tensor: fx.Node | None) -> Placement:
            if tensor is ends:
                return of_ends
            return of_rows[tensor] if tensor in of_rows else shard(0)  # type: ignore[index]

        inputs, outputs = tuple(map(lies, tensors_taken(node))), tuple(map(lies, _yielded(node)))
        yield Strategy(inputs, outputs, share=1 / self.ranks)

    def _adding_up(self, node: fx.Node) -> Iterator[Strategy]:
        """Each rank adds the rows of its experts at their places: what all add up to is the value."""
        if not _adds(node):
            return
        indices: Any = node.args[1]
        values: Any = node.args[2]
        if len(indices) != 1 or indices[0].meta["val"].dim() != 1:
            return
        ends = self.ends.get((indices[0], 0))
        if ends is None or self.ends.get((values, 0)) is not ends:
            return
        index, rows = self.lies(indices[0], 0), self.lies(values, 0)
        yield Strategy((partial(), index, rows), (partial(),), form=_adds_own_rows, share=rows.share(self.ranks))


NOTHING_ROUTED = Routing()


def adds_to_zeros(node: fx.Node) -> bool:
    """Whether a call is an `index_put` that adds rows to zeros."""
    return _adds(node) and isinstance(node.args[0], fx.Node) and node.args[0].target in _ZEROS


def _adds(node: fx.Node) -> bool:
    return node.target is aten.index_put.default and len(node.args) == 4 and bool(node.args[3])


def _adds_own_rows(local: Local) -> tuple[fx.Node | None, ...]:
    """The form of an `index_put` that adds up: what is behind a rank's own rows is zero."""
    into, indices, values, _ = local.args
    ends = local.ends(local.node.args[2])  # type: ignore[arg-type]
    own = local.editor.call(keep_rows, values, ends, 0, local.call.ranks, local.coordinate())
    return (local.editor.call(local.call.target, into, indices, own, True),)


def _grouped_rows(node: fx.Node) -> Iterator[tuple[Rows, fx.Node]]:
    """The rows that a grouped product takes and yields, with their ends."""
    target: Any = node.target
    if not compat.is_op(target) or target.name() not in _GROUPED:
        return
    args: list[Any] = [*node.args, *([None] * 4)][:4]
    ends = node.kwargs.get("offs", args[2])
    dims = [arg.meta["val"].dim() for arg in args[:2]]
    beside = [other for name, other in node.kwargs.items() if name != "offs" and isinstance(other, fx.Node)]
    if not isinstance(ends, fx.Node) or beside or dims not in ([2, 3], [2, 2]):
        return
    if dims == [2, 2]:  # matrices, added up over the rows of each expert
        rows = [(args[0], 1), (args[1], 0)]
    elif target.name().endswith("_backward"):
        rows = [(args[0], 0), (args[3], 0), *((part, 0) for part in _yielded(node)[:1])]
    else:
        rows = [(args[0], 0), (node, 0)]
    yield from ((each, ends) for each in rows if each[0] is not None)


def _follow(start: Rows, ends: fx.Node, ways: Ways, reached: dict[Rows, set[fx.Node]]) -> None:
    """Note all rows that are made of some, or that they are made of."""
    waiting = [start]
    while waiting:
        rows = waiting.pop()
        if ends in reached.setdefault(rows, set()):
            continue
        reached[rows].add(ends)
        for call in _calls_around(rows[0]):
            for strategy in ways(call):
                others = [*_rows_of(call, strategy)]
                waiting += others if rows in others else []


def _calls_around(tensor: fx.Node) -> Iterator[fx.Node]:
    """The call that yields a tensor, if it takes any, and those that read it."""
    maker = tensor.args[0] if is_getitem(tensor) else tensor
    if isinstance(maker, fx.Node) and maker.op == "call_function" and maker.all_input_nodes:
        yield maker
    if tensor.op == "call_function":  # other inputs, such as constants, belong to no routing
        yield from (user for user in tensor.users if user.op == "call_function" and not is_getitem(user))


def _rows_of(node: fx.Node, strategy: Strategy) -> Iterator[Rows]:
    """The rows that a call's way splits, where it makes each row of the same row; none where it does not."""
    placed = [
        *zip(tensors_taken(node), strategy.inputs, strict=True),
        *zip(_yielded(node), strategy.outputs, strict=True),
    ]
    split = [(tensor, lies.dim) for tensor, lies in placed if tensor is not None and lies is not None and lies.is_shard]
    plain = all(lies is None or lies == REPLICATED or (lies.is_shard and lies.blocks == 1) for _, lies in placed)
    sizes = {tensor.meta["val"].shape[dim] for tensor, dim in split}
    if strategy.form is None and not strategy.messages and plain and len(sizes) == 1:
        yield from split


def _yielded(node: fx.Node) -> list[fx.Node | None]:
    """The nodes that stand for what a call yields, one for each output; None for what nobody reads."""
    if yields_tensor(node):
        return [node]
    val = node.meta["val"]
    picked = {user.args[1]: user for user in node.users if is_getitem(user)}
    return [picked.get(index) for index in range(len(val))] if isinstance(val, (list, tuple)) else [None]


def _hoist(step: StepGraph, found: dict[Rows, fx.Node], all_ends: set[fx.Node]) -> None:
    """Let ends stand before the first call that takes or yields rows of theirs and is not needed for them."""
    for ends in [node for node in step.graph.nodes if node in all_ends]:
        position = {node: index for index, node in enumerate(step.graph.nodes)}
        needed = ancestors([ends])
        of_ends = [node for (node, _), other in found.items() if other is ends]
        calls = {call for node in of_ends for call in (node, *node.users) if call.op == "call_function"}
        first = min((call for call in calls - needed if not is_getitem(call)), key=lambda node: position[node])
        for node in [node for node in step.calls() if node in needed and position[node] > position[first]]:
            first.prepend(node)
