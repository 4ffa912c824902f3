"""The regions of a step that are compiled once for all sizes of its batch.

[Note: regions of all sizes]
They are learned from two programs of the step, one at the sizes of a batch and one at sizes that nobody has asked for,
of which only the graph is made; these sizes are chosen so that products of them tell which is which. A program of
further sizes takes a function where its region's own text is equal to the symbolic one at these sizes, and where the
conditions hold under which it was compiled. Where they do not ("batch*sequence <= 4096"), the text is compiled once
more as the present sizes decide: a variant, beside the first. What is not found is compiled for its shape alone;
a pass may make other programs of large batches than of small ones, so there are up to MOST_LESSONS at which programs
are compared.

Which op computes a matrix product is chosen by measuring shapes; a function for all sizes keeps the choice of the shape
at which it was learned.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxzero.graph import StepGraph
from fxzero.lower.conditions import hold
from fxzero.lower.in_turn import Maker
from fxzero.lower.region_text import RegionText
from fxzero.lower.store import Function
from fxzero.lower.symbolic_text import Sizes, SymbolicText, symbolic_text

log = logging.getLogger("fxzero")

MOST_LESSONS = 3  # of a trace
MOST_VARIANTS = 4  # of a region, for sizes at which the compiler has decided otherwise


@dataclass(frozen=True)
class Served:
    """A region that a function for all sizes runs.

    Args:
        text: of the region, sizes left open.
        function: takes the sizes, then the region's inputs.
        values: of these sizes.
        num_chosen: so many calls another op than their own runs.
    """

    text: str
    function: Function
    values: tuple[int, ...]
    num_chosen: int


class SizedRegions:
    """The regions of a step that have been learned so far.

    Attributes:
        fixed: texts of regions that do not depend on sizes.
    """

    def __init__(self) -> None:
        self.fixed: set[str] = set()
        self._known: dict[str, SymbolicText] = {}
        self._made: dict[str, tuple[Function, list[str]]] = {}
        self._refused: set[str] = set()
        self._lessons: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def unknown(self, plain: Iterable[str], sizes: Sizes) -> set[str]:
        """Of these texts, those that depend on sizes, as far as is known, and are not known for all of them."""
        known = {text.at(sizes) for text in self._known.values() if {*text.names} <= {*sizes}}
        return {*plain} - self.fixed - known

    def begins_lesson(self, source: Any) -> bool:
        """Whether programs of a trace may be compared once more; counts them."""
        number = self._lessons.get(source, 0)
        self._lessons[source] = number + 1
        return number < MOST_LESSONS

    def learn(self, here: Iterable[RegionText], sizes: Sizes, others: Iterable[str], at: Sizes) -> None:
        """Compare a program's regions with those of another one of its trace.

        Args:
            here: the program's regions.
            sizes: its sizes.
            others: texts of the other's regions, each call by its own op.
            at: its sizes.
        """
        forms, texts = list(here), list(others)
        chosen = {form.plain: form.text for form in forms}
        self.fixed |= {*chosen} & {*texts}
        for one, other in _pairs([form.plain for form in forms], texts):
            found = symbolic_text(one, sizes, other, at, chosen=chosen[one])
            if found is not None and found.at(sizes) == one and found.at(at) == other:
                self._known[found.text] = found
        log.info("fxzero: %d regions are for all sizes of %s", len(self._known), ", ".join(sizes))

    def serve(self, plain: Mapping[int, str], sizes: Sizes, maker: Maker) -> tuple[dict[int, Served], int]:
        """Number of a region -> what runs it; and how many functions were compiled for that.

        Args:
            plain: number -> text of the region, each call by its own op.
            sizes: of the program.
            maker: makes functions of texts.
        """
        candidates = (known for known in self._known.values() if {*known.names} <= {*sizes})
        by_text = {known.at(sizes): known for known in candidates if known.text not in self._refused}
        wanted = {number: by_text[text] for number, text in plain.items() if text in by_text}
        functions, num_compiled = self._functions({known.text for known in wanted.values()}, sizes, maker)
        served = {
            number: Served(known.text, functions[known.text], known.values(sizes), known.num_chosen)
            for number, known in wanted.items()
            if known.text in functions
        }
        return served, num_compiled

    def _functions(self, wanted: Iterable[str], sizes: Sizes, maker: Maker) -> tuple[dict[str, Function], int]:
        """Text -> the first of its variants whose conditions hold."""
        found: dict[str, Function] = {}
        left, num_compiled = sorted(wanted), 0
        for variant in range(MOST_VARIANTS):
            texts = {_variant(text, variant): text for text in left}
            made = maker.functions([text for text in texts if text not in self._made], sizes)
            num_compiled += made.num_compiled
            self._made |= {text: (f, maker.store.conditions(text)) for text, f in made.functions.items()}
            for text, error in made.errors.items():
                log.info("fxzero: a region is compiled for one shape: %s", error)
                self._refused.add(texts.pop(text))
            left = [original for text, original in texts.items() if not hold(self._made[text][1], sizes)]
            found |= {original: self._made[text][0] for text, original in texts.items() if original not in left}
        return found, num_compiled


@dataclass(frozen=True)
class AtSizes:
    """Where a program stands among those of its step at other sizes.

    Args:
        sizes: name -> size.
        source: the trace that it comes from.
        regions: what the step has learned.
        elsewhere: makes the program at other sizes, one after the other, with its regions cut.
    """

    sizes: Sizes
    source: Any
    regions: SizedRegions = field(default_factory=SizedRegions)
    elsewhere: Callable[[], Iterable[tuple[StepGraph, Sizes]]] = tuple


def _variant(text: str, number: int) -> str:
    return f'{text[:-1]},"variant":{number}}}' if number else text


def _pairs(here: list[str], there: list[str]) -> dict[tuple[str, str], None]:
    """The texts that stand for each other: the k-th of those that are equal but for digits."""
    groups: tuple[dict[str, list[str]], dict[str, list[str]]] = defaultdict(list), defaultdict(list)
    for texts, group in zip((here, there), groups, strict=True):
        for text in texts:
            group[re.sub(r"\d+", "0", text)].append(text)
    found: dict[tuple[str, str], None] = {}
    for skeleton, texts in groups[0].items():
        others = groups[1][skeleton]
        if len(texts) == len(others):
            found |= dict.fromkeys(zip(texts, others, strict=True))
    return found
