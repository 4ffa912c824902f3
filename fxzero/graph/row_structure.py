"""Which calls one kernel over rows [rows, columns] can hold together, and which part of a row each of their values is.

[Note: row structure]
The calls of a region regroup to one space of rows and columns, or broadcast into it. A value is a "full" of the space
(an element for each place), a "row" (one for each row), a "column" or a "scalar". The elements of each stand in the
order of its own dimensions, so a view that only regroups dimensions changes nothing. Where a shape leaves it open what
a value is (24 elements, of 24 x 24), the values that it is computed from decide, and a call that then does not fit
cannot join. What comes into the region has no such part: each call reads it where it needs it, with the strides that it
has after any views, broadcast or not.

Several spaces may fit a region (768 places as one row, or as 32 rows of 24); each is followed until one that holds all
calls is asked for. A row op allows one number of columns only. A pass asks that the last dimension of the largest shape
stays a possible row until then (`keeps_last`): a mask [7, 7] that is computed beside scores [4, 7, 7] would make rows
of 49 of them, and leave the softmax that comes next, of rows of 7, out of the region. Best is the space whose reads are
the fewest divisions of an index, then the one with the longest rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxzero.graph.row_ops import (
    EXPAND,
    MOST_COLUMNS,
    REGROUPING,
    is_row_call,
    num_columns,
    op_name,
    reads,
    reduced,
)
from fxzero.graph.step_graph import is_getitem, is_view, yields_tensor

FULL, ROW, COLUMN, SCALAR = "full", "row", "column", "scalar"

Shape = Sequence[int]


@dataclass(frozen=True)
class Space:
    """Rows and columns that a kernel goes over.

    Args:
        rows, columns: their numbers.
    """

    rows: int
    columns: int

    def part(self, *, rows: bool, columns: bool) -> str:
        """The name of a value that differs between rows, or between columns; one row or column says nothing."""
        by_row, by_column = rows and self.rows != 1, columns and self.columns != 1
        return (FULL if by_column else ROW) if by_row else (COLUMN if by_column else SCALAR)

    @property
    def whole(self) -> str:
        """The part that is all of it."""
        return self.part(rows=True, columns=True)

    def size(self, part: str) -> int:
        """Elements of a value that is a part."""
        return (self.rows if part in (FULL, ROW) else 1) * (self.columns if part in (FULL, COLUMN) else 1)

    def split(self, shape: Shape) -> int | None:
        """How many dimensions of a shape are those of rows; None where rows end within a dimension."""
        sizes = list(itertools.accumulate(reversed(shape), lambda a, b: a * b, initial=1))
        if sizes[-1] != self.rows * self.columns or self.columns not in sizes:
            return None
        return len(shape) - sizes.index(self.columns)


@dataclass(frozen=True)
class Positions:
    """Where the elements of a tensor are that a call reads or writes.

    Args:
        part: that they are of the space; what broadcasts along rows or columns is read once.
        rows: (size, stride) of the dimensions that a row's index runs over, outermost first.
        columns: those of a column's index.
        places: where rows end within a dimension: those of the index of a place, row * columns + column.
    """

    part: str
    rows: tuple[tuple[int, int], ...] = ()
    columns: tuple[tuple[int, int], ...] = ()
    places: tuple[tuple[int, int], ...] = ()

    @property
    def divisions(self) -> int:
        """How often an index has to be divided to find an element."""
        return sum(max(len(dims) - 1, 0) for dims in (self.rows, self.columns, self.places))


def positions(shape: Shape, strides: Shape, *, at: Shape, part: str, space: Space) -> Positions | None:
    """The positions of a tensor's elements for a call whose value has the shape `at`; None where it does not broadcast.

    Args:
        shape, strides: of the tensor, in elements.
        at: the shape that it broadcasts to.
        part: what the value of that shape is.
        space: of the region.
    """
    if len(shape) > len(at):
        return None
    lead = len(at) - len(shape)
    moved = [0] * lead + [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]
    if any(size not in (1, wanted) for size, wanted in zip(shape, at[lead:], strict=True)):
        return None
    dims = list(zip(at, moved, strict=True))
    if part != FULL:
        merged = _merged(dims)
        none: tuple[tuple[int, int], ...] = ()
        return Positions(
            part if merged else SCALAR, merged if part == ROW else none, merged if part == COLUMN else none
        )
    cut = space.split(at)
    if cut is None:
        merged = _merged(dims)
        return Positions(FULL if merged else SCALAR, places=merged)
    rows, columns = _merged(dims[:cut]), _merged(dims[cut:])
    return Positions(space.part(rows=bool(rows), columns=bool(columns)), rows, columns)


def _merged(dims: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The fewest (size, stride) that say the same; none where the same element is at all places."""
    out: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if out and out[-1][1] == stride * size:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out) if any(stride for _, stride in out) else ()


@dataclass
class Fit:
    """How calls fit into a space.

    Attributes:
        space: that they are tried in.
        parts: call whose value the kernel computes -> its part.
        divisions: of an index, over all reads.
        by_row: whether a program must hold whole rows.
    """

    space: Space
    parts: dict[fx.Node, str] = field(default_factory=dict)
    divisions: int = 0
    by_row: bool = False

    def part_of(self, node: fx.Node) -> str | None:
        """What a call's value would be behind those before it; None where it does not fit."""
        source = reduced(node)
        if source is not None:
            return self._of_row_op(node, source)
        if is_getitem(node):
            return self._of_getitem(node)
        if op_name(node.target) in REGROUPING:
            return self.parts[node.all_input_nodes[0]]
        shape = tuple(node.meta["val"].shape)
        options = dict.fromkeys(
            (self.space.whole, *self._by_shape(shape), *(self.parts[n] for n in reads(node) if n in self.parts))
        )
        fitting = (part for part in options if self._fits(node, shape, part))
        return next(fitting, None)

    def take(self, node: fx.Node, part: str) -> None:
        """The next call, and what it is."""
        self.parts[node] = part
        source = reduced(node)
        self.by_row = self.by_row or source is not None
        at = tuple((source or node).meta["val"].shape) if not is_getitem(node) else ()
        within = self.space.whole if source is not None else part
        for one in () if is_getitem(node) or is_view(node) else reads(node):
            val = one.meta["val"]
            if one not in self.parts and isinstance(val, torch.Tensor):
                found = positions(val.shape, val.stride(), at=at, part=within, space=self.space)
                self.divisions += found.divisions if found else 0

    def _by_shape(self, shape: Shape) -> list[str]:
        """What the shape alone says that a value could be, the likeliest first."""
        narrow = not shape or shape[-1] == 1
        order = (ROW, COLUMN, SCALAR) if narrow else (COLUMN, ROW, SCALAR)
        return [part for part in order if self.space.size(part) == math.prod(shape)]

    def _fits(self, node: fx.Node, shape: Shape, part: str) -> bool:
        if self.space.size(part) != math.prod(shape):
            return False
        return all(self._is_read_as(source, shape, part) for source in reads(node))

    def _is_read_as(self, source: fx.Node, at: Shape, part: str) -> bool:
        """Whether a value can be read where a call's value has the shape `at` and is a part of the space."""
        val = source.meta["val"]
        if source not in self.parts:
            return positions(val.shape, val.stride(), at=at, part=part, space=self.space) is not None
        if val.numel() == 1 or math.prod(at) == val.numel():
            wanted = SCALAR if val.numel() == 1 else part
            return self.parts[source] == wanted
        if part != self.space.whole or part != FULL or (cut := self.space.split(at)) is None:
            return False
        sizes = (1,) * (len(at) - val.dim()) + tuple(val.shape)
        rows, columns = math.prod(sizes[:cut]), math.prod(sizes[cut:])
        if rows not in (1, self.space.rows) or columns not in (1, self.space.columns):
            return False
        return self.parts[source] == self.space.part(rows=rows > 1, columns=columns > 1)

    def _of_row_op(self, node: fx.Node, source: fx.Node) -> str | None:
        shape = tuple(source.meta["val"].shape)
        if num_columns(node) != self.space.columns or self.space.columns > MOST_COLUMNS:
            return None
        if math.prod(shape) != self.space.rows * self.space.columns:
            return None
        if not all(self._is_read_as(one, shape, self.space.whole) for one in reads(node)):
            return None
        keeps = isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].shape == source.meta["val"].shape
        keeps = keeps and op_name(node.target) in _KEEP_COLUMNS
        return self.space.whole if keeps else self.space.part(rows=True, columns=False)

    def _of_getitem(self, node: fx.Node) -> str | None:
        """One of several values of a row op: as many as there are places, or one for each row."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        first = op_name(source.target) in _FIRST_IS_WHOLE and node.args[1] == 0
        return self.space.whole if first else self.space.part(rows=True, columns=False)


_KEEP_COLUMNS = {f"aten::_{stem}{end}.default" for stem in ("softmax", "log_softmax") for end in ("", "_backward_data")}
_FIRST_IS_WHOLE = {
    *(f"aten::native_layer_norm{end}.default" for end in ("", "_backward")),
    *(f"aten::_fused_rms_norm{end}.default" for end in ("", "_backward")),
}


class RowStructure:
    """Calls that one kernel over rows can hold, taken one by one ([Note: row structure]).

    Args:
        keeps_last: a call does not join if the last dimension could then be a row no more.

    Attributes:
        calls: taken so far.
    """

    def __init__(self, *, keeps_last: bool = False) -> None:
        self._keeps_last = keeps_last
        self._last: set[int] = set()  # sizes of last dimensions of the largest shapes
        self.calls: list[fx.Node] = []
        self._fits: dict[Space, Fit] = {}
        self._inside: set[fx.Node] = set()
        self._views: set[fx.Node] = set()  # of what comes in
        self._places = 0
        self._columns: set[int] = set()

    @property
    def best(self) -> Fit | None:
        """How the calls fit best; None where there is none whose value has to be computed."""
        order = sorted(self._fits.values(), key=lambda fit: (fit.divisions, -fit.space.columns))
        return order[0] if order else None

    def take(self, node: fx.Node) -> bool:
        """The next call, which joins if it can.

        Args:
            node: behind those taken before; its getitems, if it has any, come next.

        Returns:
            Whether it has joined; if not, nothing has changed.
        """
        if not is_row_call(node):
            return False
        if self._is_view_of_input(node):
            self._views.add(node)
            self._keep(node)
            return True
        if is_view(node) and op_name(node.target) not in REGROUPING and op_name(node.target) != EXPAND:
            return False
        found = self._fitting(node)
        if not found:
            return False
        self._fits = found
        self._keep(node)
        return True

    def _keep(self, node: fx.Node) -> None:
        self.calls.append(node)
        self._inside.add(node)

    def _is_view_of_input(self, node: fx.Node) -> bool:
        """Whether a call only names, in another way, what comes into the region."""
        if not is_view(node) and not is_getitem(node):
            return False
        source = node.all_input_nodes[0]
        return source not in self._inside or source in self._views

    def _fitting(self, node: fx.Node) -> dict[Space, Fit]:
        """The spaces that hold the calls taken so far and this one."""
        shape, is_row_op = self._extent(node)
        num = math.prod(shape)
        columns = {num_columns(node)} if is_row_op else _widths(shape)
        if 0 in columns:
            return {}
        if num < self._places or (num == self._places and columns <= self._columns):
            return self._if_last(self._advanced(self._fits.values(), node), self._last)
        known = columns if num > self._places else self._columns | columns
        fresh = {Space(num // c, c) for c in known if num % c == 0}
        kept = self._advanced((fit for space, fit in self._fits.items() if space in fresh), node)
        found = kept | self._replayed([space for space in fresh if space not in self._fits], node)
        last = {min(columns)} | (self._last if num == self._places else set())
        found = self._if_last(found, last)
        if found:
            self._places, self._columns, self._last = num, set(known), last
        return found

    def _if_last(self, found: dict[Space, Fit], last: set[int]) -> dict[Space, Fit]:
        """What was found, if a last dimension is a row in it, or a row op has decided what is."""
        if not self._keeps_last or any(fit.by_row or fit.space.columns in last for fit in found.values()):
            return found
        return {}

    def _extent(self, node: fx.Node) -> tuple[tuple[int, ...], bool]:
        """The largest shape that a call works on, and whether it needs whole rows."""
        source = reduced(node)
        if source is not None:
            return tuple(source.meta["val"].shape), True
        return tuple(node.meta["val"].shape), False

    def _replayed(self, spaces: Sequence[Space], node: fx.Node) -> dict[Space, Fit]:
        fits = [Fit(space) for space in spaces]
        for call in self.calls:
            if call not in self._views:
                fits = list(self._advanced(fits, call).values())
        return self._advanced(fits, node)

    def _advanced(self, fits: Iterable[Fit], node: fx.Node) -> dict[Space, Fit]:
        """The fits that a call fits into, with it."""
        out = {}
        for fit in fits:
            part = fit.part_of(node)
            if part is not None:
                grown = Fit(fit.space, dict(fit.parts), fit.divisions, fit.by_row)
                grown.take(node, part)
                out[fit.space] = grown
        return out


def _widths(shape: Shape) -> set[int]:
    """How many columns a shape could have: the products of its last dimensions."""
    return {n for n in itertools.accumulate(reversed(shape), lambda a, b: a * b) if n > 1} or {1}


def joined(calls: Iterable[fx.Node]) -> RowStructure | fx.Node:
    """The structure of calls that belong together, or the first call that does not fit to those before it."""
    structure = RowStructure()
    for node in calls:
        if not structure.take(node):
            return node
    return structure


def computes(node: fx.Node) -> bool:
    """Whether a call yields a tensor of its own, and not a part of what another yields."""
    return yields_tensor(node) and not is_getitem(node) and not is_view(node)
