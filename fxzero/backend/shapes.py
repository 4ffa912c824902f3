"""A graph whose sizes Dynamo leaves open, compiled for each set of sizes that comes.

[Note: one program a set of sizes]
Step graphs hold no symbols. So a graph with symbolic sizes is compiled when it is called, with numbers in their place,
and found again by them: by the numbers among its inputs, by sizes, strides and offset of each tensor that has a symbol,
and by which tensors share memory. All else about the inputs Dynamo has checked before it calls. A Python float that may
change comes as a tensor of no dimensions, of which the graph asks the number: that is a number like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat, compat_dynamo
from fxzero.backend.open_sizes import OpenSizes, Siblings, places_of_symbols, sizes_at

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_open(value: Any) -> bool:
    """Whether an example input is a number that may change, or a tensor with a symbol in sizes or strides."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (*_SYMBOLS, int, float))
    return any(isinstance(size, _SYMBOLS) for size in (*value.shape, *value.stride(), value.storage_offset()))


def numbers_asked(module: fx.GraphModule) -> dict[fx.Node, int]:
    """The calls of a graph that ask an input for its number -> which input."""
    position = {node: index for index, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    asked = module.graph.find_nodes(op="call_method", target="item")
    return {node: position[node.args[0]] for node in asked if node.args[0] in position}


class ByShape:
    """One captured graph, and what it was compiled to for each set of sizes so far.

    Args:
        module: as Dynamo gives it.
        examples: its inputs, as Dynamo gives them.
        compiled: (graph on tensors alone, fake tensors of known sizes, these sizes) -> what runs it.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        examples: Sequence[Any],
        compiled: Callable[[fx.GraphModule, Sequence[Any], OpenSizes], Callable[..., Any]],
    ) -> None:
        self._module = module
        self._compiled = compiled
        self._open = [index for index, value in enumerate(examples) if is_open(value)]
        self._numbers = numbers_asked(module)
        self._own = [i for i, v in enumerate(examples) if not isinstance(v, torch.nn.Parameter)]
        self._known: dict[Hashable, Callable[..., Any]] = {}
        self._places = places_of_symbols(examples)
        self._siblings: dict[str, Siblings] = {}

    def run(self, *inputs: Any) -> Any:
        """What the graph yields for these inputs."""
        key = self._key(inputs)
        function = self._known.get(key)
        if function is None:
            function = self._known[key] = self._compile(inputs)
        return function(*(value for value in inputs if isinstance(value, torch.Tensor)))

    def _key(self, inputs: Sequence[Any]) -> Hashable:
        sizes = tuple(_size(inputs[index]) for index in self._open)
        sizes += tuple(inputs[index].item() for index in self._numbers.values())
        first: dict[int, int] = {}
        shared = []
        for index in self._own:
            value = inputs[index]
            if isinstance(value, torch.Tensor) and value.numel():
                at = first.setdefault(value.untyped_storage().data_ptr(), index)
                if at != index:
                    shared.append((at, index, value.storage_offset() - inputs[at].storage_offset()))
        return sizes, tuple(shared)

    def _compile(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = fx.Graph()
        mapping: dict[fx.Node, Any] = {}
        values = iter(inputs)
        for node in self._module.graph.nodes:
            value = next(values) if node.op == "placeholder" else None
            if node.op == "placeholder" and not isinstance(value, torch.Tensor):
                mapping[node] = value
            elif node in self._numbers:
                mapping[node] = inputs[self._numbers[node]].item()
            else:
                mapping[node] = _copied(graph, node, mapping)
        sizes = OpenSizes(sizes_at(self._places, inputs), self._siblings)
        mode = compat_dynamo.static_mode()
        with compat_dynamo.apart(mode):
            fakes = [compat.fake_like(mode, value) for value in inputs if isinstance(value, torch.Tensor)]
            return self._compiled(fx.GraphModule(self._module, graph), fakes, sizes)


def _copied(graph: fx.Graph, node: fx.Node, mapping: dict[fx.Node, Any]) -> fx.Node:
    """A copy of a node, that reads numbers where these have become known."""
    copied = graph.create_node(
        node.op,
        node.target,
        fx.map_arg(node.args, mapping.__getitem__),
        fx.map_arg(node.kwargs, mapping.__getitem__),
        name=node.name,
        type_expr=node.type,
    )
    copied.meta = dict(node.meta)
    return copied


def _size(value: Any) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return type(value), value
    return tuple(value.shape), value.stride(), value.storage_offset()
