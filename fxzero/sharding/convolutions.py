"""Convolutions: each rank has some samples, some channels of the input or of the output, or some groups of both.

The first dim of a weight counts channels of the output, or of the input where the convolution is transposed; the other
channels, of one group, are its second dim. Groups lie along the first dim either way.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.strategy import Call, Form, Strategy, called_with, fits

_CHANNELS = shard(1)


def convolution(call: Call) -> Iterator[Strategy]:
    """The ways of `convolution(x [N, C, ..], weight, bias?, ..) -> [N, O, ..]`."""
    has_bias = len(call.tensors) == 3
    groups = call.argument("groups")
    place = list(_places(call))

    def way(x: Placement, weight: Placement, bias: Placement, output: Placement, form: Form | None = None) -> Strategy:
        inputs = (x, weight, bias) if has_bias else (x, weight)
        return Strategy(inputs, (output,), form, share=1 / call.ranks)

    found = [way(shard(0), REPLICATED, REPLICATED, shard(0))]
    if groups == 1:
        to_output, to_input = place
        found.append(way(REPLICATED, to_output, shard(0), _CHANNELS))
        found.append(way(_CHANNELS, to_input, partial(), partial()))
    elif groups % call.ranks == 0:
        form = called_with({"groups": groups // call.ranks})
        found.append(way(_CHANNELS, shard(0), shard(0), _CHANNELS, form))
    yield from (strategy for strategy in found if fits(call, strategy))


def convolution_backward(call: Call) -> Iterator[Strategy]:
    """The ways of its gradient: (that of the output, x, weight, ..) -> those of x, weight and bias that are asked."""
    groups, biases = call.argument("groups"), call.argument("bias_sizes")
    place = list(_places(call))
    own_biases = {} if biases is None else {"bias_sizes": [biases[0] // call.ranks]}

    def way(inputs: tuple[Placement, ...], outputs: tuple[Placement, ...], form: Form | None = None) -> Strategy:
        yields = tuple(None if o is None else p for o, p in zip(call.outputs, outputs, strict=True))
        return Strategy(inputs, yields, form, share=1 / call.ranks)

    found = [way((shard(0), shard(0), REPLICATED), (shard(0), partial(), partial()))]
    if groups == 1:
        to_output, to_input = place
        of_output = ((_CHANNELS, REPLICATED, to_output), (partial(), to_output, shard(0)))
        found.append(way(*of_output, called_with(own_biases)))
        found.append(way((REPLICATED, _CHANNELS, to_input), (_CHANNELS, to_input, REPLICATED)))
    elif groups % call.ranks == 0:
        form = called_with({"groups": groups // call.ranks, **own_biases})
        found.append(way((_CHANNELS, _CHANNELS, shard(0)), (_CHANNELS, shard(0), shard(0)), form))
    yield from (strategy for strategy in found if fits(call, strategy))


def _places(call: Call) -> tuple[Placement, Placement]:
    """A weight's split by channels of the output, and of the input, in one group."""
    first, second = shard(0), shard(1)
    return (second, first) if call.argument("transposed") else (first, second)
