"""Activations leave the device between their last reader in forward and their first in backward.

Source: vDNN (Rhu et al., 2016); ZeRO-Infinity (Rajbhandari et al., 2021).
"""

from __future__ import annotations

from torch import fx

from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import is_getitem, is_view, iter_views, tensor_val, yields_tensor
from fxzero.graph.swaps import store, take_in


@graph_pass(requires=("updates-placed",), provides=("activations-offloaded",))
def offload_activations(
    step: StepGraph,
    *,
    tier: str = "host",
    names: tuple[tuple[str, str], ...] | None = None,
    below: int = 0,
    min_gap: int = 64,
) -> int:
    """Swap activations out when forward has read them for the last time, and in when backward first does.

    Args:
        step: the graph, recomputation decided and updates placed.
        tier: "host" or "nvme", without names.
        names: of the forward nodes whose values leave, where backward still reads them, each with its tier; None: all
            that are worth it.
        below: without names, tensors with fewer elements stay.
        min_gap: without names, a tensor that fewer calls than this neither read nor make stays.

    Raises:
        RewriteError: if a name is of no forward node.
    """
    position = step.positions()
    gaps = {node: gap for node in step.phase("forward") if (gap := _gap(node, position)) is not None}
    returned = set(step.output.all_input_nodes)
    gaps = {node: gap for node, gap in gaps.items() if not returned & {node, *iter_views(node)}}
    if names is None:
        far = [n for n, (out, back) in gaps.items() if back - out >= min_gap and tensor_val(n).numel() >= below]
        chosen = dict.fromkeys(far, tier)
    else:
        tiers = dict(names)
        chosen = {node: tiers[node.name] for node in gaps if node.name in tiers}
        unknown = sorted(tiers.keys() - {node.name for node in step.phase("forward")})
        if unknown:
            raise RewriteError.of(
                "offload_activations(names)",
                expected="names of forward nodes",
                got=", ".join(unknown[:3]),
                fix="take them from this step",
            )
    nodes = list(step.graph.nodes)
    for node, where in chosen.items():
        out, back = gaps[node]
        _swap(step, node, nodes[out], nodes[back], where, position)
    return len(chosen)


def _gap(node: fx.Node, position: dict[fx.Node, int]) -> tuple[int, int] | None:
    """(position of the last forward node that has to do with a tensor, of the first in backward) for activations."""
    if not yields_tensor(node) or is_view(node) or c10d.is_collective(node) or c10d.is_wait(node):
        return None
    if is_getitem(node) and (is_view(node.all_input_nodes[0]) or c10d.is_collective(node.all_input_nodes[0])):
        return None
    aliases = [node, *iter_views(node)]
    readers = {user for alias in aliases for user in alias.users if user.op == "call_function"}
    backward = [position[n] for n in readers if n.meta["phase"] != "forward"]
    if not backward:
        return None
    here = [n for n in (*aliases, *readers) if n.meta["phase"] == "forward"]
    out = max(position[n] for n in here)
    return (out, min(backward)) if out < min(backward) else None


def _swap(
    step: StepGraph, node: fx.Node, last: fx.Node, first: fx.Node, tier: str, position: dict[fx.Node, int]
) -> None:
    meta = {"module": node.meta["module"]}
    with Editor(step, phase="forward", **meta).after(last) as editor:
        stored = store(editor, node, tier, stem=node.name)
    editor = Editor(step, phase="backward", **meta)
    here: dict[fx.Node, fx.Node] = {}
    with editor.before(first):
        here[node] = take_in(editor, stored, stem=node.name)
    views = sorted((view for view in iter_views(node) if view.meta["phase"] == "forward"), key=position.__getitem__)
    wanted: set[fx.Node] = set()
    for view in reversed(views):  # those that lead to backward through other views, too
        if any(
            user.op == "call_function" and (user.meta["phase"] != "forward" or user in wanted) for user in view.users
        ):
            wanted.add(view)
    for view in views:
        if view in wanted:
            with step.graph.inserting_before(first):
                here[view] = step.graph.node_copy(view, lambda n: here.get(n, n))
            here[view].meta = {**view.meta, "phase": "backward"}
    for old, new in here.items():
        for user in list(old.users):
            if user.op == "call_function" and user.meta["phase"] != "forward" and user is not new:
                user.replace_input_with(old, new)
