"""A raw trace with symbolic sizes becomes the raw trace that these sizes would have given.

Nothing is traced again: each node is copied with numbers where symbols of sizes were; nodes that only compute sizes
become these numbers; and each value whose shape has a symbol is made anew by running its op on fake tensors. Nodes bear
the names that a trace at these sizes would have given them, also where names were spent on nodes that nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.step_graph import yields_tensor

aten = torch.ops.aten

_SIZE_OPS = {
    aten.sym_size.int: lambda tensor, dim: tensor.size(dim),
    aten.sym_stride.int: lambda tensor, dim: tensor.stride(dim),
    aten.sym_numel.default: lambda tensor: tensor.numel(),
    aten.sym_storage_offset.default: lambda tensor: tensor.storage_offset(),
}


@dataclass(frozen=True)
class TracedNode:
    """A node of a trace in progress, some of which are dropped at its end because nothing reads them.

    Args:
        name: unique.
        stem: what the name was made from.
        is_size: whether it follows from sizes of the batch alone.
    """

    name: str
    stem: str
    is_size: bool


def traced_nodes(graph: fx.Graph) -> list[TracedNode]:
    """All nodes of a trace in progress, in order."""
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        from_sizes = node.target in _SIZE_OPS or (inputs and sizes.issuperset(inputs))
        if node.op == "call_function" and from_sizes and not yields_tensor(node):
            sizes.add(node)
    return [TracedNode(node.name, stem_of(node), node in sizes) for node in graph.nodes]


def stem_of(node: fx.Node) -> str:
    """What torch makes the name of a call from."""
    if node.op != "call_function":
        return node.name
    target: Any = node.target
    return str(target.overloadpacket.__name__ if compat.is_op(target) else target.__name__)


def has_symbols(val: Any) -> bool:
    """Whether a tensor, or one of several, has a symbol in its shape or strides."""
    if isinstance(val, torch.Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*val.shape, *val.stride(), val.storage_offset()))
    return isinstance(val, (list, tuple)) and any(map(has_symbols, val))


class Specialiser:
    """Copies a raw trace for given sizes.

    Args:
        module: the trace; stays as it is.
        traced: its nodes, also those that were dropped since.
        inputs: for each placeholder, in order, its value at these sizes: a fake tensor or a symbolic scalar.
        boundaries: phase -> how many nodes of `traced` come before it.
        mode: the fake mode of the trace.

    Attributes:
        graph, boundaries: of the copy.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        *,
        traced: Sequence[TracedNode],
        inputs: Sequence[Any],
        boundaries: Mapping[str, int],
        mode: Any,
    ) -> None:
        self.module = module
        self.traced = traced
        self.inputs = iter(inputs)
        self.mode = mode
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.first = {index: phase for phase, index in boundaries.items()}
        self.boundaries: dict[str, int] = {}

    def run(self) -> fx.GraphModule:
        """The copy."""
        raw = {node.name: node for node in self.module.graph.nodes}
        dead = []
        with self.mode, torch.no_grad():
            for index, node in enumerate(self.traced):
                if index in self.first:
                    self.boundaries[self.first[index]] = len(self.nodes)
                if node.is_size and node.name in raw:
                    self.numbers[raw[node.name]] = self._number(raw[node.name])
                elif node.name in raw:
                    self.nodes[raw[node.name]] = self._copied(raw[node.name], node.stem)
                elif not node.is_size:
                    dead.append(self.graph.create_node("call_function", _nothing, name=node.stem))
        for spent in dead:
            self.graph.erase_node(spent)
        output = next(iter(self.module.graph.find_nodes(op="output")))
        self.graph.output(fx.map_arg(output.args[0], lambda node: self.nodes[node]))
        return fx.GraphModule(self.module, self.graph)

    def _number(self, raw: fx.Node) -> Any:
        args, kwargs = self._values(raw)
        target: Any = raw.target
        return _SIZE_OPS.get(target, target)(*args, **kwargs)

    def _copied(self, raw: fx.Node, stem: str) -> fx.Node:
        if raw.op == "placeholder":
            node = self.graph.placeholder(raw.name)
            val = next(self.inputs)
        elif raw.op == "get_attr":
            node = self.graph.create_node("get_attr", raw.target, name=raw.name)
            val = raw.meta.get("val")
        else:
            args, kwargs = fx.map_arg((raw.args, raw.kwargs), self._argument)
            node = self.graph.create_node("call_function", raw.target, args, kwargs, name=stem)
            val = self._run(raw) if has_symbols(raw.meta.get("val")) else raw.meta.get("val")
        node.meta = {**raw.meta, "val": val}
        return node

    def _argument(self, raw: fx.Node) -> Any:
        return self.numbers[raw] if raw in self.numbers else self.nodes[raw]

    def _run(self, raw: fx.Node) -> Any:
        args, kwargs = self._values(raw)
        target: Any = raw.target
        return target(*args, **kwargs)

    def _values(self, raw: fx.Node) -> Any:
        return fx.map_arg((raw.args, raw.kwargs), self._value)

    def _value(self, raw: fx.Node) -> Any:
        if raw in self.numbers:
            return self.numbers[raw]
        if raw.op == "get_attr":
            return getattr(self.module, str(raw.target))
        return self.nodes[raw].meta["val"]


def _nothing() -> None:
    """Stands for a node that is dropped: its name is spent."""
