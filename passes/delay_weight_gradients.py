"""Backward first uses up a gathered parameter and releases it, then computes that parameter's gradient.

Autograd computes the gradient of a weight before the gradient of the layer's input, so the gathered weight would be
alive together with its own gradient: for the largest weights that decides the peak.
"""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass


@graph_pass(requires=("parameters-sharded",), provides=("weight-gradients-delayed",))
def delay_weight_gradients(step: StepGraph) -> int:
    """Move the computation and reduction of each parameter's gradient behind the parameter's last release."""
    position = step.positions()
    releases = {
        node.meta["param"]: node for node in step.calls() if c10d.is_release(node) and node.meta["phase"] == "backward"
    }
    edits = 0
    for name, gradient in step.gradients().items():
        release = releases.get(name)
        if release is None or position[release] < position[gradient]:
            continue
        chain = _only_for(gradient, position)
        behind = _reduction_of(gradient, limit=position[release], position=position)
        anchor = release
        for node in sorted({*chain, *behind}, key=position.__getitem__):
            anchor.append(node)
            anchor = node
            edits += 1
    return edits


def _only_for(gradient: fx.Node, position: dict[fx.Node, int]) -> list[fx.Node]:
    """The gradient and the backward nodes before it that serve nothing else."""
    chain = {gradient}
    stack = list(gradient.all_input_nodes)
    while stack:
        node = stack.pop()
        mine = node.op == "call_function" and node.meta["phase"] == "backward" and not c10d.is_wait(node)
        if mine and node not in chain and all(user in chain for user in node.users):
            chain.add(node)
            stack.extend(node.all_input_nodes)
    return list(chain)


def _reduction_of(gradient: fx.Node, *, limit: int, position: dict[fx.Node, int]) -> list[fx.Node]:
    """What follows from the gradient before `limit`."""
    following: list[fx.Node] = []
    stack = list(gradient.users)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and position[node] < limit and node not in following:
            following.append(node)
            stack.extend(node.users)
    return following
