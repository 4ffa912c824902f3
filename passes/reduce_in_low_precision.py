"""Gradients travel in the dtype that they were computed in; the sum is cast afterwards."""

from __future__ import annotations

import math

import torch
from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, replace_uses, retype
from fxzero.graph.step_graph import first_argument

aten = torch.ops.aten


@graph_pass(
    requires=("gradients-reduced",),
    numerics="rounds the mean of a gradient to the low precision, as FSDP2 does with that reduce_dtype",
)
def reduce_in_low_precision(step: StepGraph) -> int:
    """Cast a gradient to the parameter's dtype after its reduction rather than before it."""
    edits = 0
    for name, gradient in step.gradients().items():
        source = gradient.args[0] if gradient.target is aten._to_copy.default else None
        if not isinstance(source, fx.Node):
            continue
        dtype = gradient.meta["val"].dtype
        last = _last_wait(gradient)
        if last is None or source.meta["val"].dtype.itemsize >= dtype.itemsize:
            continue
        editor = Editor(step, phase="backward", module=gradient.meta["module"], param=name)
        with editor.after(last):
            cast = editor.call(aten._to_copy.default, last, dtype=dtype, sharding=last.meta.get("sharding"))
        replace_uses(last, cast, [user for user in last.users if user is not cast])
        gradient.replace_all_uses_with(source)
        source.meta["grad_of"] = gradient.meta["grad_of"]
        step.graph.erase_node(gradient)
        retype(step, [source])
        if source.meta["val"].dtype == torch.float16:
            _divide_before(editor, source, last)
        edits += 1
    return edits


def _divide_before(editor: Editor, source: fx.Node, last: fx.Node) -> None:
    """Let the sum over n ranks be divided by about the root of n before it, and by the rest after it.

    A mean in float16 would overflow in its sum though it is finite itself. (FSDP2 divides so.)
    """
    launches = []
    node = last
    while node is not source:
        launches += [node] * c10d.is_collective(node)
        node = first_argument(node)
    size = math.prod(editor.step.mesh[c10d.axis_of(launch)] for launch in launches)
    before = 1
    while size % before == 0 and size // before > before:
        before *= 2
    readers = list(source.users)
    with editor.after(source):
        scaled = editor.call(aten.div.Tensor, source, before)
    replace_uses(source, scaled, readers)
    for launch in launches:
        launch.args = tuple("sum" if arg == "avg" else arg for arg in launch.args)
    if size != before:
        readers = list(last.users)
        with editor.after(last):
            rest = editor.call(aten.div.Tensor, last, size / before, sharding=last.meta.get("sharding"))
        replace_uses(last, rest, readers)


def _last_wait(gradient: fx.Node) -> fx.Node | None:
    """The wait that ends the chain of a gradient's reductions."""
    found, node = None, gradient
    while len(node.users) == 1:
        node = next(iter(node.users))
        if c10d.is_wait(node):
            found = node
        elif node.op == "output" or node.meta["phase"] != "backward":
            break
    return found
