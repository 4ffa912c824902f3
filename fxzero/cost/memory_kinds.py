"""What each storage of a program is for, told from the graph alone.

    parameters            what rests of them on this rank
    optimizer state       likewise
    buffers and inputs    the model's buffers, what the plan keeps (loss scale, error feedback), the batch, constants
    gathered parameters   copies that forward or backward compute with: gathered, cast, dequantized; updated ones too,
                          and those gathered for the next step
    activations           forward values that backward reads, and those that are computed again in backward
    gradients             of parameters: whole, reduced, scaled, and sums that microbatches hand on
    communication         what is only made to be sent, what arrives and is no other kind, buffers of a collective
    workspace             all else: values that die in the phase that made them, scratch of an op

A storage has the first kind, in the order of `_PRECEDENCE`, that any value in it has. What is brought in from another
tier has the kind of what was brought there: rows of parameters and optimizer state, activations, gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxzero.cost.lifetimes import Storage, is_resting
from fxzero.graph import StepGraph, compression_ops, ops, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import CARRIED_KINDS, LAUNCHED, is_getitem, is_view, iter_views, yields_scalar

aten = torch.ops.aten

PARAMETERS, OPTIMIZER, INPUTS = "parameters", "optimizer state", "buffers and inputs"
GATHERED, ACTIVATIONS, GRADIENTS = "gathered parameters", "activations", "gradients"
COMMUNICATION, WORKSPACE = "communication buffers", "workspace"
KINDS = (PARAMETERS, OPTIMIZER, INPUTS, GATHERED, ACTIVATIONS, GRADIENTS, COMMUNICATION, WORKSPACE)

_PRECEDENCE = (GRADIENTS, GATHERED, COMMUNICATION, ACTIVATIONS)
_OF_ENTRY = {"parameter": PARAMETERS, "optimizer": OPTIMIZER, LAUNCHED: GATHERED}
_OF_ENTRY |= dict.fromkeys(CARRIED_KINDS, GRADIENTS)

# ops that leave a parameter a parameter: another layout, dtype or place
_COPIES = {aten.clone.default, aten._to_copy.default, aten.constant_pad_nd.default, ops.local_shard}
_COPIES |= {compression_ops.quantize_blockwise, compression_ops.dequantize_blockwise}
_GATHERS = {c10d.all_gather, c10d.all_gather_coalesced}
_REDUCES = {c10d.all_reduce, c10d.all_reduce_coalesced, c10d.reduce_scatter, c10d.reduce_scatter_coalesced}
# what may stand between the op that makes a gradient and the value that is marked as one
_JOINS_PARTS = {aten.add.Tensor, aten.clone.default, aten._to_copy.default}


def kinds_of(step: StepGraph, found: Iterable[Storage]) -> dict[Storage, str]:
    """Storage -> one of KINDS."""
    values = _Values(step)
    return {storage: _kind(storage, values) for storage in found}


def _kind(storage: Storage, values: _Values) -> str:
    if storage.is_scratch:
        under_way = c10d.is_collective(storage.node) or c10d.is_ahead(storage.node)
        return COMMUNICATION if under_way else WORKSPACE
    if storage.node.op == "placeholder":
        return _OF_ENTRY.get(storage.node.meta["entry"].kind, INPUTS)
    if storage.node.target is swap_ops.swap_in:
        return values.kind[storage.node]
    kinds = {values.kind[member] for member in storage.members}
    if not storage.members:
        kinds = {values.kind[storage.node]}
    return next((kind for kind in _PRECEDENCE if kind in kinds), WORKSPACE)


class _Values:
    """The kind of each value, by one walk through the program.

    Attributes:
        kind: node -> one of KINDS.
    """

    def __init__(self, step: StepGraph) -> None:
        self.kind: dict[fx.Node, str] = {}
        self._of_loss = {node for (kind, _), node in step.results.items() if kind == "loss"}
        self._returned = {node: kind for (kind, _), node in step.results.items()}
        self._ahead = c10d.launched_for_next(step)
        self._parts = self._parts_of_gradients(step)
        self._parameters: set[fx.Node] = set()
        self._gradients: set[fx.Node] = set()
        for node in step.graph.nodes:
            if node.op == "placeholder":
                self._note_input(node)
            elif node.op == "call_function":
                self.kind[node] = self._of_call(node)

    def _note_input(self, node: fx.Node) -> None:
        kind = node.meta["entry"].kind
        self.kind[node] = _OF_ENTRY.get(kind, INPUTS)
        if kind in ("parameter", LAUNCHED):
            self._parameters.add(node)
        elif not is_resting(node):
            self._gradients.add(node)

    def _of_call(self, node: fx.Node) -> str:
        phase = node.meta["phase"]
        self._note_loss(node)
        if node.target in swap_ops.OPS:
            return self._of_move(node)
        if self._is_parameter(node):
            self._parameters.add(node)
            return COMMUNICATION if _is_message(node) and node.target is not ops.local_shard else GATHERED
        if self._is_gradient(node):
            self._gradients.add(node)
            return COMMUNICATION if _is_message(node) or _is_raw(node) else GRADIENTS
        if self._returned.get(node) in CARRIED_KINDS or node in self._parts:
            return GRADIENTS
        if self._is_updated_parameter(node) or node in self._ahead:
            return GATHERED
        if c10d.is_collective(node) or c10d.is_wait(node) or _is_message(node):
            return COMMUNICATION
        if phase == "forward" and any(_is_kept(user) for user in node.users):
            return ACTIVATIONS
        if phase == "backward" and node not in self._of_loss:  # a forward value, computed again
            return ACTIVATIONS
        return WORKSPACE

    def _of_move(self, node: fx.Node) -> str:
        """The kind of what is on its way off the device, or back."""
        (source,) = node.all_input_nodes
        for known in (self._parameters, self._gradients):
            if source in known:
                known.add(node)
        returned = next((kind for n in (node, *node.users) if (kind := self._returned.get(n)) in _OF_ENTRY), None)
        return self.kind[source] if returned is None else _OF_ENTRY[returned]

    def _note_loss(self, node: fx.Node) -> None:
        """What follows from the loss: all that is differentiated, but not what backward computes of forward again."""
        starts = node.target is aten.ones_like.default and _numel(node) == 1 and node.meta["phase"] == "backward"
        if starts or any(source in self._of_loss for source in node.all_input_nodes):
            self._of_loss.add(node)

    def _is_parameter(self, node: fx.Node) -> bool:
        """Whether forward or backward have a parameter in this value, as it is or as it travels."""
        if node.meta["phase"] == "update" or not node.all_input_nodes:
            return False
        carries = node.target in _COPIES or node.target in _GATHERS or c10d.is_wait(node)
        carries = carries or is_view(node) or is_getitem(node)
        tensors = [n for n in node.all_input_nodes if not yields_scalar(n)]
        return carries and all(source in self._parameters for source in tensors)

    def _is_gradient(self, node: fx.Node) -> bool:
        """Whether this is a parameter's gradient, or follows from one on its way to the update."""
        if "grad_of" in node.meta:
            return True
        sources = [source for source in node.all_input_nodes if source in self._gradients]
        if not sources:
            return False
        if node.meta["phase"] != "update":
            return True
        if c10d.is_collective(node) or c10d.is_wait(node) or is_view(node) or node.target is ops.local_shard:
            return True
        others = [n for n in node.all_input_nodes if n not in self._gradients]
        return all(_numel(n) == 1 for n in others) and _numel(node) == _numel(sources[0]) > 1

    def _is_updated_parameter(self, node: fx.Node) -> bool:
        """Whether the update gathers a parameter's new value from all ranks."""
        if node.meta["phase"] != "update" or not c10d.is_wait(node):
            return False
        readers = (node, *iter_views(node))
        return any(self._returned.get(value) == "parameter" for value in readers)

    def _parts_of_gradients(self, step: StepGraph) -> set[fx.Node]:
        """What backward only makes to become a gradient: parts of a sum, a gradient in another dtype or layout."""
        parts: set[fx.Node] = set()
        for node in reversed(step.phase("backward")):
            if "grad_of" in node.meta or not node.users:
                continue
            if all(("grad_of" in u.meta or u in parts) and _joins(u) and _numel(u) == _numel(node) for u in node.users):
                parts.add(node)
        return parts


def _is_kept(reader: fx.Node) -> bool:
    """Whether a reader of a forward value has it for backward: there, or off the device until then."""
    return reader.meta.get("phase") == "backward" or reader.target is swap_ops.swap_out


def _is_raw(node: fx.Node) -> bool:
    """Whether this is parts of a sum that a collective brings, packed ones perhaps."""
    if c10d.is_wait(node):
        return c10d.launched_by(node).target not in _REDUCES
    by_messages = c10d.carrier_of(node) is not None
    return c10d.is_collective(node) and (node.target not in _REDUCES or by_messages)


def _joins(node: fx.Node) -> bool:
    return node.target in _JOINS_PARTS or is_view(node)


def _is_message(node: fx.Node) -> bool:
    """Whether a value is bytes for a collective, or is only made to be sent by one."""
    val = node.meta.get("val")
    if "grad_of" in node.meta:
        return False
    if isinstance(val, torch.Tensor) and not val.dtype.is_floating_point and not val.dtype.is_complex:
        return c10d.is_collective(node) or c10d.is_wait(node) or node.target in c10d.PREPARES
    readers = [user for view in (node, *iter_views(node)) for user in view.users if not is_view(user)]
    return bool(readers) and node.target is not c10d.wait and all(c10d.is_collective(user) for user in readers)


def _numel(node: fx.Node) -> int:
    """Elements of a tensor; 1 of anything else."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and isinstance(val.numel(), int):
        return val.numel()
    return 1
