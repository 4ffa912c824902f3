"""Fewer activations at almost no cost: pointwise results whose inputs are kept anyway are computed again in backward.

The normalized input of a layer norm, the activated half of a gated MLP, the product of the two: each is read once
more in backward, and each follows by one cheap op from tensors that backward holds for other reasons. (What Inductor's
min-cut partitioner finds for fused graphs; here only ops whose inputs are alive regardless, so that memory can only
fall.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph, kernel_ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import is_getitem, is_view, iter_views, num_bytes, yields_scalar, yields_tensor

aten = torch.ops.aten

_CHEAP = {aten.clone.default, aten._to_copy.default, aten._unsafe_view.default}
# what models write as pointwise ops and one mean: a pass over memory, too
_CHEAP_KERNELS = {kernel_ops.OPS["rms_norm"][0], kernel_ops.OPS["gated_activation"][0]}
# tagged pointwise, but not cheap enough to be done twice
_DEAR = {aten.pow.Tensor_Tensor, aten.erfinv.default, aten.lgamma.default, aten.digamma.default}


@graph_pass(requires=("captured",), provides=("pointwise-recomputed",))
def recompute_pointwise(step: StepGraph, *, min_bytes: int = 2**16) -> int:
    """Compute pointwise activations again, just before their first reader in backward, where that frees memory.

    Args:
        step: the graph, not yet sharded.
        min_bytes: tensors smaller than this stay kept.
    """
    position: dict[fx.Node, float] = dict(step.positions())
    wanted, again = _wanted(step, min_bytes)
    twins: dict[fx.Node, fx.Node] = {}
    for node in reversed(wanted):  # so that a twin made for a later result serves the earlier ones too
        readers = backward_readers(node)
        first = min(readers, key=position.__getitem__)
        twin = had_again(node, first, again, twins, position)
        for reader in readers:
            reader.replace_input_with(node, twin)
    return len(wanted)


def pointwise_again(step: StepGraph, *, min_bytes: int = 2**16) -> set[fx.Node]:
    """The forward results that the pass would compute again, with those that they follow from."""
    wanted, again = _wanted(step, min_bytes)
    found = set(wanted)
    while wanted:
        missing = [s for s in wanted.pop().all_input_nodes if s in again and s not in found]
        found.update(missing)
        wanted += missing
    return found


def backward_readers(node: fx.Node) -> list[fx.Node]:
    """The calls of backward that read a value."""
    return [user for user in node.users if user.meta.get("phase") == "backward"]


def _wanted(step: StepGraph, min_bytes: int) -> tuple[list[fx.Node], set[fx.Node]]:
    """The results that are worth it, in order, and all that can be had again."""
    forward = step.phase("forward")
    again = _can_be_had_again(step, forward)
    large = [node for node in forward if node in again and num_bytes(node.meta["val"]) >= min_bytes]
    return [node for node in large if backward_readers(node)], again


def _can_be_had_again(step: StepGraph, forward: list[fx.Node]) -> set[fx.Node]:
    """Forward results that follow by cheap ops from what backward holds whatever this pass does."""
    held = {node for node in step.placeholders if _is_read_in_backward(node) or node.meta["entry"].kind != "parameter"}
    again: set[fx.Node] = set()
    for node in forward:
        if yields_scalar(node):
            held.add(node)
        elif _is_cheap(node) and all(source in held or source in again for source in node.all_input_nodes):
            again.add(node)
        elif _is_read_in_backward(node):
            held.add(node)
    return again


def _is_read_in_backward(node: fx.Node) -> bool:
    users = [*node.users, *(u for view in iter_views(node) for u in view.users)]
    return any(user.meta.get("phase") == "backward" for user in users)


def _is_cheap(node: fx.Node) -> bool:
    target: Any = node.target
    source: Any = node.args[0] if is_getitem(node) else node
    if source.target in _CHEAP_KERNELS:
        return True
    if not compat.is_op(target) or not yields_tensor(node) or is_random(node) or not node.all_input_nodes:
        return False
    return target not in _DEAR and (torch.Tag.pointwise in target.tags or is_view(node) or target in _CHEAP)


def had_again(
    node: fx.Node,
    reader: fx.Node,
    again: set[fx.Node],
    twins: dict[fx.Node, fx.Node],
    position: dict[fx.Node, float],
) -> fx.Node:
    """The node's copy before `reader`, with copies of whatever it follows from that backward does not hold.

    Args:
        node: a forward result.
        reader: of backward.
        again: the forward results that may be copied; all others are read where they are.
        twins: copies made so far; grows.
        position: node -> its place in the program; grows.
    """
    wanted = [node]
    while wanted:  # a block's chain is longer than Python's stack is deep
        last = wanted[-1]
        known = twins.get(last)
        missing = [s for s in last.all_input_nodes if s in again and not _stands_before(twins.get(s), reader, position)]
        if _stands_before(known, reader, position):
            wanted.pop()
        elif missing:
            wanted += missing
        else:
            wanted.pop()
            sources = {s: twins[s] for s in last.all_input_nodes if s in again}
            with last.graph.inserting_before(reader):
                twin = last.graph.node_copy(last, lambda n, sources=sources: sources.get(n, n))  # type: ignore[misc]
            twin.meta = {**last.meta, "phase": "backward"}
            position[twin] = position[reader] - 0.5
            twins[last] = twin
    return twins[node]


def _stands_before(twin: fx.Node | None, reader: fx.Node, position: dict[fx.Node, float]) -> bool:
    return twin is not None and position[twin] < position[reader]
