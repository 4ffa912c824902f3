"""Backward gathers parameters inside a node: what forward gathered over all nodes is kept there once, split over ranks.

What travels a second time then takes the fast links only. It costs memory: between forward and backward a rank holds
1 / node of every gathered message beside its own rows. The kept part is one of the message as it came, quantized or
not, so backward reads the bits that forward read.
Source: ZeRO++ (Wang et al., 2023), section 3.2 (hpZ).
"""

from __future__ import annotations

from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import Sharding, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, value_of
from fxzero.graph.step_graph import identifier


@graph_pass(requires=("parameters-sharded",), provides=("gathers-within-nodes",))
def gather_within_nodes(step: StepGraph, *, axis: str, node: int) -> int:
    """Keep this rank's part of each message that forward gathers; in backward gather those over the ranks of a node.

    Args:
        step: the graph; its mesh gets the axis `<axis>_node`, a part of `axis`: ranks that are neighbours on it.
        axis: the mesh axis over which parameters are gathered.
        node: ranks of a node; divides the size of `axis`.

    Raises:
        PlanError: if nothing is gathered twice.
    """
    inner = c10d.node_axis(axis)
    first: dict[fx.Node, fx.Node] = {}
    edits = 0
    for launch in step.calls(c10d.all_gather):
        parameter = c10d.parameter_gathered(launch)
        if parameter is None or launch.meta["phase"] == "update" or c10d.axis_of(launch) != axis:
            continue
        if launch.meta["phase"] == "forward":
            first.setdefault(parameter, launch)
        elif parameter in first:
            step.mesh[inner] = node
            _gather_kept(step, first[parameter], launch, inner, node)
            edits += 1
    if first and not edits:
        raise PlanError.of(
            "Plan.node_size",
            expected="a parameter that is gathered in forward and again in backward",
            got="none",
            fix="leave node_size out",
        )
    return edits


def _gather_kept(step: StepGraph, before: fx.Node, launch: fx.Node, inner: str, node: int) -> None:
    """Let `launch` gather what is kept of that which `before` has gathered."""
    (arrived,) = before.users
    (wait,) = launch.users
    message = arrived.meta["val"]
    assert tuple(message.shape) == tuple(wait.meta["val"].shape) and message.dtype == wait.meta["val"].dtype
    sharding = Sharding(inner, node, message.shape[0])
    name = launch.meta["param"]
    editor = Editor(step, phase="forward", module=before.meta["module"], param=name)
    with editor.after(arrived):
        kept = editor.local_shard(arrived, sharding, stem=f"{identifier(name)}_node")
    launch.args = (kept, node, inner)
    launch.meta["val"] = value_of(step, launch, editor.mode)
