"""Data parallelism at its plainest: every gradient is averaged over the data-parallel ranks."""

from __future__ import annotations

import torch
from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import WEIGHTS, first_argument, identifier

aten = torch.ops.aten


@graph_pass(requires=("captured",), provides=("gradients-reduced",))
def reduce_gradients(step: StepGraph, *, axes: tuple[str, ...]) -> int:
    """Average each gradient over the given mesh axes, one all-reduce an axis, before the update reads it.

    Gradients that are handed on unreduced stay so. Where microbatches have weights, the sum of a rank's weights is
    averaged too: losses are then parts of the weighted mean over all ranks.

    Args:
        step: the graph.
        axes: the mesh axes over which the batch is split, the one that shards first.
    """
    edits = 0
    results = step.results
    for name, gradient in step.gradients().items():
        readers = [user for user in gradient.users if user.op != "output" and user.meta["phase"] == "update"]
        returned = [key for key, node in results.items() if node is gradient and key[0] != "unreduced"]
        if not readers and not returned:
            continue
        editor = Editor(step, phase="backward", module=gradient.meta["module"], param=name)
        with editor.after(gradient):
            reduced = _averaged(editor, gradient, axes, stem=f"{identifier(name)}{{}}_grad")
        for reader in readers:
            reader.replace_input_with(gradient, reduced)
        results.update(dict.fromkeys(returned, reduced))
        edits += len(axes)
    step.set_results(results)
    for total in _sums_of_weights(step):
        readers = list(total.users)
        editor = Editor(step, phase="forward")
        with editor.after(total):
            average = _averaged(editor, total, axes, stem="weights{}")
        for reader in readers:
            reader.replace_input_with(total, average)
        edits += len(axes)
    return edits


def _averaged(editor: Editor, node: fx.Node, axes: tuple[str, ...], *, stem: str) -> fx.Node:
    for axis in axes:
        node = editor.all_reduce(node, axis, op="avg", stem=stem.format("" if axis == axes[0] else f"_{axis}"))
    return node


def _sums_of_weights(step: StepGraph) -> list[fx.Node]:
    weights = step.input("batch", WEIGHTS)
    return [] if weights is None else [user for user in weights.users if user.target is aten.sum.default]


def gradient_reductions(step: StepGraph, axis: str) -> list[fx.Node]:
    """The reductions of gradients over an axis, in program order."""
    targets = (c10d.reduce_scatter, c10d.all_reduce)
    launches = [n for n in step.calls(*targets) if n.meta["phase"] == "backward" and "param" in n.meta]
    return [n for n in launches if c10d.axis_of(n) == axis]


def own_gradient(launch: fx.Node) -> fx.Node:
    """This rank's gradient that a reduction takes, without the rows that were appended for it."""
    source = first_argument(launch)
    return first_argument(source) if source.target is aten.constant_pad_nd.default else source


def replace_reduction(launch: fx.Node, value: fx.Node) -> None:
    """Readers of a reduction read `value` instead; nothing of it stays but the gradient that it took."""
    (waited,) = launch.users
    source = first_argument(launch)
    waited.replace_all_uses_with(value)
    dead = [waited, launch]
    if "grad_of" not in source.meta and set(source.users) == {launch}:
        dead.append(source)  # padding, or the contiguous copy that a collective needs
    for node in dead:
        node.graph.erase_node(node)
