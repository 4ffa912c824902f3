"""Regions that serve all sizes which Dynamo leaves open: learned from the programs of two sets of sizes.

At this door nobody makes a program at sizes that were not asked for, so regions are compiled for all sizes at the third
set of them: the first has Dynamo's own graph without symbols, the second is the first of the graph with them. (See
[Note: regions of all sizes] in `lower/sized_regions.py`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.lower.sized_regions import AtSizes, SizedRegions

_KEPT = 3  # programs that a new one is compared with


class Siblings:
    """Programs of one half of a captured graph, at the sizes that came last."""

    def __init__(self) -> None:
        self.regions = SizedRegions()
        self.kept: list[tuple[StepGraph, Mapping[str, int]]] = []

    def at(self, sizes: Mapping[str, int]) -> AtSizes | None:
        """Where a program of these sizes stands among them; None where it is the first, or has no open sizes."""
        differing = {id(step): sum(sizes[name] != n for name, n in other.items()) for step, other in self.kept}
        if not sizes or not any(differing.values()):
            return None
        others = sorted(self.kept, key=lambda kept: -differing[id(kept[0])])
        return AtSizes(sizes, self, self.regions, lambda: others)

    def keep(self, step: StepGraph, sizes: Mapping[str, int]) -> None:
        """Let further programs be compared with this one, whose regions are cut."""
        self.kept = [*self.kept[1 - _KEPT :], (step, sizes)]


class OpenSizes:
    """One set of sizes of a captured graph.

    Args:
        sizes: symbol -> number.
        siblings: title of a half -> its programs so far; grows.
    """

    def __init__(self, sizes: Mapping[str, int], siblings: dict[str, Siblings]) -> None:
        self.sizes = sizes
        self._siblings = siblings

    def of(self, title: str) -> Siblings:
        """The programs of one half."""
        return self._siblings.setdefault(title, Siblings())


def places_of_symbols(examples: Sequence[Any]) -> dict[str, tuple[int, int | None]]:
    """Symbol -> the input that is its number, or has it for the size of a dim: (input, dim or None).

    Args:
        examples: inputs as Dynamo gives them.
    """
    places: dict[str, tuple[int, int | None]] = {}
    for index, example in enumerate(examples):
        found = [(None, example)] if not isinstance(example, torch.Tensor) else list(enumerate(example.shape))
        for dim, size in found:
            if isinstance(size, torch.SymInt) and compat.symbol_of(size).is_symbol:
                places.setdefault(str(compat.symbol_of(size)), (index, dim))
    return places


def sizes_at(places: Mapping[str, tuple[int, int | None]], inputs: Sequence[Any]) -> dict[str, int]:
    """Symbol -> its number; none where one is 0 or 1, since symbols stand for larger ones."""
    sizes = {name: inputs[i] if dim is None else inputs[i].shape[dim] for name, (i, dim) in places.items()}
    return {} if any(size < 2 for size in sizes.values()) else sizes
