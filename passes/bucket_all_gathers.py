"""Several gathers, one launch: latency is paid once a bucket."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, move_launch
from fxzero.graph.step_graph import num_bytes
from fxzero.schedule.traffic import alike


@graph_pass(requires=("parameters-sharded",), provides=("gathers-bucketed",))
def bucket_all_gathers(step: StepGraph, *, bucket_bytes: int | None, form: str = "coalesced") -> int:
    """Launch gathers of a phase together: consecutive ones up to `bucket_bytes`, or those that were chosen.

    Every tensor keeps a buffer and a wait of its own (nothing is packed or copied).

    Args:
        step: the graph.
        bucket_bytes: bytes of gathered tensors, as they travel, in a bucket; 0 leaves each gather alone; None: as
            `choose_buckets` has numbered them.
        form: "coalesced" (one collective over several tensors) or "separate" (launched back to back, which gloo
            runs faster).
    """
    gathers = [n for n in step.calls(c10d.all_gather) if c10d.gathers_parameters(n)]
    buckets = make_buckets(gathers, bucket_bytes, size_of=lambda n: num_bytes(n.meta["val"]))
    for bucket in buckets:
        launch_together(step, bucket, at=bucket[0], form=form)
    return sum(len(bucket) for bucket in buckets)


def make_buckets(nodes: list[fx.Node], limit: int | None, *, size_of: Callable[[fx.Node], int]) -> list[list[fx.Node]]:
    """Cut collectives, in order, into runs of two or more of one kind, axis, phase and dtype, within `limit` bytes.

    Without a limit, those of one number (`meta["bucket"]`) are together.
    """
    if limit is None:
        return _numbered(nodes)
    buckets: list[list[fx.Node]] = []
    total = 0
    for node in nodes:
        size = size_of(node)
        if buckets and alike(buckets[-1][0]) == alike(node) and total + size <= limit:
            buckets[-1].append(node)
            total += size
        else:
            buckets.append([node])
            total = size
    return [bucket for bucket in buckets if len(bucket) > 1]


def _numbered(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Collectives by the number of their bucket; those that have none stay alone."""
    buckets: dict[object, list[fx.Node]] = {}
    for node in nodes:
        if "bucket" in node.meta:
            buckets.setdefault((node.meta["bucket"], alike(node)), []).append(node)
    return [bucket for bucket in buckets.values() if len(bucket) > 1]


def launch_together(step: StepGraph, bucket: list[fx.Node], *, at: fx.Node, form: str) -> None:
    """Launch the collectives of a bucket where `at` stands, as one coalesced collective or back to back."""
    if form == "separate":
        for node in bucket:
            if node is not at:
                move_launch(node, before=at)
        return
    for node in bucket:
        if node is not at:
            move_launch(node, before=at)
    first = bucket[0]
    editor = Editor(step, phase=at.meta["phase"], module=at.meta["module"])
    with editor.before(at):
        sources = [node.args[0] for node in bucket]
        coalesced = c10d.COALESCED[first.target]  # type: ignore[index]
        joint = editor.call(coalesced, sources, *first.args[1:], name=f"{first.name}_bucket")
        for index, node in enumerate(bucket):
            part = editor.call(operator.getitem, joint, index)
            part.meta = {**node.meta}
            node.replace_all_uses_with(part)
    for node in bucket:
        step.graph.erase_node(node)
