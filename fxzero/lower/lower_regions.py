"""The regions of a program become functions: each distinct one is compiled once, on one rank of a host."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxzero.errors import LoweringError
from fxzero.graph import StepGraph
from fxzero.graph.regions import Region, region_of, regions
from fxzero.graph.storage import InPlace
from fxzero.lower import triton
from fxzero.lower.in_turn import Maker
from fxzero.lower.inductor import compile_region
from fxzero.lower.products import Products
from fxzero.lower.region_text import RegionText, region_text
from fxzero.lower.sized_regions import AtSizes, Served
from fxzero.lower.store import Function, Store
from fxzero.plan import Plan


@dataclass(frozen=True)
class LoweredRegion:
    """A region that runs as one function.

    Args:
        calls: of the program, in order.
        form: its inputs, outputs, and what it writes over.
        function: takes a list of the inputs, which it empties, and returns the outputs.
        name: of that function; equal regions share it.
        text: that it was made of: the region's own, or one for all sizes of the batch.
        sizes: of the batch, which it takes before the inputs.
        num_chosen: so many of its calls another op runs, as was chosen where it was learned for all sizes.
    """

    calls: tuple[fx.Node, ...]
    form: RegionText
    function: Function
    name: str
    text: str
    sizes: tuple[int, ...] = ()
    num_chosen: int = 0


@dataclass(frozen=True)
class Lowered:
    """The regions of a program.

    Args:
        regions: number -> what runs it.
        ops: calls that another op than their own runs.
        num_distinct: so many functions there are.
        num_compiled: so many of them this process has compiled; what is missing was on disk, or others did it.
        refused: number of a region that runs call by call, since it cannot be compiled -> why.
        num_open: so many functions are for all sizes of the batch.
        num_alone: so many are for one shape though sizes are open; None: they are not.
    """

    regions: Mapping[int, LoweredRegion]
    ops: Mapping[fx.Node, Any]
    num_distinct: int
    num_compiled: int
    refused: Mapping[int, LoweringError] = field(default_factory=dict)
    num_open: int = 0
    num_alone: int | None = None


def lower_by_plan(step: StepGraph, plan: Plan, *, at: AtSizes | None = None) -> Lowered | None:
    """The regions of a program as functions, as its plan says; None where each call runs by itself.

    Args:
        step: with its regions cut, unless the plan's lowering is "eager".
        plan: of the program. Ranks of a host share the work, as torchrun's variables tell them apart.
        at: its sizes, where others may come.

    Raises:
        LoweringError: of a region that cannot be compiled.
    """
    if plan.lowering in ("auto", "eager"):
        return None
    place = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return lower_regions(step, lowering=plan.lowering, place=place, fallback=plan.eager_fallback, at=at)


def lower_regions(
    step: StepGraph,
    *,
    lowering: str = "inductor",
    store: Store | None = None,
    place: tuple[int, int] = (0, 1),
    fallback: bool = False,
    measure: bool = True,
    at: AtSizes | None = None,
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
        at: the program's sizes, where others may come; regions are then compiled for all of them, but for "triton".

    Raises:
        LoweringError: of a region that cannot be compiled.
    """
    in_place = InPlace(step)
    found = regions(step)
    store = store or Store(lowering=lowering)
    by_triton = lowering == "triton"
    compile_ = triton.compile_region if by_triton else functools.partial(compile_region, threads=1)
    maker = Maker(store, compile_, place, alone=by_triton)
    forms = {region.number: region_text(region, in_place) for region in found}
    served, num_open = ({}, 0) if at is None or by_triton else _served(step, forms, at, maker)
    chooses = measure and not by_triton
    ops = Products(store).choose([n for n in step.calls() if region_of(n) not in served]) if chooses else {}
    for region in (region for region in found if any(node in ops for node in region.calls)):
        forms[region.number] = region_text(region, in_place, ops=ops)
    distinct = list(dict.fromkeys(form.text for number, form in forms.items() if number not in served))
    made = maker.functions(distinct)
    refused = {n: made.errors[form.text] for n, form in forms.items() if form.text in made.errors and n not in served}
    if refused and not fallback:
        raise _of_region(found, forms, refused)
    names = {text: f"region_{i}" for i, text in enumerate([*distinct, *dict.fromkeys(s.text for s in served.values())])}
    lowered = {}
    for number, region in ((region.number, region) for region in found if region.number not in refused):
        form, open_ = forms[number], served.get(number)
        function, text = (made.functions[form.text], form.text) if open_ is None else (open_.function, open_.text)
        values, num_chosen = ((), 0) if open_ is None else (open_.values, open_.num_chosen)
        lowered[number] = LoweredRegion(region.calls, form, function, names[text], text, values, num_chosen)
    fixed = at.regions.fixed if at is not None else {*distinct}
    alone = None if at is None else len([text for text in distinct if text not in fixed])
    num_compiled = made.num_compiled + num_open
    return Lowered(lowered, ops, len(names), num_compiled, refused, len(names) - len(distinct), alone)


def _served(
    step: StepGraph, forms: Mapping[int, RegionText], at: AtSizes, maker: Maker
) -> tuple[dict[int, Served], int]:
    """The regions that functions for all sizes run, learned now if need be; and how many were compiled for that."""
    plain = {number: form.plain for number, form in forms.items()}
    if at.regions.unknown(plain.values(), at.sizes) and at.regions.begins_lesson(at.source):
        _learn(step, at, Products(maker.store))
    return at.regions.serve(plain, at.sizes, maker)


def _learn(step: StepGraph, at: AtSizes, products: Products) -> None:
    """Compare a program with those at other sizes, until all of its regions are known."""
    in_place, ops = InPlace(step), products.choose(step.calls())
    here = [region_text(region, in_place, ops=ops) for region in regions(step)]
    for other, sizes in at.elsewhere():
        there = InPlace(other)
        at.regions.learn(here, at.sizes, [region_text(region, there).plain for region in regions(other)], sizes)
        if not at.regions.unknown([form.plain for form in here], at.sizes):
            break


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
