"""The rules of a step graph whose values lie over mesh axes in parts or as summands; see [Note: placements].

[Note: what placements are held to]
Which placements an op may take and yield is known to those who choose them; here stands what holds whatever the op is.
A value without `meta["placements"]` was made by a later pass, which says nothing about it: rules for what collectives
take and yield leave it out. One that has them, without the axis, is whole on each rank of the axis; so is what goes out
for state.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.axis_placement import REPLICATED, SPLIT_AXES, Placement, placement_of
from fxzero.graph.rules import Context, Violation
from fxzero.graph.step_graph import CARRIED_KINDS, SAVED, STATE_KINDS, TANGENT, Sharding, is_getitem

_REDUCTIONS = ("sum", "max", "norm2")
_WORDS = {"R": "whole", "S": "a shard", "P": "partial", "E": "rows of experts"}
# collective -> kinds of the values that it takes and yields, over its own axis. What an all-to-all moves may also be
# summands that are added up behind it, so what it yields is not said. Parts that were passed on are another rank's,
# which no placement says; summands are summands wherever they are.
_TAKES: dict[Any, str] = {
    **dict.fromkeys((c10d.all_reduce, c10d.all_reduce_coalesced), "P"),
    **dict.fromkeys((c10d.reduce_scatter, c10d.reduce_scatter_coalesced), "P"),
    **dict.fromkeys((c10d.all_gather, c10d.all_gather_coalesced), "S"),
    c10d.all_to_all: "SP",
    c10d.shift: "SP",
}
_YIELDS: dict[Any, str] = {
    **dict.fromkeys((c10d.all_reduce, c10d.all_reduce_coalesced), "R"),
    **dict.fromkeys((c10d.all_gather, c10d.all_gather_coalesced), "R"),
    **dict.fromkeys((c10d.reduce_scatter, c10d.reduce_scatter_coalesced), "S"),
    c10d.shift: "P",
}
_ALL_REDUCES = (c10d.all_reduce, c10d.all_reduce_coalesced)
_REDUCES = (*_ALL_REDUCES, c10d.reduce_scatter, c10d.reduce_scatter_coalesced)


def check_placements(context: Context) -> Iterator[Violation]:
    """Placements fit values, mesh and ZeRO's rows; collectives convert what they say; state goes out as it came in."""
    for node in context.step.graph.nodes:
        if "placements" in node.meta:
            yield from _check_form(node, context.step.mesh)
            yield from _check_rows(node)
    for node in context.step.placeholders:
        yield from _check_input(node)
    for node in context.calls:
        if c10d.is_collective(node):
            yield from _check_collective(node)
        elif is_getitem(node):
            yield from _check_part(node)
        elif node.target is ops.local_shard:
            yield from _check_local_shard(node)
    yield from _check_results(context)


def _check_form(node: fx.Node, mesh: dict[str, int]) -> Iterator[Violation]:
    """Each placement is of an axis of the mesh, one for each value, and of a dim that can be split so."""
    val, fix = node.meta["val"], "let meta['placements'] and meta['val'] change together"
    for axis, found in node.meta["placements"].items():
        if axis not in mesh:
            yield Violation(node, f"placements over axes of the mesh {mesh}", repr(axis), fix)
        is_several = isinstance(val, (list, tuple))
        if is_several != isinstance(found, tuple) or (is_several and len(found) != len(val)):
            expected = f"a tuple of {len(val)} placements over {axis}" if is_several else f"one placement over {axis}"
            yield Violation(node, expected, str(found), fix)
            continue
        for value, placement in zip(val, found, strict=True) if is_several else [(val, found)]:
            others = _ranks_along(node, placement, mesh, axis) if not is_several else 1
            expected = _needed(value, placement, node.meta.get("sharding"), others)
            if expected:
                got = f"{placement} over {axis} of {_described(value)}"
                yield Violation(node, expected, got, fix)


def _ranks_along(node: fx.Node, placement: Any, mesh: dict[str, int], axis: str) -> int:
    """Over how many ranks other axes split the dim of a shard: what lies in blocks may be split by them, too."""
    if not isinstance(placement, Placement) or not (placement.is_shard or placement.is_routed):
        return 1
    others = {other: placement_of(node, other) for other in node.meta["placements"] if other != axis and other in mesh}
    return math.prod(mesh[other] for other, lies in others.items() if lies.is_shard and lies.dim == placement.dim)


def _needed(value: Any, placement: Any, sharding: Sharding | None, others: int) -> str:
    """What a placement needs that the value is not, of whose dim other axes split so many parts; "" where it fits."""
    if not isinstance(placement, Placement) or placement.kind not in _WORDS:
        return "a placement: R, S, P or E"
    if placement.is_partial and placement.reduction not in _REDUCTIONS:
        return f"a reduction in {_REDUCTIONS}"
    if placement == REPLICATED:
        return ""
    if not isinstance(value, torch.Tensor):
        return "a tensor, where it is not whole on each rank"
    if placement.is_partial:
        return ""
    if not 0 <= placement.dim < value.dim():
        return f"a dim from 0 to {value.dim() - 1}" if value.dim() else "a tensor that has dims"
    if placement.is_routed:
        fits = value.shape[placement.dim] * others == placement.room
        return "" if fits and sharding is None else f"a buffer of {placement.room} rows, and no rows by ZeRO"
    size = sharding.rows if sharding is not None and placement.dim == 0 else value.shape[placement.dim]
    in_blocks = placement.blocks >= 1 and (not isinstance(size, int) or size * others % placement.blocks == 0)
    return "" if in_blocks else f"equal parts of {placement.blocks} blocks"


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _check_rows(node: fx.Node) -> Iterator[Violation]:
    """ZeRO's rows are split over an axis whose ranks have them all."""
    sharding: Sharding | None = node.meta.get("sharding")
    if sharding is not None and placement_of(node, sharding.axis) != REPLICATED:
        got = f"{placement_of(node, sharding.axis)} and {sharding}"
        fix = "say once how a value lies over an axis: meta['placements'], or meta['sharding'] for ZeRO's rows"
        yield Violation(node, f"a value whole over {sharding.axis}, where its rows are sharded over it", got, fix)


def _check_input(node: fx.Node) -> Iterator[Violation]:
    """What comes in has been added up, except between microbatches and within a step that is run in two halves."""
    if node.meta["entry"].kind in (*CARRIED_KINDS, SAVED, TANGENT):
        return
    for axis, found in node.meta.get("placements", {}).items():
        if found.is_partial or found.is_routed:
            fix = "let inputs be whole or shards, and reduce what goes out for them"
            yield Violation(node, f"an input whole or in parts over {axis}", str(found), fix)


def _check_collective(node: fx.Node) -> Iterator[Violation]:
    axis = c10d.axis_of(node)
    waits = _waits_of(node)
    for index, source in enumerate(c10d.sent(node)):
        if "placements" not in source.meta:
            continue
        wait = waits.get(index)
        if axis in SPLIT_AXES:
            yield from _check_taken(node, source, axis)
        if wait is not None and "placements" in wait.meta and node.target in _ALL_REDUCES:
            yield from _check_kept(node, source, wait, axis)
    for wait in waits.values() if axis in SPLIT_AXES and node.target in _YIELDS else ():
        found = placement_of(wait, axis)
        if "placements" in wait.meta and found.kind not in _YIELDS[node.target]:
            expected = f"{_WORDS[_YIELDS[node.target]]} over {axis}, as the collective leaves it"
            yield Violation(wait, expected, str(found), "set meta['placements'] of what the collective yields")


def _waits_of(launch: fx.Node) -> dict[int, fx.Node]:
    """Position among the tensors of a collective -> its wait."""
    if not c10d.TABLE[launch.target].coalesced:
        return dict(enumerate(filter(c10d.is_wait, launch.users)))
    parts: list[Any] = [user for user in launch.users if user.target is operator.getitem]
    return {part.args[1]: user for part in parts for user in part.users if c10d.is_wait(user)}


def _check_taken(node: fx.Node, source: fx.Node, axis: str) -> Iterator[Violation]:
    """A gather takes shards, a reduction summands of its own kind."""
    found, kinds = placement_of(source, axis), _TAKES[node.target]
    if found.kind not in kinds:
        words = " or ".join(_WORDS[kind] for kind in kinds)
        fix = "leave the collective out, or correct meta['placements'] of what it takes"
        yield Violation(node, f"a value that is {words} over {axis}", f"%{source.name}, which is {found}", fix)
    elif node.target in _REDUCES and node.args[1] != found.reduction:
        fix = "reduce by what the placement says; a 2-norm by squaring, a sum and a root"
        yield Violation(node, f"%{source.name}, which is {found}, reduced by that", repr(node.args[1]), fix)


def _check_kept(node: fx.Node, source: fx.Node, wait: fx.Node, axis: str) -> Iterator[Violation]:
    """What is reduced over one axis lies over the others as before."""
    for other in SPLIT_AXES:
        was, found = placement_of(source, other), placement_of(wait, other)
        if other != axis and was != found:
            fix = f"a collective over {axis} changes nothing over {other}: correct one of the two"
            yield Violation(wait, f"{was} over {other}, as %{source.name}", str(found), fix)


def _check_part(node: fx.Node) -> Iterator[Violation]:
    """One of several values lies as it is said of it among them."""
    source: Any = node.args[0]
    index: Any = node.args[1]
    is_told = "placements" in node.meta and "placements" in source.meta and isinstance(index, int)
    if not is_told or not isinstance(source.meta["val"], (list, tuple)) or c10d.is_collective(source):
        return
    for axis in {**source.meta["placements"], **node.meta["placements"]}:
        told = source.meta["placements"].get(axis)
        expected = told[index] if isinstance(told, tuple) else REPLICATED
        if placement_of(node, axis) != expected:
            fix = "let the parts of a tuple lie as it says"
            got = str(placement_of(node, axis))
            yield Violation(node, f"{expected} over {axis}, as number {index} of %{source.name}", got, fix)


def _check_local_shard(node: fx.Node) -> Iterator[Violation]:
    """A rank takes its rows of what is not split over their axis yet, and what it has then is a shard of rows."""
    source: Any = node.args[0]
    index: Any = node.args[2]
    axis = index.meta["entry"].name if isinstance(index, fx.Node) and index.op == "placeholder" else ""
    if axis not in SPLIT_AXES:
        return
    if "placements" in source.meta and placement_of(source, axis).is_shard:
        got = f"%{source.name}, which is {placement_of(source, axis)}"
        yield Violation(node, f"a value that is not split over {axis} yet", got, "gather it first")
    found = placement_of(node, axis)
    if "placements" in node.meta and not (found.is_shard and found.dim == 0):
        fix = "set meta['placements'] of what local_shard yields"
        yield Violation(node, f"S(0) over {axis}, the rows that local_shard takes", str(found), fix)


def _check_results(context: Context) -> Iterator[Violation]:
    """What goes out for state, or as a gradient, lies as the input does; what a person reads is added up."""
    for (kind, name), node in context.step.results.items():
        if kind in ("loss", "metric", "output"):
            for axis, found in node.meta.get("placements", {}).items():
                if found.is_partial or found.is_routed:
                    where = f"result {(kind, name)} from %{node.name}"
                    yield Violation(where, f"a value added up over {axis}", str(found), "reduce it before it goes out")
        if kind not in (*STATE_KINDS, *CARRIED_KINDS, "gradient"):
            continue
        source = context.entries.get(("parameter", name) if kind == "gradient" else (kind, name))
        if source is not None:
            yield from _check_result(f"result {(kind, name)} from %{node.name}", source, node)


def _check_result(where: str, source: fx.Node, node: fx.Node) -> Iterator[Violation]:
    for axis in {**source.meta.get("placements", {}), **node.meta.get("placements", {})}:
        expected, found = placement_of(source, axis), placement_of(node, axis)
        if expected != found:
            fix = "let what is returned lie as the input that it is stored in"
            yield Violation(where, f"{expected} over {axis}, as %{source.name}", str(found), fix)
