"""Ops that make each element of what they yield from the elements that stand there in their inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.strategy import Call, OfStep, Strategy, Tensor, fits

aten = torch.ops.aten

UNKNOWN_TO_DTENSOR = (
    aten.copy.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.floor_divide.default,
    aten.masked_fill.Tensor,
    aten.elu_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.log_sigmoid_backward.default,
    aten.mish_backward.default,
    aten.softplus_backward.default,
    aten.softshrink_backward.default,
)


def elementwise(call: Call) -> Iterator[Strategy]:
    """The ways of such an op: parts of any dim, of inputs that are not the same along it."""
    (output,) = call.outputs
    assert output is not None
    for dim in range(len(output.shape)):
        inputs = tuple(_along(tensor, output, dim) for tensor in call.tensors)
        strategy = Strategy(inputs, (shard(dim),))
        if fits(call, strategy):
            yield strategy


def clone(call: Call) -> Iterator[Strategy]:
    """The ways of `clone`: by DTensor, and what is still to be added up is that afterwards."""
    yield from by_dtensor(call)
    yield Strategy((partial(),), (partial(),))


def where(call: Call) -> Iterator[Strategy]:
    """The ways of `where.self`: by DTensor, and of both sides still to be added up."""
    yield from by_dtensor(call)
    _, *sides = call.tensors
    if all(side.dtype.is_floating_point for side in sides):
        yield Strategy((REPLICATED, *(partial() for _ in sides)), (partial(),))


def masked_fill(call: Call) -> Iterator[Strategy]:
    """The ways of `masked_fill` with a number: by DTensor, and with 0 of what is still to be added up."""
    yield from by_dtensor(call)
    value = call.argument("value")
    if value == 0 and not isinstance(value, OfStep):
        yield Strategy((partial(), REPLICATED), (partial(),))


def _along(tensor: Tensor, output: Tensor, dim: int) -> Placement:
    """How an input lies where the output is split along a dim."""
    at = dim - len(output.shape) + len(tensor.shape)
    return shard(at) if at >= 0 and tensor.shape[at] == output.shape[dim] else REPLICATED
