"""How a value lies over the ranks of one mesh axis, as DTensor's placements say it.

[Note: placements]
`meta["placements"]` maps the name of a mesh axis to how the value of a node lies over its ranks; an axis that is not
there has the whole value on each rank. Of a node that yields several values it maps to a tuple, one for each of them.
`meta["val"]` is what one rank holds. ZeRO's rows (`meta["sharding"]`) are rows of that: shards of shards.

    R           every rank has the value
    S(d)        rank i has the i-th of equal parts along dim d
    S(d, k)     dim d is k blocks, one after the other, and rank i has the i-th part of each: what becomes of S(1) when
                the first two dims of a tensor [k, n, ..] are flattened
    P(sum)      each rank has a tensor of the value's shape; the value is their sum (or max, or 2-norm: these two are
                of norms, which are not negative)
    E(d, m of n)
                the n rows along dim d are sorted by expert, and rank i has those of the i-th part of the experts at
                the front of a buffer of m; what is behind them means nothing ([Note: rows of experts] in
                graph/routing_ops.py)

Where two axes split one dim, the one that comes first in the mesh splits it first; of what is no state, sp does
([Note: one axis after another] in sharding/other_axes.py). ZeRO's rows are split last of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

# the axes over which a pass splits values; over others, ranks have values of their own, or rows by ZeRO
SPLIT_AXES = ("tp", "sp", "ep")
# those of them that split state, in the order in which they do
STATE_AXES = ("ep", "tp")


@dataclass(frozen=True)
class Placement:
    """How a value lies over the ranks of one mesh axis; see [Note: placements].

    Args:
        kind: "R", "S", "P" or "E".
        dim: of a shard, the dim that is split; of rows of experts, theirs.
        blocks: of a shard, so many blocks of the dim are split each by itself.
        reduction: of partial values, "sum", "max" or "norm2": what makes the value of them.
        rows, room: of rows of experts, how many there are, and for how many a rank has room.
    """

    kind: str
    dim: int = 0
    blocks: int = 1
    reduction: str = ""
    rows: int = 0
    room: int = 0

    @property
    def is_shard(self) -> bool:
        """Whether ranks hold parts of a dim."""
        return self.kind == "S"

    @property
    def is_partial(self) -> bool:
        """Whether the value has still to be made of what ranks hold."""
        return self.kind == "P"

    @property
    def is_routed(self) -> bool:
        """Whether ranks hold the rows of their experts."""
        return self.kind == "E"

    def share(self, ranks: int) -> float:
        """The part of a value that each of so many ranks holds."""
        return self.room / self.rows if self.is_routed else 1 / ranks if self.is_shard else 1.0

    def __str__(self) -> str:
        if self.is_routed:
            return f"E({self.dim}, {self.room} of {self.rows})"
        if self.kind == "S":
            return f"S({self.dim})" if self.blocks == 1 else f"S({self.dim}, {self.blocks})"
        return self.kind if self.kind == "R" else f"P({self.reduction})"

    @classmethod
    def parse(cls, text: str) -> Placement:
        """The placement that a text means.

        Raises:
            ValueError: if it means none.
        """
        if rows := re.fullmatch(r"E\((\d+), (\d+) of (\d+)\)", text):
            return routed(int(rows[1]), room=int(rows[2]), rows=int(rows[3]))
        found = re.fullmatch(r"R|S\((\d+)(?:, (\d+))?\)|P\((sum|max|norm2)\)", text)
        if found is None:
            raise ValueError(f"{text!r} is no placement: R, S(0), S(0, 2), P(sum), P(max), P(norm2) or E(0, 8 of 16)")
        if text == "R":
            return REPLICATED
        return partial(found[3]) if found[3] else shard(int(found[1]), int(found[2] or 1))


REPLICATED = Placement("R")


def shard(dim: int, blocks: int = 1) -> Placement:
    """Parts of a dim, or of each of its blocks."""
    return Placement("S", dim=dim, blocks=blocks)


def partial(reduction: str = "sum") -> Placement:
    """What is still to be reduced."""
    return Placement("P", reduction=reduction)


def routed(dim: int, *, room: int, rows: int) -> Placement:
    """The rows of a rank's experts."""
    return Placement("E", dim=dim, rows=rows, room=room)


def placement_of(node: fx.Node, axis: str) -> Placement:
    """How the value of a node lies over an axis."""
    found: Placement = node.meta.get("placements", {}).get(axis, REPLICATED)
    return found


def divides(shape: Sequence[int], placement: Placement, ranks: int) -> bool:
    """Whether a tensor of this shape can lie so, in equal parts."""
    if placement.is_routed:
        return placement.dim < len(shape) and shape[placement.dim] == placement.rows
    if not placement.is_shard:
        return True
    return placement.dim < len(shape) and shape[placement.dim] % (placement.blocks * ranks) == 0


def local_shape(shape: Iterable[int], placement: Placement, ranks: int) -> tuple[int, ...]:
    """What one rank holds of a tensor.

    Args:
        shape: of the whole.
        placement: over the axis; it divides the shape.
        ranks: of the axis.
    """
    sizes = list(shape)
    if placement.is_shard:
        sizes[placement.dim] //= ranks
    if placement.is_routed:
        sizes[placement.dim] = placement.room
    return tuple(sizes)


def whole_shape(shape: Iterable[int], placements: Mapping[str, Any], mesh: Mapping[str, int]) -> tuple[int, ...]:
    """The single-device shape of what one rank holds a part of.

    Args:
        shape: of the part, without ZeRO's split of its rows.
        placements: axis -> how the value lies over it.
        mesh: axis -> size.
    """
    sizes = list(shape)
    for axis, placement in placements.items():
        if isinstance(placement, Placement) and placement.is_shard:
            sizes[placement.dim] *= mesh[axis]
    for placement in placements.values():
        if isinstance(placement, Placement) and placement.is_routed:
            sizes[placement.dim] = placement.rows
    return tuple(sizes)
