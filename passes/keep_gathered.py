"""A parameter whose second gather costs more than its memory is worth stays gathered from forward to backward.

What `reshard_after_forward=False` is to a module of FSDP2, for single tensors: the rest of ZeRO-3 stays as it is.
"""

from __future__ import annotations

from torch import fx

from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.step_graph import iter_views


@graph_pass(requires=("buckets-chosen",), provides=("some-stay-gathered",))
def keep_gathered(step: StepGraph) -> int:
    """Let backward read what forward gathered, where `choose_buckets` says so; released once, after backward.

    Args:
        step: the graph.

    Raises:
        RewriteError: if forward has gathered no such tensor.
    """
    first: dict[fx.Node, fx.Node] = {}
    edits = 0
    for launch in step.calls(c10d.all_gather):
        parameter = c10d.parameter_gathered(launch)
        if parameter is None or launch.meta["phase"] == "update":
            continue
        if not launch.meta.get("stays"):
            first.setdefault(parameter, launch)
            continue
        if parameter not in first or not _alike(first[parameter], launch):
            raise RewriteError.of(
                f"%{launch.name}",
                expected="the same tensor gathered in forward",
                got="none" if parameter not in first else f"%{first[parameter].name}",
                fix="set regather=True, and report this graph",
            )
        _stay(step, first[parameter], launch)
        edits += 1
    return edits


def _alike(before: fx.Node, launch: fx.Node) -> bool:
    a, b = before.meta["val"], launch.meta["val"]
    return a.dtype == b.dtype and a.shape == b.shape


def _stay(step: StepGraph, before: fx.Node, launch: fx.Node) -> None:
    """Leave out the gather `launch`; its readers, and its release, take what `before` has gathered."""
    (arrived,) = before.users
    (again,) = launch.users
    values = [arrived, *iter_views(arrived)]
    for release in {user for value in values for user in value.users if c10d.is_release(user)}:
        step.graph.erase_node(release)
    again.replace_all_uses_with(arrived)
    dead = [again]
    while dead:
        node = dead.pop(0)
        if node.op == "call_function" and not node.users:
            dead += [source for source in node.all_input_nodes if source not in dead]
            step.graph.erase_node(node)
