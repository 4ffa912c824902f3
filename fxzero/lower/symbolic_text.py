"""A region's text with sizes of the batch left open.

[Note: open sizes]
Two programs of one step at two sets of sizes have regions whose texts differ in whole numbers only. Where they do, the
symbolic text has an expression of sizes in the number's place: `{"size": [[4, "batch", "length"], [-4, "batch"]]}`
for 4 * batch * length - 4 * batch. Its key "sizes" lists the names. The expressions are guessed from two numbers each,
and need no trust: a symbolic text serves a region only where, with that program's sizes put in, it is equal to the
region's own text.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Sizes = Mapping[str, int]
Terms = list[list[Any]]  # a sum of products: a whole number and names in each

_HIGHEST_POWER, _HIGHEST_DEGREE = 2, 3


@dataclass(frozen=True)
class SymbolicText:
    """A region with open sizes.

    Args:
        text: what is compiled; see [Note: open sizes].
        plain: its document with each call's own op, by which regions are found to be the same.
        names: of the sizes, in the order in which the compiled function takes them.
        num_chosen: so many calls another op than their own runs.
    """

    text: str
    plain: Any
    names: tuple[str, ...]
    num_chosen: int = 0

    def at(self, sizes: Sizes) -> str:
        """The canonical text of this region at some sizes, with each call's own op."""
        return as_text(_filled(self.plain, sizes))

    def values(self, sizes: Sizes) -> tuple[int, ...]:
        """What the compiled function takes first."""
        return tuple(sizes[name] for name in self.names)


def as_text(document: Any) -> str:
    """A document as canonical text."""
    return json.dumps(document, separators=(",", ":"))


def names_in(document: Mapping[str, Any]) -> list[str]:
    """The sizes that a document leaves open."""
    return list(document.get("sizes", ()))


def symbolic_text(
    one: str, sizes: Sizes, other: str, other_sizes: Sizes, *, chosen: str | None = None
) -> SymbolicText | None:
    """The symbolic text of a region that has one text at `sizes` and another at `other_sizes`.

    Args:
        one, other: texts of the region in two programs of a step.
        sizes, other_sizes: of these; names that have the same size in both are no symbols.
        chosen: the first text with the ops that run its calls.

    Returns:
        None where the texts are equal, or differ in more than numbers that follow from sizes.
    """
    if one == other:
        return None
    document = _merged(json.loads(one), json.loads(other), _Solver(sizes, other_sizes))
    if document is None:
        return None
    names = tuple(name for name in sizes if name in {*_names(document)})
    calls = document["calls"]
    ops = [call["op"] for call in (calls if chosen is None else json.loads(chosen)["calls"])]
    runs = {**document, "calls": [{**call, "op": op} for call, op in zip(calls, ops, strict=True)], "sizes": names}
    num_chosen = sum(call["op"] != op for call, op in zip(calls, ops, strict=True))
    return SymbolicText(as_text(runs), document, names, num_chosen)


def value_of(terms: Terms, sizes: Mapping[str, Any]) -> Any:
    """The value of an expression; sizes may be numbers, or whatever can be multiplied and added."""
    total: Any = 0
    for factor, *names in terms:
        product: Any = None
        for name in names:
            product = sizes[name] if product is None else product * sizes[name]
        term = factor if product is None else product if factor == 1 else product * factor
        total = term if isinstance(total, int) and total == 0 else total + term
    return total


def terms_of(value: Any) -> Terms | None:
    """The expression that a value of a document is, if it is one."""
    return value["size"] if isinstance(value, dict) and [*value] == ["size"] else None


def _filled(value: Any, sizes: Sizes) -> Any:
    """A document with numbers for its expressions."""
    if isinstance(value, list):
        return [_filled(item, sizes) for item in value]
    if not isinstance(value, dict):
        return value
    terms = terms_of(value)
    return {key: _filled(item, sizes) for key, item in value.items()} if terms is None else value_of(terms, sizes)


def _names(value: Any) -> Iterator[str]:
    """The names in the expressions of a document."""
    terms = terms_of(value)
    if terms is not None:
        yield from (name for _, *names in terms for name in names)
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _names(item)


def _merged(one: Any, other: Any, solver: _Solver) -> Any:
    """One document for both, with expressions where numbers differ; None where that cannot be."""
    if type(one) is not type(other):
        return None
    if isinstance(one, list) and len(one) == len(other):
        items = [_merged(a, b, solver) if a != b else a for a, b in zip(one, other, strict=True)]
        return None if any(i is None and a is not None for i, a in zip(items, one, strict=True)) else items
    if isinstance(one, dict) and [*one] == [*other]:
        found = {key: _merged(a, other[key], solver) if a != other[key] else a for key, a in one.items()}
        return None if any(v is None and one[key] is not None for key, v in found.items()) else found
    if type(one) is int:
        terms = solver.solve(one, other)
        return None if terms is None else {"size": terms}
    return None


class _Solver:
    """Finds the expression that has one value at some sizes and another at others.

    Products come first, c * batch * length; then a product times a line, batch * (c * length + d), with the least d.
    """

    def __init__(self, sizes: Sizes, others: Sizes) -> None:
        self._names = [name for name in sizes if sizes[name] != others[name]]
        self._sizes, self._others = sizes, others
        self._products = sorted(_products(self._names), key=lambda names: (len(names), names))
        self._known: dict[tuple[int, int], Terms | None] = {}

    def solve(self, one: int, other: int) -> Terms | None:
        """The expression with these two values; None where there is none."""
        key = one, other
        if key not in self._known:
            self._known[key] = self._product(one, other) or self._line(one, other)
        return self._known[key]

    def _product(self, one: int, other: int) -> Terms | None:
        for names in self._products:
            factor, rest = divmod(one, self._at(names, self._sizes))
            if names and not rest and factor * self._at(names, self._others) == other:
                return [[factor, *names]]
        return None

    def _line(self, one: int, other: int) -> Terms | None:
        found: list[tuple[int, int, Terms]] = []
        for names, name in itertools.product(self._products, self._names):
            a = Fraction(one, self._at(names, self._sizes))
            b = Fraction(other, self._at(names, self._others))
            slope = (b - a) / (self._others[name] - self._sizes[name])
            rest = a - slope * self._sizes[name]
            if slope and slope.denominator == rest.denominator == 1 and len(names) < _HIGHEST_DEGREE:
                found.append((abs(int(rest)), len(names), [[int(slope), *names, name], [int(rest), *names]]))
        return min(found)[-1] if found else None

    @staticmethod
    def _at(names: Sequence[str], sizes: Sizes) -> int:
        return math.prod(sizes[name] for name in names)


def _products(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Products of names, up to a degree; the empty one is 1."""
    for powers in itertools.product(range(_HIGHEST_POWER + 1), repeat=len(names)):
        if sum(powers) <= _HIGHEST_DEGREE:
            yield tuple(name for name, power in zip(names, powers, strict=True) for _ in range(power))
