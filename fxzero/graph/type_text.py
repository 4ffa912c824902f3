"""The type of a value in the text of a step graph, written and read back.

[Note: what a type says]
dtype, shape, strides where not the contiguous ones, device where not the header's. Sizes are whole ones; what has been
split since follows them, each axis behind a stroke, in the order of splitting: the axes of `meta["placements"]` in the
order of the mesh, then ZeRO's rows (`meta["sharding"]`).

    f32[62/dp, 16]      this rank's part of 62 rows that are sharded over dp; `62/dp:2` where 2 ranks hold them
    f32[8, 512/tp]      the ranks of tp hold equal parts of dim 1: S(1)
    f32[512/tp/dp, 64]  each rank of tp has a part of the rows, and shards it over dp
    f32[8, 16/2*tp]     dim 1 is 2 blocks, and ranks hold a part of each: S(1, 2)
    f32[48/24~ep, 96]   the rows of a rank's experts, of 48, in a buffer of 24: E(0, 24 of 48); this split is the first
    f32[8, 64]+tp       what the ranks of tp hold has still to be added up: P(sum); `+max:tp`, `+norm2:tp`

Only SPLIT_AXES stand in a type as placements; a shard of rows over one of these says its number of ranks (`15/tp:2`).
A placement that a type cannot show, such as one of a dim that is not there, is in the comment: `lies S(3) over tp`.
Replicated values say nothing, so that one written as R over an axis reads back without that axis, which means the same.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero.graph import axis_placement, ops
from fxzero.graph.axis_placement import REPLICATED, SPLIT_AXES, Placement, partial, routed, shard
from fxzero.graph.step_graph import Sharding, StepGraph

_TENSOR = re.compile(
    r"(?P<dtype>\w+)\[(?P<sizes>[^]]*)\](?:\{(?P<strides>[\d,]*)\})?"
    r"(?P<partial>(?:\+(?:(?:max|norm2):)?\w+)*)(?:@(?P<device>\w+))?"
)
_SIZE = re.compile(r"(?P<whole>\d+)(?P<parts>(?:/(?:\d+[*~])?\w+(?::\d+)?)*)")
_PART = re.compile(r"/(?:(?P<blocks>\d+)\*|(?P<room>\d+)~)?(?P<axis>\w+)(?::(?P<count>\d+))?")
_PARTIAL = re.compile(r"\+(?:(?P<reduction>\w+):)?(?P<axis>\w+)")
_REPEATED = re.compile(r"(?P<item>.*?)(?: x(?P<count>\d+))?")


@functools.cache
def dtype_names() -> dict[torch.dtype, str]:
    """dtype -> its name in the text: f32, bf16, i64, bool."""
    short = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
    dtypes = [item for item in vars(torch).values() if isinstance(item, torch.dtype)]
    return {d: re.sub(r"^torch\.([a-z]+)", lambda kind: short.get(kind[1], kind[1]), str(d)) for d in dtypes}


def contiguous_strides(shape: Collection[int]) -> tuple[int, ...]:
    """The strides that a fresh tensor of this shape has."""
    sizes = [max(size, 1) for size in shape]
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def fits(sharding: Sharding, val: Any) -> bool:
    """Whether `val` has as many rows as a shard must have."""
    if not isinstance(val, torch.Tensor) or val.dim() == 0:
        return False
    return val.shape[0] == ops.shard_rows(sharding.rows, sharding.num_shards)


def sharding_text(sharding: Sharding, mesh: Mapping[str, int], *, rows: str = "") -> str:
    """`rows/axis`; the number of shards too, where the axis does not tell it.

    Args:
        sharding: of rows.
        mesh: axis -> size.
        rows: how the rows are written that were split over other axes before.
    """
    told = mesh.get(sharding.axis) == sharding.num_shards and sharding.axis not in SPLIT_AXES
    return f"{rows or sharding.rows}/{sharding.axis}{'' if told else f':{sharding.num_shards}'}"


def shown_placements(val: Any, placements: Mapping[str, Any], mesh: Mapping[str, int]) -> dict[str, Any]:
    """The placements that a type can show, in the order of the mesh; see [Note: what a type says]."""
    axes = [axis for axis in mesh if axis in SPLIT_AXES and axis in placements]
    found = {axis: placements[axis] for axis in axes if _can_show(val, placements[axis])}
    return {axis: lies for axis, lies in found.items() if not _shares_rows(lies, found)}


def _shares_rows(placement: Any, others: Mapping[str, Any]) -> bool:
    """Whether other axes split the rows of experts, too: their sizes are then none that a type can say."""
    if isinstance(placement, tuple):
        return any(_shares_rows(one, {**others, "": one}) for one in placement)
    splits = [lies for lies in others.values() if isinstance(lies, Placement) and (lies.is_shard or lies.is_routed)]
    return placement.is_routed and sum(lies.dim == placement.dim for lies in splits) > 1


def unshown_placements(val: Any, placements: Mapping[str, Any], mesh: Mapping[str, int]) -> dict[str, Any]:
    """The placements that say something and that a type cannot show."""
    shown = shown_placements(val, placements, mesh)
    return {axis: found for axis, found in placements.items() if axis not in shown and not _is_replicated(found)}


def _can_show(val: Any, placement: Any) -> bool:
    if isinstance(placement, tuple):
        values = val if isinstance(val, (list, tuple)) else ()
        return len(values) == len(placement) and all(map(_can_show, values, placement))
    if _is_replicated(placement):
        return True
    if not isinstance(val, torch.Tensor):
        return False
    in_range = placement.dim < val.dim() and isinstance(val.shape[placement.dim], int)
    if placement.is_routed:
        return in_range and val.shape[placement.dim] == placement.room
    return placement.is_partial or in_range


def _is_replicated(placement: Any) -> bool:
    if isinstance(placement, tuple):
        return all(map(_is_replicated, placement))
    return bool(placement == REPLICATED)


def placement_text(placement: Any) -> str:
    """How a value lies, in a comment; of a tuple, how its values do."""
    return f"({', '.join(map(str, placement))})" if isinstance(placement, tuple) else str(placement)


def read_placement(how: str) -> Placement | tuple[Placement, ...]:
    """What `placement_text` wrote.

    Raises:
        ValueError: if it is another text.
    """
    if not how.startswith("("):
        return Placement.parse(how)
    return tuple(map(Placement.parse, re.split(r", (?=[A-Z])", how[1:-1])))


def type_of(node: fx.Node, step: StepGraph, *, device: str) -> str:
    """The type of what a node yields, `device` left out."""
    sharding, placements = node.meta.get("sharding"), node.meta.get("placements")
    return type_text(node.meta.get("val"), step, device=device, sharding=sharding, placements=placements)


def type_text(
    val: Any,
    step: StepGraph,
    *,
    device: str,
    sharding: Sharding | None = None,
    placements: Mapping[str, Any] | None = None,
) -> str:
    """The type of a value, `device` left out; in a tuple, equal neighbours appear as `f32[4] x3`."""
    shown = shown_placements(val, placements or {}, step.mesh)
    if isinstance(val, torch.Tensor):
        return _tensor_text(val, step, device=device, sharding=sharding, shown=shown)
    if isinstance(val, (list, tuple)):
        parts = [{axis: found[i] for axis, found in shown.items() if isinstance(found, tuple)} for i in range(len(val))]
        texts = [type_text(item, step, device=device, placements=part) for item, part in zip(val, parts, strict=True)]
        runs = [(item, len(list(same))) for item, same in itertools.groupby(texts)]
        return f"({', '.join(item if count == 1 else f'{item} x{count}' for item, count in runs)})"
    return "None" if val is None else type(val).__name__


def _tensor_text(
    val: torch.Tensor, step: StepGraph, *, device: str, sharding: Sharding | None, shown: Mapping[str, Placement]
) -> str:
    rows = {axis: found for axis, found in shown.items() if found.is_routed}
    split = rows | {axis: found for axis, found in shown.items() if found.is_shard}
    sizes = list(map(str, axis_placement.whole_shape(_shape_without_rows(val, sharding), split, step.mesh)))
    for axis, placement in split.items():
        if placement.is_routed:
            sizes[placement.dim] += f"/{placement.room}~{axis}"
            continue
        sizes[placement.dim] += f"/{axis}" if placement.blocks == 1 else f"/{placement.blocks}*{axis}"
    if sharding is not None and fits(sharding, val):
        sizes[0] = sharding_text(sharding, step.mesh, rows=sizes[0])
    strides = ""
    if val.stride() != contiguous_strides(val.shape):
        strides = f"{{{','.join(map(str, val.stride()))}}}"
    reductions = {axis: found.reduction for axis, found in shown.items() if found.is_partial}
    partials = [f"+{axis}" if name == "sum" else f"+{name}:{axis}" for axis, name in reductions.items()]
    place = "" if val.device.type == device else f"@{val.device.type}"
    return f"{dtype_names()[val.dtype]}[{', '.join(sizes)}]{strides}{''.join(partials)}{place}"


def _shape_without_rows(val: Any, sharding: Sharding | None) -> tuple[int, ...]:
    """The shape that a value would have if its rows were not sharded."""
    shape = tuple(val.shape) if isinstance(val, torch.Tensor) else ()
    return (sharding.rows, *shape[1:]) if sharding is not None and fits(sharding, val) else shape


def whole_shape(node: fx.Node, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """The single-device shape of an input, as far as its value, its sharding and its placements tell."""
    val, placements = node.meta["val"], node.meta.get("placements", {})
    shape = _shape_without_rows(val, node.meta.get("sharding"))
    return axis_placement.whole_shape(shape, shown_placements(val, placements, mesh), mesh)


@dataclass(frozen=True)
class ReadType:
    """What the text of a type says.

    Args:
        placements: axis -> how the value lies over it, where it says so; of a tuple, a tuple of these.
        sharding: of the rows of a tensor.
        dtype: of a tensor; "" for other values.
        sizes: of what one rank holds, as digits; as they are written, where that cannot be read.
        strides, device: of a tensor, where they are written.
    """

    placements: dict[str, Any] = field(default_factory=dict)
    sharding: Sharding | None = None
    dtype: str = ""
    sizes: tuple[str, ...] = ()
    strides: tuple[int, ...] | None = None
    device: str | None = None


def read_type(shown: str, axis_size: Callable[[str], int]) -> ReadType:
    """What a type says; of one that `type_text` does not write, less than it might.

    Args:
        shown: the text.
        axis_size: the size of a mesh axis; it raises where there is none of that name.
    """
    if shown.startswith("("):
        items = [read_type(item, axis_size).placements for item in _items(shown)]
        axes = dict.fromkeys(axis for item in items for axis in item)
        return ReadType({axis: tuple(item.get(axis, REPLICATED) for item in items) for axis in axes})
    match = _TENSOR.fullmatch(shown)
    if match is None:
        return ReadType()
    placements: dict[str, Any] = {}
    sharding: Sharding | None = None
    sizes: list[str] = []
    for dim, size in enumerate(filter(None, match["sizes"].split(", "))):
        found = read_size(size, axis_size, dim=dim)
        placements |= found.placements
        sharding = sharding or found.sharding
        sizes += found.sizes
    for part in _PARTIAL.finditer(match["partial"]):
        axis_size(part["axis"])
        placements[part["axis"]] = partial(part["reduction"] or "sum")
    strides = None if match["strides"] is None else tuple(map(int, filter(None, match["strides"].split(","))))
    return ReadType(placements, sharding, match["dtype"], tuple(sizes), strides, match["device"])


def _items(shown: str) -> list[str]:
    """The types in that of a tuple, repeated ones as often as it says."""
    depth, ends = 0, [0]
    for index, letter in enumerate(shown):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            ends.append(index)
    found = [_REPEATED.fullmatch(shown[begin + 1 : end].strip()) for begin, end in itertools.pairwise(ends)]
    return [match["item"] for match in found if match for _ in range(int(match["count"] or 1))]


def read_size(size: str, axis_size: Callable[[str], int], *, dim: int = 0) -> ReadType:
    """What one size says: placements of its dim, a sharding, and what of it one rank holds."""
    match = _SIZE.fullmatch(size)
    if match is None:
        return ReadType(sizes=(size,))
    local, sharding = int(match["whole"]), None
    placements: dict[str, Any] = {}
    for part in _PART.finditer(match["parts"]):
        axis, ranks = part["axis"], axis_size(part["axis"])
        if part["room"] is not None:
            local = int(part["room"])
            placements[axis] = routed(dim, room=local, rows=int(match["whole"]))
        elif axis in SPLIT_AXES and part["count"] is None:
            placements[axis] = shard(dim, int(part["blocks"] or 1))
            local //= ranks
        else:
            sharding = Sharding(axis, int(part["count"] or ranks), local)
            local = ops.shard_rows(local, sharding.num_shards)
    return ReadType(placements, sharding, sizes=(str(local),))
