"""Gradients are reduced in buckets, in the order in which backward yields them."""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.step_graph import first_argument, num_bytes
from fxzero.passes.bucket_all_gathers import launch_together, make_buckets


@graph_pass(requires=("gradients-reduced",), provides=("reductions-bucketed",))
def bucket_reduce_scatters(step: StepGraph, *, bucket_bytes: int | None, form: str = "coalesced") -> int:
    """Launch consecutive reductions (reduce-scatter, all-reduce) of gradients together, at the last gradient.

    Args:
        step: the graph.
        bucket_bytes: bytes of unreduced gradients in a bucket; 0 leaves each reduction alone; None: as
            `choose_buckets` has numbered them.
        form: "coalesced"; with "separate" each reduction stays where its gradient is born, which is earliest.
    """
    if form == "separate":
        return 0
    edits = 0
    for target in (c10d.reduce_scatter, c10d.all_reduce):
        nodes = _independent(
            [n for n in step.calls(target) if n.meta["phase"] == "backward" and not c10d.moves_parts(n)]
        )
        for bucket in make_buckets(nodes, bucket_bytes, size_of=lambda n: num_bytes(first_argument(n).meta["val"])):
            delay_waits(bucket, step.positions())
            launch_together(step, bucket, at=bucket[-1], form=form)
            edits += len(bucket)
    return edits


def _independent(launches: list[fx.Node]) -> list[fx.Node]:
    """Those that follow from no other one over their axis (the second reduction of PowerSGD does)."""
    follows: dict[str, set[fx.Node]] = {}
    found = []
    for launch in launches:
        after = follows.setdefault(c10d.axis_of(launch), set())
        if launch not in after:
            found.append(launch)
            after |= _downstream([launch])
    return found


def _downstream(launches: list[fx.Node]) -> set[fx.Node]:
    """What hangs on collectives in backward, themselves left out."""
    found: set[fx.Node] = set()
    stack = [user for launch in launches for user in launch.users]
    while stack:
        node = stack.pop()
        if node not in found and node.op == "call_function" and node.meta["phase"] == "backward":
            found.add(node)
            stack.extend(node.users)
    return found


def delay_waits(bucket: list[fx.Node], position: dict[fx.Node, int]) -> None:
    """What hangs on the reductions of a bucket, and stands before the last of them, moves behind it.

    Args:
        bucket: reductions in program order.
        position: of each node in the program.
    """
    last = bucket[-1]
    found: set[fx.Node] = set()
    stack = [user for node in bucket for user in node.users]
    while stack:
        user = stack.pop()
        if user.op == "call_function" and user not in found and position[user] < position[last]:
            found.add(user)
            stack.extend(user.users)
    anchor = last
    for user in sorted(found, key=position.__getitem__):
        anchor.append(user)
        anchor = user
