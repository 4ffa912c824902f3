"""Which regions of a program share a function: those whose canonical text is the same, or open for all sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fxzero.graph import StepGraph
from fxzero.graph.blocks import with_stars
from fxzero.graph.regions import Region, regions
from fxzero.graph.storage import InPlace
from fxzero.lower.lower_regions import Lowered
from fxzero.lower.region_text import RegionText, region_text


@dataclass(frozen=True)
class SharedFunction:
    """A function and the regions that call it.

    Args:
        name: as programs call it: "region_2".
        regions: in program order, at least one.
        form: of the first of them.
        text: that it is made of.
    """

    name: str
    regions: tuple[Region, ...]
    form: RegionText
    text: str

    @property
    def where(self) -> str:
        """The phases and modules that its regions stand in, numbers in paths as stars: "forward of layers.*"."""
        places: dict[str, dict[str, None]] = {}
        for region in self.regions:
            first = region.calls[0].meta
            path = first["module"] or first.get("param") or "the model"
            places.setdefault(first["phase"], {})[with_stars(path)] = None
        return ", ".join(f"{phase} of {_few([*paths])}" for phase, paths in places.items())

    @property
    def numbers(self) -> str:
        """The numbers of its regions."""
        return _few([str(region.number) for region in self.regions], most=12)


def shared_functions(step: StepGraph, *, lowered: Lowered | None = None) -> list[SharedFunction]:
    """The functions of a program's regions, in the order of their first call.

    Args:
        step: with its regions cut.
        lowered: what its regions became, if they did: names and texts are those of the functions that run.
    """
    in_place, ops = InPlace(step), None if lowered is None else lowered.ops
    runs = {} if lowered is None else lowered.regions
    taken = {one.name for one in runs.values()}
    free = (name for name in map("region_{}".format, itertools.count()) if name not in taken)
    found: dict[str, list[Region]] = {}
    forms: dict[str, RegionText] = {}
    names: dict[str, str] = {}
    for region in regions(step):
        form, one = region_text(region, in_place, ops=ops), runs.get(region.number)
        text = form.text if one is None else one.text
        if text not in found:
            forms[text], names[text] = form, next(free) if one is None else one.name
        found.setdefault(text, []).append(region)
    return [SharedFunction(names[text], tuple(found[text]), forms[text], text) for text in found]


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
