"""Chosen forward results are computed again in backward; all others are read where they are.

What `fxzero.decide` has chosen, node by node. A node's copy stands just before its first reader in backward, and there
is one copy of each: those that are needed first are made first, and later readers find them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import is_getitem, yields_scalar, yields_tensor
from fxzero.passes.recompute_pointwise import backward_readers, had_again

aten = torch.ops.aten


@graph_pass(requires=("captured",), provides=("chosen-recomputed",))
def recompute_chosen(step: StepGraph, *, names: tuple[str, ...] = ()) -> int:
    """Compute the named forward results that backward reads again, from those that are not named.

    Args:
        step: the graph, not yet sharded.
        names: of forward nodes. A mask among them (what bernoulli draws) is never drawn again: it is kept as booleans,
            one byte an element, and backward reads it back from those.

    Raises:
        RewriteError: if a name is that of no forward node, or of one that cannot be had again.
    """
    position: dict[fx.Node, float] = dict(step.positions())
    chosen = _chosen(step, names)
    masks = [node for node in chosen if is_mask(node)]
    again = {node for node in chosen if not is_mask(node)}
    read = [node for node in chosen if node in again and yields_tensor(node) and backward_readers(node)]
    first = {node: min(backward_readers(node), key=position.__getitem__) for node in read}
    twins: dict[fx.Node, fx.Node] = {}
    for node in sorted(read, key=lambda n: (position[first[n]], -position[n])):
        readers = backward_readers(node)
        twin = had_again(node, first[node], again, twins, position)
        for reader in readers:
            reader.replace_input_with(node, twin)
    return len(read) + sum(keep_as_bool(step, mask, position) for mask in masks)


def _chosen(step: StepGraph, names: tuple[str, ...]) -> list[fx.Node]:
    """The nodes of these names, in forward order."""
    wanted = set(names)
    found = [node for node in step.phase("forward") if node.name in wanted]
    missing = sorted(wanted - {node.name for node in found})
    if missing:
        raise RewriteError.of(
            where=f"recompute_chosen, %{missing[0]}",
            expected="a node of forward",
            got="none of that name",
            fix="name nodes as the captured graph does: fxzero dump --after capture",
        )
    for node in found:
        if not can_be_had_again(node) and not is_mask(node):
            drawn = is_random(node) or any(is_random(source) for source in node.all_input_nodes)
            raise RewriteError.of(
                where=f"recompute_chosen, %{node.name} of {node.meta['module'] or 'the model'}",
                expected="a tensor that follows from others",
                got=f"{node.target}, {'which draws random numbers' if drawn else 'a number or a Python function'}",
                fix="leave the name out: the value is then kept",
            )
    return found


def can_be_had_again(node: fx.Node) -> bool:
    """Whether a call gives the same tensors a second time: it draws nothing and is no number of the host's."""
    if node.op != "call_function" or is_random(node) or yields_scalar(node):
        return False
    if is_getitem(node):
        return not is_random(node.all_input_nodes[0])
    target: Any = node.target
    return compat.is_op(target) and not target._schema.is_mutable


def is_mask(node: fx.Node) -> bool:
    """Whether a call draws zeros and ones, which one byte an element holds."""
    return node.target is aten.bernoulli.p


def keep_as_bool(step: StepGraph, mask: fx.Node, position: dict[fx.Node, float]) -> int:
    """Keep a mask that backward reads as booleans; returns whether it does.

    Args:
        step: the graph.
        mask: see `is_mask`.
        position: node -> its place in the program; grows.
    """
    readers = backward_readers(mask)
    if not readers:
        return 0
    first = min(readers, key=position.__getitem__)
    dtype = mask.meta["val"].dtype
    with Editor(step, phase="forward", module=mask.meta["module"]).after(mask) as editor:
        kept = editor.call(aten._to_copy.default, mask, dtype=torch.bool)
    with Editor(step, phase="backward", module=mask.meta["module"]).before(first) as editor:
        read = editor.call(aten._to_copy.default, kept, dtype=dtype)
    position[kept], position[read] = position[mask] + 0.25, position[first] - 0.75
    for reader in readers:
        reader.replace_input_with(mask, read)
    return 1
