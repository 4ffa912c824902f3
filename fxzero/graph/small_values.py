"""What calls yield on small tensors in fp64, to see that some of them compute what one op does.

[Note: proof by values]
Models write a norm in many forms, and the backward of each is another row of calls. Rather than a pattern for each, a
pass names the calls that it would replace, runs them here on random tensors with the real number of columns and a few
rows, and compares with the reference of the kernel in fp64, to 1e-10: rounding is 1e-16, and two formulas that
differ do so by far more on some of a few hundred random numbers. What does not agree stays as it is. A distinct form is
run once; casts between floating dtypes are left out, so that only what is computed counts, and not how it is rounded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import is_getitem, is_view, tensor_val, yields_tensor

aten = torch.ops.aten

TOLERANCE = 1e-10
_FEW = (2, 3)  # rows of a dimension, in turns: neighbours differ, so that none is taken for the other
# not pointwise by their tag; they draw nothing and know no size but those of their inputs
_TAKEN = {aten.sum.dim_IntList, aten.mean.dim, aten._to_copy.default, aten.clone.default, aten.cat.default}
_TAKEN |= {aten.stack.default, aten.slice_backward.default, aten.select_backward.default, aten.var.correction}
_SIZED = {aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.reshape.default}
_OF_A_SIZE = {aten.slice_backward.default, aten.select_backward.default}  # of what is their second argument


class NotSmall(Exception):
    """A call cannot be run on small tensors."""


def can_run(node: fx.Node) -> bool:
    """Whether a call is one that small tensors can go through."""
    if is_getitem(node):
        return is_view(node.args[0])  # type: ignore[arg-type]
    target: Any = node.target
    if node.op != "call_function" or not compat.is_op(target) or target.namespace != "aten" or is_random(node):
        return False
    return target in _TAKEN or is_view(node) or torch.Tag.pointwise in target.tags


class SmallRun:
    """Runs calls on tensors of few rows.

    Args:
        shape: of the value whose rows these are: its last dimension is kept, all others get few elements.

    Attributes:
        values: node -> what it has yielded; calls that cannot be run, and what follows from them, are not in it.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._rows = tuple(shape[:-1])
        self._few = tuple(1 if size == 1 else _FEW[dim % 2] for dim, size in enumerate(self._rows))
        self._generator = torch.Generator().manual_seed(0)
        self.values: dict[fx.Node, Any] = {}

    def draw(self, *nodes: fx.Node) -> list[torch.Tensor]:
        """Random values for what the calls are given.

        Raises:
            NotSmall: if a shape is none of the rows' or columns'.
        """
        for node in nodes:
            shape = self.shape(tensor_val(node).shape)
            self.values[node] = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return [self.values[node] for node in nodes]

    def run(self, calls: Iterable[fx.Node]) -> None:
        """Run calls, in program order."""
        for node in calls:
            if all(source in self.values for source in node.all_input_nodes):
                try:
                    self.values[node] = self._call(node)
                except (NotSmall, RuntimeError, IndexError, TypeError):
                    continue

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The small shape that stands for one of the graph.

        Raises:
            NotSmall: if it is none of the rows' or columns'.
        """
        given, rows = tuple(shape), len(self._rows)
        pairs = list(zip(given, self._rows, self._few, strict=False))
        if len(given) > rows and all(size in (1, whole) for size, whole, _ in pairs):
            return (*(few if size == whole else 1 for size, whole, few in pairs), *given[rows:])
        if len(given) == 1:
            return given
        if given == self._rows:
            return self._few
        if len(given) == 2 and given[0] == math.prod(self._rows):
            return math.prod(self._few), given[1]
        raise NotSmall

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        args: list[Any] = list(fx.map_arg(node.args, lambda n: self.values[n]))
        kwargs: dict[str, Any] = dict(fx.map_arg(node.kwargs, lambda n: self.values[n]))
        if is_getitem(node):
            return operator.getitem(*args)
        if target is aten._to_copy.default and _is_floating(node):
            return args[0]
        if target in _SIZED:
            args[1] = list(self.shape(tensor_val(node).shape))
        if target in _OF_A_SIZE:
            args[1] = list(self.shape(args[1]))
        kwargs.pop("dtype", None)
        made = target(*args, **kwargs)
        if yields_tensor(node) and tuple(made.shape) != self.shape(tensor_val(node).shape):
            raise NotSmall
        return made


def _is_floating(node: fx.Node) -> bool:
    return tensor_val(node).is_floating_point() and tensor_val(node.all_input_nodes[0]).is_floating_point()


def agree(value: Any, expected: torch.Tensor) -> bool:
    """Whether a value is the expected one, to what rounding in fp64 leaves ([Note: proof by values])."""
    if not isinstance(value, torch.Tensor) or value.numel() != expected.numel():
        return False
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return bool(torch.allclose(value.reshape(expected.shape), expected, rtol=0.0, atol=TOLERANCE * scale))


def form_of(calls: Sequence[fx.Node], given: Sequence[fx.Node | None]) -> Hashable:
    """What calls on given values have in common with all others that compute the same: ops, numbers, shapes, wiring.

    Args:
        calls: in program order.
        given: what they read that none of them yields; None for what is not there.
    """
    places: Mapping[fx.Node, int] = {node: place for place, node in enumerate([*given, *calls]) if node is not None}

    def freeze(arg: Any) -> Hashable:
        if isinstance(arg, fx.Node):
            return "%", places[arg]
        if isinstance(arg, (list, tuple)):
            return tuple(freeze(item) for item in arg)
        return type(arg), arg

    shapes = tuple(None if node is None else tuple(tensor_val(node).shape) for node in given)
    lines = ((c.target, freeze(c.args), tuple((k, freeze(v)) for k, v in c.kwargs.items())) for c in calls)
    return shapes, tuple(lines)
