"""The rules of a step graph that is split over ranks: collectives, lifetimes of gathered tensors, shards."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.axis_placement import whole_shape
from fxzero.graph.compression_ops import dequantize_blockwise, quantize_blockwise
from fxzero.graph.compression_rules import packed_by
from fxzero.graph.rules import Context, Violation, equation, schema_of
from fxzero.graph.shared_rows import (
    meetings_before_writes,
    reads_before_writes_in_place,
    release_of,
    rows_gathered,
)
from fxzero.graph.step_graph import CARRIED_KINDS, SAVED, STATE_KINDS, Sharding, first_argument, iter_views

aten = torch.ops.aten

_GATHERS = (c10d.all_gather, c10d.all_gather_coalesced)


def check_collectives(context: Context) -> Iterator[Violation]:
    """Each collective is of the table, over an axis of the mesh, on contiguous tensors, waited for once.

    One that is launched for the next program is returned to it instead; there an input stands for it.
    """
    ahead = c10d.launched_for_next(context.step)
    yield from _check_rows_in_place(context)
    for node in filter(c10d.is_ahead, context.step.placeholders):
        yield from _check_input_ahead(node, context)
        yield from _check_parts([node])
    for node in context.calls:
        if c10d.is_collective(node):
            yield from _check_launch(node, context.step.mesh)
            yield from _check_waits(node, ahead=node in ahead)
        elif c10d.is_wait(node) and not _is_launched(node):
            fix = "wait for the collective, or for a getitem of a coalesced one"
            yield Violation(node, "a wait for a collective", f"one for %{node.args[0]}", fix)
        elif getattr(node.target, "namespace", "") == "_c10d_functional" and not c10d.is_wait(node):
            fix = "add a row to fxzero.graph.collectives.TABLE"
            yield Violation(node, "a collective of the table", str(node.target), fix)
    for node in ahead:
        if node.target not in _GATHERS:
            fix = "return the launch of a gather, or the getitem of a coalesced one"
            yield Violation(node, "the launch of a gather, for the next program", str(node.target), fix)


def _check_rows_in_place(context: Context) -> Iterator[Violation]:
    """What reads rows where they rest takes those of a parameter, releases it, and all ranks meet before a write.

    This order is looked at in any program, not only where a pass has changed it: a broken one computes wrong numbers.
    """
    launches = [node for node in context.calls if c10d.carrier_of(node) == c10d.SHARED_ROWS]
    meetings = meetings_before_writes(context.step) if launches else {}
    for node in launches:
        expected, fix = "", f"let it be carried by {c10d.SHARED_MEMORY!r}"
        if node.target is not c10d.all_gather or rows_gathered(node) is None:
            expected = "a gather of a parameter's own rows"
        elif rows_gathered(node) not in meetings:
            expected = "a parameter whose update follows from a collective of all ranks"
        elif release_of(node) is None:
            expected = "a release of what it yields"
        if expected:
            yield Violation(node, f"{expected}, as it is carried by {c10d.SHARED_ROWS!r}", "none", fix)
    for earlier, later in reads_before_writes_in_place(context.step) if launches else ():
        if context.positions[earlier] > context.positions[later]:
            fix = "keep that order, or let the parameter's gathers be carried by 'shared_memory'"
            yield Violation(later, f"it after %{earlier.name}, as others read these rows in place", "it before", fix)


def _check_input_ahead(node: fx.Node, context: Context) -> Iterator[Violation]:
    """What was launched before is all rows of a sharded parameter of this program."""
    name, fix = node.meta["entry"].name, "launch only gathers of sharded parameters for the next program"
    parameter = context.entries.get(("parameter", name))
    sharding: Sharding | None = None if parameter is None else parameter.meta.get("sharding")
    if parameter is None or sharding is None:
        yield Violation(node, f"a sharded parameter {name!r} beside it", "none", fix)
        return
    expected, got = [sharding.padded_rows, *parameter.meta["val"].shape[1:]], list(node.meta["val"].shape)
    if got != expected:
        yield Violation(node, f"shape {expected}, all rows of %{parameter.name}", str(got), fix)


def _check_launch(node: fx.Node, mesh: dict[str, int]) -> Iterator[Violation]:
    row = c10d.TABLE[node.target]
    axis: Any = node.args[row.axis_arg] if len(node.args) > row.axis_arg else None
    if axis not in mesh:
        fix = "name an axis, as positional argument"
        yield Violation(node, f"an axis of the mesh {mesh}", repr(axis), fix)
        return
    for name, size in _group_sizes(node):
        if size != mesh[axis]:
            fix = "take the size from step.mesh"
            yield Violation(node, f"{name} for the {mesh[axis]} ranks of {axis}", str(size), fix)
    if node.target is c10d.shift:
        yield from _check_shift(node, axis, mesh[axis])
    for source in c10d.sent(node):
        if not source.meta["val"].is_contiguous():
            got = f"%{source.name} with strides {source.meta['val'].stride()}"
            yield Violation(node, "contiguous tensors", got, "pass it through Editor.contiguous")


def _check_shift(node: fx.Node, axis: str, size: int) -> Iterator[Violation]:
    """All ranks pass on by as many places, each from its own; else sends and receives do not match."""
    by, index = node.args[1], node.args[3]
    if not isinstance(by, int) or not 0 < by < size:
        yield Violation(node, f"from 1 to {size - 1} places on {axis}", repr(by), "leave a shift to the same rank out")
    entry = index.meta.get("entry") if isinstance(index, fx.Node) else None
    if entry is None or entry.key != ("coordinate", axis):
        yield Violation(node, f"this rank's index on {axis}", str(index), f"use coordinate(step, {axis!r})")


def _group_sizes(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """What the arguments of a collective say about the size of its group."""
    for argument, value in zip(schema_of(node).arguments, node.args, strict=False):
        if argument.name == "group_size":
            yield argument.name, value
        elif argument.name.endswith("_split_sizes"):
            yield f"{argument.name} {value}", len(value)  # type: ignore[arg-type]


def _check_waits(node: fx.Node, *, ahead: bool) -> Iterator[Violation]:
    parts = [node]
    if c10d.TABLE[node.target].coalesced:
        parts = [user for user in node.users if user.target is operator.getitem]
        indices = sorted(part.args[1] for part in parts)  # type: ignore[type-var]
        count = len(node.meta["val"])
        if len(parts) != len(node.users) or indices != list(range(count)):
            got = f"getitems {indices} and {len(node.users) - len(parts)} other readers"
            fix = "wait for each tensor once"
            yield Violation(node, f"one getitem for each of {count} tensors", got, fix)
    yield from _check_parts(parts, ahead=ahead)


def _check_parts(parts: list[fx.Node], *, ahead: bool = False) -> Iterator[Violation]:
    """Nothing reads what is under way but one wait; or, if it is for the next program, nothing but the output."""
    for part in parts:
        waits = [user for user in part.users if c10d.is_wait(user)]
        others = [user for user in part.users if not c10d.is_wait(user)]
        if ahead and not waits and [user.op for user in others] == ["output"]:
            continue
        if len(waits) != 1:
            got = f"{len(waits)}: {', '.join(f'%{wait.name}' for wait in waits) or 'none'}"
            yield Violation(part, "one wait", got, "wait once, and let all readers read that wait")
        for other in others:
            yield Violation(part, "no reader but its wait", f"%{other.name}", "let it read the wait")


def _is_launched(wait: fx.Node) -> bool:
    source = wait.args[0]
    if not isinstance(source, fx.Node):
        return False
    if c10d.is_ahead(source):
        return True
    if source.target is operator.getitem:
        launch = source.args[0]
        return c10d.is_collective(launch) and c10d.TABLE[launch.target].coalesced  # type: ignore[arg-type, union-attr]
    return c10d.is_collective(source) and not c10d.TABLE[source.target].coalesced


def check_release(context: Context) -> Iterator[Violation]:
    """Each gathered parameter is released once, after its last reader, or is saved for backward; nothing else is."""
    ends: dict[fx.Node, fx.Node] = {}
    saved = {node for (kind, _), node in context.step.results.items() if kind == SAVED}
    alone = _computed_from_parameters(context)
    for node in context.calls:
        for value in node.args[0] if c10d.is_release(node) else ():  # type: ignore[union-attr]
            full = _unsharded(value)  # type: ignore[arg-type]
            if full is None or not ("param" in full.meta or c10d.sent_to(_wait_of(full)) in alone):
                fix = "release the wait of the gather, or what that is dequantized into"
                yield Violation(node, "the gather of a parameter", f"%{value}", fix)
            elif full in ends:
                fix = "release once, after the last reader"
                yield Violation(node, f"%{full.name} alive", f"released by %{ends[full].name}", fix)
            else:
                ends[full] = node
    for full, end in ends.items():
        yield from _check_use_after(context, full, end)
    for full in context.step.calls(c10d.wait, dequantize_blockwise):
        if full not in ends and full not in saved and full.meta["phase"] != "update" and _gathers_parameter(full):
            fix = "release it after the last reader of it and of its views"
            yield Violation(full, "a release of this gathered parameter", "none", fix)


def _check_use_after(context: Context, wait: fx.Node, end: fx.Node) -> Iterator[Violation]:
    for alias in (wait, *iter_views(wait)):
        for reader in alias.users:
            if context.positions[reader] > context.positions[end]:
                got = f"a read of %{alias.name} by {equation(reader)} after %{end.name}"
                fix = "release after the last reader of it and of its views, or gather again"
                yield Violation(wait, "no use after release", got, fix)


def _unsharded(value: fx.Node) -> fx.Node | None:
    """The whole tensor that a value is, or is the true rows of: the wait of an all_gather, or what it is read into."""
    if value.target is aten.slice.Tensor and value.args[1:3] == (0, 0):
        value = value.args[0]  # type: ignore[assignment]
    wait = _wait_of(value)
    if not c10d.is_wait(wait) or not c10d.ends_gather(wait):
        return None
    # packed bytes die where they are dequantized; what lives until a release is the tensor made of them
    return value if (value is wait) == (packed_by(wait) is None) else None


def _wait_of(full: fx.Node) -> fx.Node:
    return first_argument(full) if full.target is dequantize_blockwise else full


def _gathers_parameter(full: fx.Node) -> bool:
    """Whether a node yields a gathered parameter input, as it is or as it was cast or packed to travel."""
    if _unsharded(full) is None or c10d.moves_parts(c10d.launched_by(_wait_of(full))):
        return False
    return c10d.parameter_sent(c10d.sent_to(_wait_of(full))) is not None


def _computed_from_parameters(context: Context) -> set[fx.Node]:
    """The nodes that are computed from parameters and nothing else (a cast, a packed bucket)."""
    found = set(context.step.inputs("parameter"))
    for node in context.calls:
        if node.all_input_nodes and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def check_sharding(context: Context) -> Iterator[Violation]:
    """Shards have the rows that they say; no forward or backward takes a parameter's shard for the whole."""
    shards: set[fx.Node] = set()  # sharded parameters, and what is still their shard
    for node in context.step.graph.nodes:
        if node.op == "output":
            continue
        yield from _check_rows(node, context.step.mesh)
        yield from _check_axis(node)
        if node.op == "placeholder":
            yield from _check_input(node, context.step.mesh)
            if node.meta["entry"].kind == "parameter" and "sharding" in node.meta:
                shards.add(node)
        read = [source for source in node.all_input_nodes if source in shards]
        if not read or node.meta["phase"] == "update" or node.target in (*_GATHERS, quantize_blockwise):
            continue  # the rule 'compression' sees to it that a packed shard is gathered
        if node.meta.get("sharding") != read[0].meta["sharding"]:
            got = f"a read of the shard %{read[0].name} as if it were the whole tensor"
            yield Violation(node, "gathered parameters", got, "read the wait of an all_gather")
        shards.add(node)


def _check_rows(node: fx.Node, mesh: dict[str, int]) -> Iterator[Violation]:
    sharding: Sharding | None = node.meta.get("sharding")
    if sharding is None:
        return
    where, fix = f"{equation(node)} with {sharding}", "let meta['sharding'] and meta['val'] change together"
    if mesh.get(sharding.axis) != sharding.num_shards:
        yield Violation(where, f"an axis of the mesh {mesh} with as many ranks", sharding.axis, fix)
    val = node.meta["val"]
    rows = ops.shard_rows(sharding.rows, sharding.num_shards)
    if not isinstance(val, torch.Tensor) or val.dim() == 0 or val.shape[0] != rows:
        got = str(tuple(val.shape)) if isinstance(val, torch.Tensor) else type(val).__name__
        yield Violation(where, f"a tensor of {rows} rows", got, fix)


def _check_axis(node: fx.Node) -> Iterator[Violation]:
    """A shard is gathered over the axis that it is split over, and scattered over the axis that it says."""
    if node.target not in (*_GATHERS, c10d.reduce_scatter):
        return
    for shard in c10d.sent(node) if node.target in _GATHERS else [node]:
        if shard.target is quantize_blockwise:
            shard = first_argument(shard)
        sharding: Sharding | None = shard.meta.get("sharding")
        if sharding is not None and sharding.axis != c10d.axis_of(node):
            fix = "name the axis of meta['sharding']"
            yield Violation(node, f"axis {sharding.axis} of {sharding}", c10d.axis_of(node), fix)


def _check_input(node: fx.Node, mesh: dict[str, int]) -> Iterator[Violation]:
    entry, val, sharding = node.meta["entry"], node.meta["val"], node.meta.get("sharding")
    if entry.kind == "coordinate" and entry.name not in mesh:
        yield Violation(node, f"an axis of the mesh {mesh}", entry.name, "use coordinate()")
    if entry.kind not in (*STATE_KINDS, *CARRIED_KINDS) or not isinstance(val, torch.Tensor):
        return
    shape = (sharding.rows if sharding else val.shape[0], *val.shape[1:]) if val.dim() else ()
    placements = node.meta.get("placements", {})
    where, expected = f"input {entry.key}", f"shape {tuple(entry.shape)}, or a shard of it"
    in_blocks = [f"{p} over {axis}" for axis, p in placements.items() if p.blocks != 1]
    if in_blocks and entry.kind in STATE_KINDS:
        got = f"{tuple(val.shape)}, {', '.join(in_blocks)}"
        yield Violation(where, expected, got, "state rests as R or S(dim): convert it where it is used")
    elif whole_shape(shape, placements, mesh) != tuple(entry.shape):
        fix = "set meta['sharding'] where an input becomes a shard, meta['placements'] where another axis splits it"
        got = ", ".join([str(tuple(val.shape)), *(f"{p} over {axis}" for axis, p in placements.items())])
        yield Violation(where, expected, got, fix)
