"""A joint graph over rows of parameters becomes that of one device, which is what passes take.

The ops of a sharded parameter go: readers read the parameter itself, whole, and its gradient is what it is on one rank.
The passes of the plan then shard it as they do in `fxzero.compile`. [Note: sharded parameters in a loop of one's own]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from fxzero.backend.joint import Joint
from fxzero.backend.unshard_ops import reduce_gradient, unshard
from fxzero.graph import StepGraph
from fxzero.graph.edit import Editor, retype
from fxzero.graph.step_graph import first_argument, is_view

aten = torch.ops.aten


def bring_to_one_device(joint: Joint, mesh: Mapping[str, int]) -> None:
    """Take the ops of sharded parameters out of a graph, which says then what it computes on one device.

    Args:
        joint: forward and backward, or an inference graph.
        mesh: axis -> ranks, of the plan.
    """
    step = joint.step
    step.mesh = dict(mesh)
    joint.again.difference_update(step.calls(unshard))
    parameters = {_made_whole(step, call) for call in step.calls(unshard)}
    _copy_what_is_returned(step, parameters)
    retype(step, [_handed_on(step, call) for call in step.calls(reduce_gradient)])
    step.graph.lint()


def _made_whole(step: StepGraph, call: fx.Node) -> fx.Node:
    """Let readers of a gathered parameter read the parameter; returns it."""
    parameter, whole = first_argument(call), call.meta["val"]
    assert parameter.op == "placeholder", "rows come in as they are read"
    parameter.meta |= {"val": whole, "entry": replace(parameter.meta["entry"], shape=tuple(whole.shape))}
    call.replace_all_uses_with(parameter)
    step.graph.erase_node(call)
    return parameter


def _copy_what_is_returned(step: StepGraph, parameters: set[fx.Node]) -> None:
    """A parameter that is an output, or that one is a view of, is returned as a copy: it will be released."""
    results = step.results
    for key, node in results.items():
        root = node
        while root.op == "call_function" and is_view(root):
            root = first_argument(root)
        if key[0] == "output" and root in parameters:
            with Editor(step, phase="forward", module=node.meta["module"]).after(node) as editor:
                results[key] = editor.call(aten.clone.default, node)
    step.set_results(results)


def _handed_on(step: StepGraph, call: fx.Node) -> fx.Node:
    """Let readers of a reduced gradient read this rank's; returns it."""
    gradient = first_argument(call)
    if gradient.op == "placeholder" or gradient.meta["phase"] != "backward":
        with Editor(step, phase="backward", module=call.meta["module"]).before(call) as editor:
            gradient = editor.call(aten.clone.default, gradient)  # a node of its own, for passes to reduce
    if "grad_of" in call.meta:
        gradient.meta["grad_of"] = (*gradient.meta.get("grad_of", ()), *call.meta["grad_of"])
    call.replace_all_uses_with(gradient)
    step.graph.erase_node(call)
    return gradient
