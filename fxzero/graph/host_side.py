"""What a step computes on the host and what on the device, as two graphs that meet at 0-dim tensors.

[Note: numbers by address]
A CUDA graph launches again what was launched when it was captured, with the same arguments: a learning rate given as a
Python number would keep the value of that step. So a number that may change from step to step is handed over as a
0-dim tensor (`on_device`), which the device reads at an address; the host writes the next value there before each
replay. The host's part needs nothing of the device: step counts, hyperparameters and what follows from them. A rank's
coordinate never changes, so it may stay a number.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxzero.graph import ops
from fxzero.graph.step_graph import (
    StateEntry,
    StepGraph,
    ancestors,
    device_of,
    first_argument,
    yields_scalar,
    yields_tensor,
)
from fxzero.graph.synchronisation import host_values

NUMBER = "number"  # the kind of a result of the host's graph that the device's graph takes as an input
_NEVER_CHANGES = ("constant", "coordinate")


def numbers_that_change(step: StepGraph) -> set[fx.Node]:
    """Numbers and 0-dim tensors of the host that may have another value at each step."""
    host, elsewhere = host_values(step), device_of(step) != "cpu"
    found: set[fx.Node] = set()
    for node in step.graph.nodes:
        if not (yields_scalar(node) or (_is_scalar_on_cpu(node) and (node in host or elsewhere))):
            continue
        if node.op == "placeholder":
            changes = node.meta["entry"].kind not in _NEVER_CHANGES
        else:
            changes = any(source in found for source in node.all_input_nodes)
        if changes:
            found.add(node)
    return found


def _is_scalar_on_cpu(node: fx.Node) -> bool:
    return yields_tensor(node) and node.meta["val"].device.type == "cpu" and not node.meta["val"].dim()


def split_at_numbers(step: StepGraph) -> tuple[StepGraph, StepGraph]:
    """The host's part of a step and the device's, which takes the host's numbers as inputs.

    Args:
        step: whose calls on the device read no number that changes but by `on_device`; it is not changed.

    Returns:
        (the host's, the device's). The host's returns (NUMBER, name of the `on_device` call), in the order of these
        calls, and what the step returns of it; the device's has an input for each, of kind "constant" and that name.
    """
    numbers = numbers_that_change(step)
    handed = step.calls(ops.on_device)
    results = step.results
    kept = {key: node for key, node in results.items() if node in numbers}
    wanted = {(NUMBER, node.name): first_argument(node) for node in handed} | kept
    needed = ancestors(wanted.values()) | {node for node in step.placeholders if node.meta["entry"].key in kept}
    host = _part(step, needed.__contains__, wanted, title="numbers of a step")
    of_device = {key: node for key, node in results.items() if node not in numbers}
    device = _part(step, lambda node: node not in numbers, of_device, title=step.title, handed=handed)
    return host, device


def _part(
    step: StepGraph,
    belongs: Callable[[fx.Node], bool],
    results: dict[tuple[str, str], fx.Node],
    *,
    title: str,
    handed: list[fx.Node] | None = None,
) -> StepGraph:
    """A copy of some nodes of a graph.

    Args:
        step: the graph.
        belongs: whether a node is one of them.
        results: what the copy returns.
        title: of the copy.
        handed: calls that become inputs.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in step.placeholders:
        if belongs(node):
            mapping[node] = graph.node_copy(node)
    for node in handed or ():
        mapping[node] = graph.placeholder(node.name)
        entry = StateEntry("constant", node.name)
        mapping[node].meta = {key: value for key, value in node.meta.items() if key != "region"} | {"entry": entry}
    for node in step.calls():
        if belongs(node) and node not in mapping:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    out = StepGraph(graph, dict(step.mesh), title, step.facts)
    graph.output(()).meta["results"] = ()
    out.set_results({key: mapping[node] for key, node in results.items()})
    return out
