"""Group norms: each rank has some samples, or some groups of channels. The ops are told how many of each there are."""

from __future__ import annotations

from collections.abc import Iterator

from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.strategy import Call, Form, Strategy, Tensor, called_with, fits

_PARAMETERS = ("weight", "bias")


def group_norm(call: Call) -> Iterator[Strategy]:
    """The ways of `native_group_norm(x, weight?, bias?, N, C, HxW, group, eps) -> (y, means, factors)`."""
    for along, parameters, form in _splits(call):
        yield from _fitting(call, along, parameters, (along, along, along), form)


def group_norm_backward(call: Call) -> Iterator[Strategy]:
    """The ways of its gradient: (that of y, x, means, factors, weight?, ..) -> those of x, weight and bias."""
    for along, parameters, form in _splits(call):
        summed = partial() if along.dim == 0 else shard(0)
        yield from _fitting(call, along, parameters, (along, summed, summed), form)


def _splits(call: Call) -> Iterator[tuple[Placement, Placement, Form]]:
    """(how the samples lie, how the parameters do, the call of a part): by samples, and by groups."""
    yield shard(0), REPLICATED, called_with({"N": call.argument("N") // call.ranks})
    groups, channels = call.argument("group"), call.argument("C")
    if groups % call.ranks == 0:
        yield shard(1), shard(0), called_with({"C": channels // call.ranks, "group": groups // call.ranks})


def _fitting(
    call: Call, along: Placement, parameters: Placement, outputs: tuple[Placement, ...], form: Form
) -> Iterator[Strategy]:
    names = [argument.name for argument in call.target._schema.arguments]
    given = [name for name, value in zip(names, call.args, strict=False) if isinstance(value, Tensor)]
    inputs = tuple(parameters if name in _PARAMETERS else along for name in given)
    yields = tuple(None if o is None else placement for o, placement in zip(call.outputs, outputs, strict=True))
    strategy = Strategy(inputs, yields, form, share=1 / call.ranks)
    if fits(call, strategy):
        yield strategy
