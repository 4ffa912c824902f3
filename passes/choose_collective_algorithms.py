"""A collective may be carried by another one that the backend does better."""

from __future__ import annotations

import torch

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor

aten = torch.ops.aten


@graph_pass(
    requires=("gradients-reduced",),
    provides=("algorithms-chosen",),
    numerics="bitwise for 2 ranks; for more the order of the sum may differ from the backend's: 1e-6 relative",
)
def choose_collective_algorithms(step: StepGraph, *, all_gather: str, reduce_scatter: str) -> int:
    """Say how each all-gather and reduce-scatter is carried.

    gloo's all-gather copies its data twice more than it must, and its reduce-scatter sends as much as an all-reduce;
    messages straight from and to the tensors do neither. Ranks of one host can read each other's memory instead.

    Args:
        step: the graph.
        all_gather: "native", "send_recv" (a message to each peer), or "shared_memory".
        reduce_scatter: as all_gather, or "all_to_all" (followed by a local mean: visible in the graph).
    """
    edits = 0
    for target, algorithm in ((c10d.all_gather, all_gather), (c10d.reduce_scatter, reduce_scatter)):
        for node in step.calls(target):
            if algorithm == "all_to_all" and c10d.moves_parts(node):
                continue
            if algorithm == "all_to_all":
                _as_all_to_all(step, node)
            elif algorithm != "native":
                node.meta["algorithm"] = algorithm
            edits += algorithm != "native"
    return edits


def _as_all_to_all(step: StepGraph, node: torch.fx.Node) -> None:
    source, op, size, axis = node.args
    (waited,) = node.users
    editor = Editor(step, phase=node.meta["phase"], module=node.meta["module"], param=node.meta.get("param"))
    sharding = node.meta["sharding"]
    full = source.meta["val"]  # type: ignore[union-attr]
    rows = full.shape[0] // size  # type: ignore[operator]
    with editor.before(node):
        splits = [rows] * size  # type: ignore[operator]
        sent = editor.call(c10d.all_to_all, source, splits, splits, axis, name=f"{node.name}_all_to_all")
    with editor.before(waited):
        received = editor.call(c10d.wait, sent, name=f"{node.name}_received")
        parts = editor.call(aten.view.default, received, [size, rows, *full.shape[1:]])
        reduction = aten.mean.dim if op == "avg" else aten.sum.dim_IntList
        reduced = editor.call(reduction, parts, [0], sharding=sharding, name=f"{node.name}_rows")
    waited.replace_all_uses_with(reduced)
    step.graph.erase_node(waited)
    step.graph.erase_node(node)
