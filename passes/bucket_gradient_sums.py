"""Gradients of parameters that an axis leaves whole are added up over it in buckets.

Over sp (and over ep, but for experts) these are all gradients, over tp those of norms and some biases: many small
messages, of which each costs the latency of a ring. What is added up over such an axis is a gradient of one batch, so
this is no data parallelism, and comes before it: rows over dp are reduced of what is whole.
"""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.step_graph import first_argument, is_view, num_bytes
from fxzero.passes.bucket_all_gathers import launch_together, make_buckets
from fxzero.passes.bucket_reduce_scatters import delay_waits


@graph_pass(requires=("tensors-split",), provides=("gradient-sums-bucketed",))
def bucket_gradient_sums(step: StepGraph, *, bucket_bytes: int) -> int:
    """Launch consecutive all-reduces of gradients over an axis that splits values as one, at the last gradient.

    Args:
        step: the graph.
        bucket_bytes: bytes of gradients in a bucket; 0 leaves each alone.
    """
    edits = 0
    for axis in dict.fromkeys(map(c10d.axis_of, filter(_adds_up_gradient, step.calls(c10d.all_reduce)))):
        launches = [n for n in step.calls(c10d.all_reduce) if _adds_up_gradient(n) and c10d.axis_of(n) == axis]
        for bucket in make_buckets(launches, bucket_bytes, size_of=lambda n: num_bytes(first_argument(n).meta["val"])):
            delay_waits(bucket, step.positions())
            launch_together(step, bucket, at=bucket[-1], form="coalesced")
            edits += len(bucket)
    return edits


def _adds_up_gradient(launch: fx.Node) -> bool:
    """Whether what is waited for is a parameter's gradient, or that in another form."""
    if not c10d.moves_parts(launch) or launch.meta["phase"] != "backward" or len(launch.users) != 1:
        return False
    node = next(iter(launch.users))
    while "grad_of" not in node.meta:
        readers = list(node.users)
        if len(readers) != 1 or not (is_view(readers[0]) or c10d.is_wait(readers[0])):
            return False
        node = readers[0]
    return True
