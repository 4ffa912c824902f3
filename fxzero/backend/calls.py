"""A program as AOTAutograd calls it: values in a list, which is emptied; outputs in the order that it expects.

Nothing of a call stays on these objects: what backward needs travels through autograd, so that a model may be called
twice before its backward, and backward may run twice or in another thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxzero import compat_dynamo
from fxzero.backend.slots import Slots
from fxzero.graph.step_graph import SAVED
from fxzero.graph.swap_ops import is_off_device
from fxzero.runtime.program import Program


class Call:
    """A forward or backward program.

    Args:
        program: lowered.
        outputs: in order, keys of its results, and constants as they are: None, numbers.
        constants: tensors that the graph holds itself, by the name of their entry.
        slots: where activations wait off the device, if they do.
    """

    def __init__(
        self, program: Program, outputs: Sequence[Any], constants: Mapping[str, torch.Tensor], slots: Slots | None
    ) -> None:
        self.program = program
        self._slots = slots
        given = [node for node in program.step.placeholders if node.meta["entry"].kind != "constant"]
        self._constants = [constants[e.name] for e in program.entries if e.kind == "constant"]
        self._tickets = [(i, node.name) for i, node in enumerate(given) if is_off_device(node)]
        places = {key: index for index, key in enumerate(program.outputs)}
        self._outputs = [(places.get(item), item) if isinstance(item, tuple) else (None, item) for item in outputs]

    def boxed(self) -> compat_dynamo.Boxed:
        """A function that AOTAutograd may call with a list."""
        return compat_dynamo.boxed(self.run)

    def run(self, values: list[Any]) -> list[Any]:
        """Run the program once.

        Args:
            values: the inputs but constants, in order; the list is emptied.
        """
        slots = self._slots
        with contextlib.nullcontext() if slots is None else slots.lock:
            if slots is not None:
                slots.tidy()
            inputs = [*values, *self._constants]
            values.clear()
            for index, name in self._tickets:
                assert slots is not None
                inputs[index] = slots.stored(inputs[index], name)
            results = self.program.run(inputs)
        found = [item if place is None else results[place] for place, item in self._outputs]
        return found if slots is None else [slots.ticket(value) for value in found]

    def signature(self) -> fx.GraphModule:
        """The graph as AOTAutograd wants to see it: with constants as its own, and every output in its place.

        What forward computes to be saved has no value there: by its value AOTAutograd would take it for memory that
        backward may write to, and would then refuse to run backward twice.
        """
        root, graph = nn.Module(), fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        constants = iter(self._constants)
        for node in self.program.step.graph.nodes:
            if node.op == "placeholder" and node.meta["entry"].kind == "constant":
                root.register_buffer(node.name, next(constants))
                mapping[node] = graph.get_attr(node.name)
            elif node.op == "placeholder":
                mapping[node] = graph.placeholder(node.name)
            elif node.op != "output":
                mapping[node] = graph.node_copy(node, mapping.__getitem__)
            if node in mapping:
                mapping[node].meta = {"val": node.meta["val"]}
        results = self.program.step.results
        returned = {node for (kind, _), node in results.items() if kind != SAVED}
        for node in results.values():
            if node.op != "placeholder" and node not in returned:
                mapping[node].meta = {}
        graph.output(tuple(mapping[results[item]] if isinstance(item, tuple) else item for _, item in self._outputs))
        return fx.GraphModule(root, graph)
