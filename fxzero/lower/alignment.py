"""Inputs that a compiled region takes to start at a multiple of 16 bytes, where they do not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

Function = Callable[[list[Any]], tuple[Any, ...]]

ALIGNMENT_BYTES = 16  # of the widest load of a GPU


def taking_any_alignment(function: Function, *, aligned: Collection[int], written: Collection[int]) -> Function:
    """A function that takes inputs wherever they start; what it is given elsewhere is copied for it, and back.

    Memory of its own starts aligned; a view into the middle of a tensor may not. Inductor's own caller does the same.

    Args:
        function: of a region; it empties the list that it is given.
        aligned: indices of the inputs that it takes to be aligned.
        written: indices of those that it writes over.
    """
    if not aligned:
        return function
    return functools.partial(_call, function, tuple(aligned), frozenset(written))


def _call(function: Function, aligned: tuple[int, ...], written: frozenset[int], values: list[Any]) -> tuple[Any, ...]:
    back: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index in aligned:
        value = values[index]
        if value.data_ptr() % ALIGNMENT_BYTES:
            values[index] = copy = value.clone(memory_format=torch.preserve_format)
            if index in written:
                back.append((value, copy))
    outputs = function(values)
    for value, copy in back:
        value.copy_(copy)
    return outputs
