"""Where the host must wait for the device: nowhere inside a step, if it is to run ahead.

[Note: as on an accelerator]
On the CPU nothing waits, so a graph captured there could hide such a place until it runs on a GPU. It is therefore
looked at as if the model were on one: only scalars that an optimizer keeps on the host (Adam's `step`) count as host
values, with what is computed from them and from Python numbers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.routing_ops import check_room
from fxzero.graph.step_graph import StepGraph, ancestors, yields_tensor

aten = torch.ops.aten

# the shape of what they yield depends on values, or they yield a number
_READ_VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, check_room}
_BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten._unsafe_index.Tensor, aten._unsafe_index_put.default}


def synchronisations(step: StepGraph) -> dict[str, str]:
    """Name of each node at which the host would wait for the device -> why; see [Note: as on an accelerator]."""
    host = host_values(step)
    found: dict[str, str] = {}
    for node in step.calls():
        if node not in host and any(source not in host for source in node.all_input_nodes if yields_tensor(source)):
            if reason := _reads_values(node):
                found[node.name] = reason
    kept = {node.meta["entry"].key for node in host if node.op == "placeholder"}
    for key, node in step.results.items():
        if key in kept and node not in host:
            found[node.name] = f"{' '.join(key)} is kept on the host, its next value is computed on the device"
    return found


def host_values(step: StepGraph) -> set[fx.Node]:
    """The numbers, the scalars that an optimizer keeps on the host, and what is computed from these alone."""
    scalars = {node for node in step.placeholders if _may_rest_on_host(node)}
    host = _computed_from(step, scalars)
    read = ancestors(node for node in step.calls(aten._local_scalar_dense.default) if node in host)
    # the others (Adam's step under capturable=True, for one) may rest on the device as well
    return host if scalars <= read else _computed_from(step, scalars & read)


def _computed_from(step: StepGraph, scalars: set[fx.Node]) -> set[fx.Node]:
    """These, and the calls that take no tensors but these and what follows from them alone."""
    host = set(scalars)
    for node in step.calls():
        tensors = [source for source in node.all_input_nodes if yields_tensor(source)]
        if all(source in host for source in tensors) and (tensors or _is_host_number(node)):
            host.add(node)
    return host


def _may_rest_on_host(node: fx.Node) -> bool:
    val, kind = node.meta["val"], node.meta["entry"].kind
    if not isinstance(val, torch.Tensor):
        return False
    return val.device.type == "cpu" and val.dim() == 0 and kind in ("optimizer", "hyperparameter")


def _is_host_number(node: fx.Node) -> bool:
    """Whether a call makes a 0-dim tensor of a Python number that nothing but the host needs to know."""
    return node.target in (aten.scalar_tensor.default, aten.lift_fresh_copy.default)


def _reads_values(node: fx.Node) -> str:
    target: Any = node.target
    if not compat.is_op(target):
        return ""
    if target in _READ_VALUES:
        return "reads a tensor's value"
    if target in _BY_INDEX:
        indices = [index for index in node.args[1] if isinstance(index, fx.Node)]  # type: ignore[union-attr]
        masks = [index for index in indices if index.meta["val"].dtype in (torch.bool, torch.uint8)]
        return "finds where a mask is true" if masks else ""
    if torch.Tag.dynamic_output_shape in target.tags or torch.Tag.data_dependent_output in target.tags:
        return "yields a shape that depends on values"
    if target is aten._to_copy.default and not node.kwargs.get("non_blocking"):
        moves = node.args[0].meta["val"].device.type != "cpu" and node.meta["val"].device.type == "cpu"  # type: ignore[union-attr]
        return "copies a tensor to the host" if moves else ""
    return ""
