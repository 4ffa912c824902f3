"""Arguments that name sizes of a whole tensor, as a rank has them that holds a part."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxzero.graph import collectives as c10d

aten = torch.ops.aten


@functools.cache
def _sizes() -> dict[Any, int]:
    """Op -> which of its arguments holds the sizes of what it yields."""
    as_second = (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.new_empty.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.slice_backward.default,
        aten.select_backward.default,
    )
    return dict.fromkeys(as_second, 1)


def with_local_sizes(target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments of a call that yields a tensor of this shape.

    Args:
        target: the op.
        args: its positional arguments.
        shape: what this rank's part of the output has.
    """
    if target is c10d.all_to_all:  # what each rank sends and receives is as much
        each = [shape[0] // len(args[1])] * len(args[1])
        return (args[0], each, each, args[3])
    index = _sizes().get(target)
    if index is None:
        return args
    return (*args[:index], list(shape), *args[index + 1 :])
