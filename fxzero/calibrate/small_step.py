"""A program with the shape of a step, to be recorded as real ones are.

[Note: the small step]
Linear layers follow each other, forward and backward, in blocks as of a transformer between one large layer at either
end. By messages, weights are gathered one block ahead in both directions and gradients are reduced one block behind, as
with ZeRO-3; by all-reduces, gradients are summed as soon as they are there and waited for at the end, as with ZeRO-0.
Without either, the same products run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import Result, StateEntry

aten = torch.ops.aten

AXIS = "dp"
ALONE, BY_MESSAGES, BY_ALL_REDUCES = FORMS = "alone", "send_recv", "all_reduce"
SIZES = (512, 384, 1024, 4096)  # rows of the batch, width, width of the inner layer, of the first and last
BLOCKS = 5
FAST_PART = 8  # by which a fast one is smaller


def small_step(ranks: int, form: str, device: torch.device, *, fast: bool = False) -> StepGraph:
    """The step as a program ([Note: the small step]); all inputs are tensors.

    Args:
        ranks: of the only axis, "dp".
        form: ALONE, BY_MESSAGES or BY_ALL_REDUCES.
        device: of its tensors.
        fast: a smaller one.
    """
    batch, width, hidden, vocabulary = (size // FAST_PART if fast else size for size in SIZES)
    block = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
    shapes = [[(vocabulary, width)], *[block] * BLOCKS, [(width, vocabulary)]]
    return _Builder(ranks, form, device).step((batch, vocabulary), shapes)


def inputs_of(step: StepGraph) -> list[torch.Tensor]:
    """Random inputs, of which nothing in the step grows or vanishes."""
    shapes = [(node.meta["val"].shape, node.meta["val"].device) for node in step.placeholders]
    rows = shapes[0][0][0]
    return [
        torch.randn(shape, device=device) / (1 if shape[0] == rows else shape[0]) ** 0.5 for shape, device in shapes
    ]


class _Builder:
    """Writes the program, call by call, each with what it yields."""

    def __init__(self, ranks: int, form: str, device: torch.device) -> None:
        self._ranks, self._form, self._device = ranks, form, device
        self._graph = fx.Graph()
        self._mode = compat.new_fake_mode()
        self._phase = "forward"
        self._reductions: list[list[fx.Node]] = []  # under way, of a block each

    def step(self, batch: tuple[int, int], shapes: Sequence[Sequence[tuple[int, int]]]) -> StepGraph:
        """All of it.

        Args:
            batch: shape of what the first layer takes.
            shapes: of the weights of the layers, block by block.
        """
        x = self._input("x", batch)
        blocks = [
            [self._weight(f"w{number}_{place}", shape) for place, shape in enumerate(block)]
            for number, block in enumerate(shapes)
        ]
        sources: list[list[fx.Node]] = []
        launched = self._gather(blocks[0])
        for number in range(len(blocks)):
            weights = self._gathered(launched)
            launched = self._gather(blocks[number + 1]) if number + 1 < len(blocks) else []
            sources.append([])
            for weight in weights:
                sources[-1].append(x)
                x = self._call(aten.mul.Tensor, self._call(aten.mm.default, x, weight), 1.0)
        self._phase = "backward"
        launched = self._gather(blocks[-1])
        for number in reversed(range(len(blocks))):
            weights = self._gathered(launched)
            launched = self._gather(blocks[number - 1]) if number else []
            gradients = []
            for weight, source in zip(reversed(weights), reversed(sources.pop()), strict=True):
                x = self._call(aten.mul.Tensor, x, 1.0)
                gradients.append(self._call(aten.mm.default, self._call(aten.t.default, source), x))
                x = self._call(aten.mm.default, x, self._call(aten.t.default, weight))
            self._reduce(gradients)
        self._wait_for_all_but(0)
        self._graph.output((x,)).meta["results"] = (Result("loss", "loss"),)
        return StepGraph(self._graph, mesh={AXIS: self._ranks})

    def _input(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        node = self._graph.placeholder(name)
        with self._mode:
            val = torch.empty(shape, device=self._device)
        node.meta.update(val=val, entry=StateEntry("batch", name, shape))
        return node

    def _weight(self, name: str, shape: tuple[int, int]) -> fx.Node:
        parts = self._ranks if self._form == BY_MESSAGES else 1
        return self._input(name, (shape[0] // parts, shape[1]))

    def _call(self, op: Any, *args: Any) -> fx.Node:
        node = self._graph.call_function(op, args)
        with self._mode:
            val = op(*fx.map_arg(args, lambda source: source.meta["val"]))
        node.meta.update(val=val, phase=self._phase, module="")
        return node

    def _gather(self, weights: Sequence[fx.Node]) -> list[fx.Node]:
        if self._form != BY_MESSAGES:
            return list(weights)
        return [self._message(c10d.all_gather, weight, self._ranks, AXIS) for weight in weights]

    def _gathered(self, launched: Sequence[fx.Node]) -> list[fx.Node]:
        return [self._call(c10d.wait, launch) for launch in launched] if self._form == BY_MESSAGES else list(launched)

    def _reduce(self, gradients: Sequence[fx.Node]) -> None:
        if self._form == BY_ALL_REDUCES:
            self._reductions.append([self._call(c10d.all_reduce, gradient, "sum", AXIS) for gradient in gradients])
        elif self._form == BY_MESSAGES:
            args = ("sum", self._ranks, AXIS)
            self._reductions.append([self._message(c10d.reduce_scatter, gradient, *args) for gradient in gradients])
            self._wait_for_all_but(1)

    def _wait_for_all_but(self, blocks: int) -> None:
        while len(self._reductions) > blocks:
            for launch in self._reductions.pop(0):
                self._call(c10d.wait, launch)

    def _message(self, op: Any, *args: Any) -> fx.Node:
        node = self._call(op, *args)
        node.meta["algorithm"] = "send_recv"
        return node
