"""What backward reads of forward, block by block: which tensors can be kept, which can be had again, at what cost.

[Note: blocks and copies]
Each module of a list (layers.0, layers.1) is a block; all that runs outside of those is one block more. What leaves a
block, read by forward elsewhere, is kept wherever backward reads it: blocks are then independent of each other. Blocks
of equal structure give equal `Problem`s, which are solved once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware
from fxzero.graph import StepGraph
from fxzero.graph.blocks import repeated_blocks
from fxzero.graph.step_graph import is_getitem, is_view, num_bytes, yields_scalar
from fxzero.passes.recompute_chosen import can_be_had_again, is_mask
from fxzero.passes.recompute_pointwise import backward_readers, pointwise_again

aten = torch.ops.aten

_CASTS = {aten._to_copy.default, aten.clone.default}


@dataclass(frozen=True)
class Option:
    """One way to carry a tensor from forward to backward.

    Args:
        name: "keep", "bool" (a mask, as one byte an element), "host" or "nvme".
        kept_bytes: device memory that it holds in between.
        seconds: what it adds to the step.
    """

    name: str
    kept_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Value:
    """One forward result of a problem.

    Args:
        storage: index of the memory that it lives in; None: at hand in backward whatever is decided.
        seconds: of having it again; None: it cannot be had again.
        sources: the values that it follows from.
        read: backward reads it.
    """

    storage: int | None
    seconds: float | None
    sources: tuple[int, ...]
    read: bool


@dataclass(frozen=True)
class Problem:
    """What is to be decided for one block: an equal one of another block has an equal answer.

    Args:
        storages: for each tensor that may be kept, the ways to do so.
        values: in forward order.
    """

    storages: tuple[tuple[Option, ...], ...]
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Block:
    """One copy of a problem in the graph.

    Args:
        name: path of the module; "" for what is outside of all repeated ones.
        problem: what is to be decided.
        nodes: those of the problem's values.
        roots: those that make the problem's storages.
    """

    name: str
    problem: Problem
    nodes: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]


class Activations:
    """The blocks of a captured step, and what holds of its forward as a whole.

    Args:
        step: captured, before any pass.
        hardware: for estimates of time.
        tiers: where else than on the device a tensor may be kept: "host", "nvme".
        pointwise: whether the pass `recompute_pointwise` will run.

    Attributes:
        blocks: in forward order; what is outside of repeated modules comes first.
        root: forward node or input -> the node whose memory it lives in.
        free: forward nodes that `recompute_pointwise` has again whatever is decided.
        leaving: forward nodes that forward reads in another block, or the step after backward.
        fixed: memory that leaves its block and that backward reads: it is kept.
        shared: memory that has views.
        returned: what the step returns: it stays on the device.
    """

    def __init__(
        self, step: StepGraph, hardware: Hardware, *, tiers: Iterable[str] = (), pointwise: bool = True
    ) -> None:
        self.hardware = hardware
        self.tiers = tuple(tiers)
        self.returned = set(step.output.all_input_nodes)
        self.free = pointwise_again(step) if pointwise else set()
        forward = step.phase("forward")
        self.root: dict[fx.Node, fx.Node] = {}
        for node in (*step.placeholders, *forward):
            shares = node.op == "call_function" and (is_view(node) or is_getitem(node))
            self.root[node] = self.root.get(node.all_input_nodes[0], node) if shares else node
        self._from_parameters = _from_parameters(step, forward)
        block_of = repeated_blocks(node.meta["module"] for node in forward)
        members: dict[str, list[fx.Node]] = {"": []}
        for node in forward:
            members.setdefault(block_of.get(node.meta["module"], ""), []).append(node)
        self.leaving = {node for nodes in members.values() for node in _leaving(nodes)}
        held = {self.root[node] for node in forward if self._is_held(node)}
        self.fixed = held & {self.root[node] for node in self.leaving}
        self.shared = {root for node, root in self.root.items() if node is not root}
        self.blocks = [_BlockReader(self, name, nodes).block() for name, nodes in members.items() if nodes]

    def _is_held(self, node: fx.Node) -> bool:
        """Whether backward reads a value where it is when nothing is decided."""
        if node not in self.free:
            return bool(backward_readers(node)) or any(user in self.free for user in node.users)
        return False

    def is_at_hand(self, node: fx.Node) -> bool:
        """Whether a value costs nothing in backward: inputs, views and casts of parameters, numbers."""
        at_hand = node.op == "placeholder" or yields_scalar(node) or node in self._from_parameters
        return at_hand or self.root[node].op == "placeholder"


def _leaving(members: list[fx.Node]) -> set[fx.Node]:
    own = set(members)
    return {n for n in members if any(u not in own and u.meta.get("phase") != "backward" for u in n.users)}


def _from_parameters(step: StepGraph, forward: list[fx.Node]) -> set[fx.Node]:
    """Views and casts of parameters: backward gathers or reads those anew (see `shard_parameters`)."""
    found = set(step.inputs("parameter"))
    for node in forward:
        if (is_view(node) or is_getitem(node) or node.target in _CASTS) and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


class _BlockReader:
    """Makes the problem of one block from its nodes."""

    def __init__(self, activations: Activations, name: str, members: list[fx.Node]) -> None:
        self.all = activations
        self.name = name
        self.own = set(members)
        self.members = members
        self.storages: dict[fx.Node, int] = {}
        self.index: dict[fx.Node, int] = {}
        self.values: list[Value] = []

    def block(self) -> Block:
        for node in self.members:
            if self.all.is_at_hand(node):
                continue
            sources = tuple(self._source(source) for source in node.all_input_nodes if not self.all.is_at_hand(source))
            self._add(node, sources)
        problem = Problem(tuple(map(self._options, self.storages)), tuple(self.values))
        return Block(self.name, problem, tuple(self.index), tuple(self.storages))

    def _source(self, node: fx.Node) -> int:
        """The value that a node of the block reads; one of another block is added, to be kept or not."""
        if node not in self.index:
            self._add(node, ())
        return self.index[node]

    def _add(self, node: fx.Node, sources: tuple[int, ...]) -> None:
        root = self.all.root[node]
        stays = node not in self.own or node in self.all.leaving
        storage = None
        if root not in self.all.fixed and not (stays and node in self.all.free):
            storage = self.storages.setdefault(root, len(self.storages))
        seconds = None
        if not stays and can_be_had_again(node):
            seconds = 0.0 if node in self.all.free else compute_seconds(node, self.all.hardware)
        read = node in self.own and bool(backward_readers(node))
        self.index[node] = len(self.values)
        self.values.append(Value(storage, seconds, sources, read))

    def _options(self, root: fx.Node) -> tuple[Option, ...]:
        size = num_bytes(root.meta.get("val"))
        options = [Option("keep", size)]
        hardware = self.all.hardware
        if is_mask(root) and root in self.own and root not in self.all.shared:
            number = root.meta["val"].numel()
            casts_s = 2 * ((size + number) / hardware.memory_bytes_s + hardware.op_overhead_s)
            options.append(Option("bool", number, casts_s))
        for tier in self.all.tiers if root in self.own and root not in self.all.returned else ():
            if isinstance(root.meta.get("val"), torch.Tensor):
                options.append(Option(tier, 0, 2 * size / hardware.tier_bytes_s(tier)))
        return tuple(options)
