"""Which regions of a program share a function: those whose canonical text is the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph.regions import Region, regions
from fxzero.graph.storage import InPlace
from fxzero.lower.region_text import RegionText, region_text


@dataclass(frozen=True)
class SharedFunction:
    """A function and the regions that call it.

    Args:
        name: as programs call it: "region_2".
        regions: in program order, at least one.
        form: of the first of them.
    """

    name: str
    regions: tuple[Region, ...]
    form: RegionText

    @property
    def where(self) -> str:
        """The phases and modules that its regions stand in, numbers in paths as stars: "forward of layers.*"."""
        places: dict[str, dict[str, None]] = {}
        for region in self.regions:
            first = region.calls[0].meta
            path = first["module"] or first.get("param") or "the model"
            places.setdefault(first["phase"], {})[re.sub(r"(?<![^.])\d+(?![^.])", "*", path)] = None
        return ", ".join(f"{phase} of {_few([*paths])}" for phase, paths in places.items())

    @property
    def numbers(self) -> str:
        """The numbers of its regions."""
        return _few([str(region.number) for region in self.regions], most=12)


def shared_functions(step: StepGraph, *, ops: Mapping[fx.Node, Any] | None = None) -> list[SharedFunction]:
    """The functions of a program's regions, in the order of their first call.

    Args:
        step: with its regions cut.
        ops: calls that another op than their own runs.
    """
    in_place = InPlace(step)
    found: dict[str, list[Region]] = {}
    forms: dict[str, RegionText] = {}
    for region in regions(step):
        form = region_text(region, in_place, ops=ops)
        found.setdefault(form.text, []).append(region)
        forms.setdefault(form.text, form)
    return [SharedFunction(f"region_{i}", tuple(found[text]), forms[text]) for i, text in enumerate(found)]


def region_lines(step: StepGraph) -> list[str]:
    """What people are told of a program's regions: one line a function; none where no regions are cut."""
    functions = shared_functions(step)
    if not functions:
        return []
    count = sum(len(function.regions) for function in functions)
    lines = [f"{count} regions of {len(functions)} functions; a call's region is in its comment"]
    for function in functions:
        one = "region" if len(function.regions) == 1 else "regions"
        calls = f"{len(function.regions[0].calls)} calls"
        lines.append(f"{function.name}: {one} {function.numbers}: {function.where}, {calls}")
    return lines


def _few(words: Sequence[str], *, most: int = 3) -> str:
    if len(words) <= most:
        return ", ".join(words)
    return f"{', '.join(words[:most])}, .. ({len(words)} in all)"
