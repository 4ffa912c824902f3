"""The regions of a program become functions: each distinct one is compiled once, on one rank of a host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from tqdm import tqdm

from fxzero.graph import StepGraph
from fxzero.graph.regions import regions
from fxzero.graph.storage import InPlace
from fxzero.lower.inductor import compile_region
from fxzero.lower.products import Products
from fxzero.lower.region_text import RegionText, region_text
from fxzero.lower.store import Function, Store


@dataclass(frozen=True)
class LoweredRegion:
    """A region that runs as one function.

    Args:
        calls: of the program, in order.
        form: its inputs, outputs, and what it writes over.
        function: takes a list of the inputs, which it empties, and returns the outputs.
        name: of that function; equal regions share it.
    """

    calls: tuple[fx.Node, ...]
    form: RegionText
    function: Function
    name: str


@dataclass(frozen=True)
class Lowered:
    """The regions of a program.

    Args:
        regions: number -> what runs it.
        ops: calls that another op than their own runs.
        num_distinct: so many functions there are.
        num_compiled: so many of them were not on disk yet.
    """

    regions: Mapping[int, LoweredRegion]
    ops: Mapping[fx.Node, Any]
    num_distinct: int
    num_compiled: int


def lower_regions(step: StepGraph, *, store: Store | None = None, place: tuple[int, int] = (0, 1)) -> Lowered:
    """Compile the regions of a program, or find them on disk.

    Args:
        step: with its regions cut.
        store: where compiled ones are kept.
        place: (index of this rank among those of its host, their number); they begin at different regions, so that they
            share the work.

    Raises:
        LoweringError: of a region that cannot be compiled.
    """
    in_place = InPlace(step)
    found = regions(step)
    store = store or Store()
    ops = Products(store).choose(step.calls())
    forms = {region.number: region_text(region, in_place, ops=ops) for region in found}
    distinct = list(dict.fromkeys(form.text for form in forms.values()))
    index, ranks = place
    first = len(distinct) * index // ranks
    threads = max(1, (os.cpu_count() or 1) // ranks)
    functions: dict[str, Function] = {}
    num_compiled = 0
    for text in _progress([*distinct[first:], *distinct[:first]], show=index == 0):
        functions[text], made = store.get(text, _maker(text, threads))
        num_compiled += made
    lowered = {}
    for region in found:
        form = forms[region.number]
        name = f"region_{distinct.index(form.text)}"
        lowered[region.number] = LoweredRegion(region.calls, form, functions[form.text], name)
    return Lowered(lowered, ops, len(distinct), num_compiled)


def _maker(text: str, threads: int) -> Callable[[], Any]:
    return lambda: compile_region(text, threads=threads)


def _progress(texts: list[str], *, show: bool) -> Any:
    """The texts, with a bar for a person who waits."""
    return tqdm(
        texts, desc="fxzero: compiling regions", unit="region", leave=False, disable=not (show and sys.stderr.isatty())
    )
