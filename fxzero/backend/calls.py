"""A program as AOTAutograd calls it: values in a list, which is emptied; outputs in the order that it expects.

Nothing of a call stays on these objects: what backward needs travels through autograd, so that a model may be called
twice before its backward, and backward may run twice or in another thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxzero import compat_dynamo
from fxzero.backend.joint import Key
from fxzero.backend.slots import Slots
from fxzero.graph.step_graph import SAVED
from fxzero.graph.swap_ops import is_off_device
from fxzero.runtime.program import Program


class Call:
    """A forward or backward program.

    Args:
        program: lowered.
        outputs: in order, keys of its results, and constants as they are: None, numbers.
        fixed: inputs that no call brings, by the key of their entry: tensors that the graph holds itself, coordinates.
        slots: where activations wait off the device, if they do.
        agree: called before each run, to settle with other ranks that they run the same.
    """

    def __init__(
        self,
        program: Program,
        outputs: Sequence[Any],
        fixed: Mapping[Key, Any],
        *,
        slots: Slots | None = None,
        agree: Callable[[], None] | None = None,
    ) -> None:
        self.program = program
        self._slots, self._agree = slots, agree
        given = [node for node in program.step.placeholders if node.meta["entry"].key not in fixed]
        self._fixed = [fixed[entry.key] for entry in program.entries if entry.key in fixed]
        self._tickets = [(i, node.name) for i, node in enumerate(given) if is_off_device(node)]
        places = {key: index for index, key in enumerate(program.outputs)}
        self._outputs = [(places.get(item), item) if isinstance(item, tuple) else (None, item) for item in outputs]

    def boxed(self) -> compat_dynamo.Boxed:
        """A function that AOTAutograd may call with a list."""
        return compat_dynamo.boxed(self.run)

    def run(self, values: list[Any]) -> list[Any]:
        """Run the program once.

        Args:
            values: the inputs but fixed ones, in order; the list is emptied.

        Raises:
            RankMismatchError: on every rank, if ranks are not about to run the same.
        """
        slots = self._slots
        if self._agree is not None:
            self._agree()
        with contextlib.nullcontext() if slots is None else slots.lock:
            if slots is not None:
                slots.tidy()
            inputs = [*values, *self._fixed]
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
        mapping: dict[fx.Node, Any] = {}
        placeholders = self.program.step.placeholders
        fixed = dict(zip(placeholders[len(placeholders) - len(self._fixed) :], self._fixed, strict=True))
        for node in self.program.step.graph.nodes:
            if node in fixed and not isinstance(fixed[node], torch.Tensor):
                mapping[node] = fixed[node]
            elif node in fixed:
                root.register_buffer(node.name, fixed[node])
                mapping[node] = graph.get_attr(node.name)
            elif node.op == "placeholder":
                mapping[node] = graph.placeholder(node.name)
            elif node.op != "output":
                mapping[node] = graph.node_copy(node, mapping.__getitem__)
            if isinstance(mapping.get(node), fx.Node):
                mapping[node].meta = {"val": node.meta["val"]}
        results = self.program.step.results
        returned = {node for (kind, _), node in results.items() if kind != SAVED}
        for node in results.values():
            if node.op != "placeholder" and node not in returned:
                mapping[node].meta = {}
        graph.output(tuple(mapping[results[item]] if isinstance(item, tuple) else item for _, item in self._outputs))
        return fx.GraphModule(root, graph)
