"""The regions of a program become functions: each distinct one is compiled once, on one rank of a host."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from tqdm import tqdm

from fxzero.errors import LoweringError
from fxzero.graph import StepGraph
from fxzero.graph.regions import Region, regions
from fxzero.graph.storage import InPlace
from fxzero.lower import triton
from fxzero.lower.inductor import compile_region
from fxzero.lower.products import Products
from fxzero.lower.region_text import RegionText, region_text
from fxzero.lower.store import Function, Store
from fxzero.lower.workers import num_processes, working_on
from fxzero.plan import Plan


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
        num_compiled: so many of them this process has compiled; what is missing was on disk, or others did it.
        refused: number of a region that runs call by call, since it cannot be compiled -> why.
    """

    regions: Mapping[int, LoweredRegion]
    ops: Mapping[fx.Node, Any]
    num_distinct: int
    num_compiled: int
    refused: Mapping[int, LoweringError] = field(default_factory=dict)


def lower_by_plan(step: StepGraph, plan: Plan) -> Lowered | None:
    """The regions of a program as functions, as its plan says; None where each call runs by itself.

    Args:
        step: with its regions cut, unless the plan's lowering is "eager".
        plan: of the program. Ranks of a host share the work, as torchrun's variables tell them apart.

    Raises:
        LoweringError: of a region that cannot be compiled.
    """
    if plan.lowering in ("auto", "eager"):
        return None
    place = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return lower_regions(step, lowering=plan.lowering, place=place, fallback=plan.eager_fallback)


def lower_regions(
    step: StepGraph,
    *,
    lowering: str = "inductor",
    store: Store | None = None,
    place: tuple[int, int] = (0, 1),
    fallback: bool = False,
    measure: bool = True,
) -> Lowered:
    """Compile the regions of a program, or find them on disk.

    Args:
        step: with its regions cut.
        lowering: what makes functions of regions: "inductor" or "triton" (which compiles a kernel when it first runs).
        store: where compiled ones are kept.
        place: (index of this rank among those of its host, their number); they begin at different regions, so that they
            share the work.
        fallback: a region that cannot be compiled runs call by call.
        measure: matrix products are tried on this machine, to choose their library.

    Raises:
        LoweringError: of a region that cannot be compiled.
    """
    in_place = InPlace(step)
    found = regions(step)
    store = store or Store(lowering=lowering)
    by_triton = lowering == "triton"
    ops = {} if by_triton or not measure else Products(store).choose(step.calls())
    compile_ = triton.compile_region if by_triton else functools.partial(compile_region, threads=1)
    forms = {region.number: region_text(region, in_place, ops=ops) for region in found}
    distinct = list(dict.fromkeys(form.text for form in forms.values()))
    index, ranks = place
    first = len(distinct) * index // ranks
    functions: dict[str, Function] = {}
    errors: dict[str, LoweringError] = {}
    num_compiled = 0
    large_first = sorted(distinct, key=lambda text: (-text.count('"op"'), text))
    in_turn = [*large_first[first:], *large_first[:first]]
    missing = [text for text in in_turn if not store.holds(text)]
    processes = 1 if by_triton else num_processes(ranks)
    with working_on(missing, store, processes=processes):
        for text in _progress(in_turn, show=bool(missing) and index == 0):
            try:
                functions[text], made = store.get(text, functools.partial(compile_, text))
                num_compiled += made
            except LoweringError as error:
                errors[text] = error
    refused = {r.number: errors[forms[r.number].text] for r in found if forms[r.number].text in errors}
    if refused and not fallback:
        raise _of_region(found, forms, refused)
    lowered = {}
    for region in found:
        form = forms[region.number]
        if form.text in functions:
            name = f"region_{distinct.index(form.text)}"
            lowered[region.number] = LoweredRegion(region.calls, form, functions[form.text], name)
    return Lowered(lowered, ops, len(distinct), num_compiled, refused)


def _of_region(
    found: list[Region], forms: Mapping[int, RegionText], refused: Mapping[int, LoweringError]
) -> LoweringError:
    """The error of the first region that cannot be compiled, with its place and its text."""
    region = next(region for region in found if region.number in refused)
    cause, last = refused[region.number], region.calls[-1]
    place = f"{last.meta['phase']} of {last.meta['module'] or 'the model'}"
    where = f"region {region.number} ({place}, {len(region.calls)} calls)"
    if cause.expected is None:
        return cause
    error = LoweringError.of(where, expected=cause.expected, got=cause.got or "", fix=cause.fix or "")
    error.__cause__ = cause.__cause__
    if hasattr(error, "add_note"):
        error.add_note("\n".join(node.format_node() or "" for node in region.calls))
        error.add_note(forms[region.number].text)
    return error


def _progress(texts: list[str], *, show: bool) -> Any:
    """The texts, with a bar for a person who waits."""
    return tqdm(
        texts, desc="fxzero: compiling regions", unit="region", leave=False, disable=not (show and sys.stderr.isatty())
    )
