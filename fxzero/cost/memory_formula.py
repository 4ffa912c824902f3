"""The predicted peak as formulas in batch size B, sequence length S and number of ranks W."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import sympy

from fxzero.cost.memory_course import Course
from fxzero.errors import FxzeroError

B, S, W = sympy.symbols("B S W", positive=True, integer=True)

CourseAt = Callable[[int, int, int], Course]


class FormulaError(FxzeroError):
    """Raised when no formula holds: the peak moves from node to node, or bytes are no such polynomial."""


@dataclass(frozen=True)
class PeakFormula:
    """Bytes at the peak.

    Args:
        place: the node at which the peak is, at all sizes that were tried.
        kinds: kind -> expression in B, S and W.
    """

    place: str
    kinds: Mapping[str, sympy.Expr]

    @property
    def peak(self) -> sympy.Expr:
        """All kinds together."""
        return sympy.expand(sympy.Add(*self.kinds.values()))

    def at(self, batch: int, sequence: int, world: int) -> int:
        """The bytes for one batch and number of ranks, as long as the peak stays where it is."""
        return int(self.peak.subs({B: batch, S: sequence, W: world}))


def peak_formula(
    course_at: CourseAt,
    *,
    batches: Sequence[int] = (2, 3),
    sequences: Sequence[int],
    worlds: Sequence[int] = (2, 4),
    check: tuple[int, int, int],
) -> PeakFormula:
    """The peak by kinds as sums of B^i S^j and of such over W, recovered exactly from courses and checked at one more.

    Rows that a number of ranks does not divide are padded, so the formulas hold for numbers that divide all rows; give
    such ones. A size of 1 is often another program, as is one rank: give others.

    Args:
        course_at: (batch, sequence, world) -> the course of memory there.
        batches, sequences, worlds: where to take it; k numbers make powers up to k - 1, of W from 0 to -1.
        check: (batch, sequence, world) where the formulas must hold, none of those.

    Raises:
        FormulaError: if the peak is not at the same node everywhere, or the check fails.
    """
    grid = list(itertools.product(batches, sequences, worlds))
    if check in grid or len(worlds) != 2:
        got = f"check={check}, worlds={tuple(worlds)}"
        expected = "two numbers of ranks, and sizes to check that are not among those recovered from"
        raise FormulaError.of("peak_formula", expected=expected, got=got, fix="give other numbers")
    courses = {sizes: course_at(*sizes) for sizes in (*grid, check)}
    _check_same_place(courses)
    powers = list(itertools.product(range(len(batches)), range(len(sequences)), (0, 1)))
    monomials = [B**i * S**j / W**k for i, j, k in powers]
    matrix = sympy.Matrix([[sympy.Rational(b**i * s**j, w**k) for i, j, k in powers] for b, s, w in grid])
    inverse = matrix.inv()
    kinds: dict[str, sympy.Expr] = {}
    for kind in dict.fromkeys(kind for course in courses.values() for kind in course.peak_kinds):
        values = sympy.Matrix([courses[sizes].peak_kinds.get(kind, 0) for sizes in grid])
        kinds[kind] = sympy.Add(*(c * m for c, m in zip(inverse * values, monomials, strict=True)))
        known = courses[check].peak_kinds.get(kind, 0)
        got = kinds[kind].subs(dict(zip((B, S, W), check, strict=True)))
        if got != known:
            raise FormulaError.of(
                where=f"{kind} at batch={check[0]}, sequence={check[1]}, world={check[2]}",
                expected=f"{known:,} bytes, as the program has it",
                got=f"{float(got):,.1f} by {kinds[kind]}",
                fix="give more sizes, and numbers of ranks that divide all rows",
            )
    return PeakFormula(str(courses[check].places[courses[check].peak]), kinds)


def _check_same_place(courses: Mapping[tuple[int, int, int], Course]) -> None:
    places = {sizes: course.places[course.peak] for sizes, course in courses.items()}
    (first, place), *others = places.items()
    moved = next(((sizes, other) for sizes, other in others if other != place), None)
    if moved is not None:
        raise FormulaError.of(
            where="batch={}, sequence={}, world={}".format(*moved[0]),
            expected=f"the peak at {place}, where it is at batch={first[0]}, sequence={first[1]}, world={first[2]}",
            got=f"one at {moved[1]}",
            fix="give sizes nearer to each other: there is one formula for each place",
        )
