"""The best that a block can do for each amount of memory: an integer program, solved exactly.

Variables: how each tensor is kept (or not), and which values backward has again. What backward reads must be kept or
had again; what is had again follows from values that are. The least time is found under bounds on the bytes that are
kept; each solution is exact for its bound (to the solver's 1e-6). HiGHS solves it (`solver`).
Source: Checkmate (Jain et al., 2020), here for one block and with one copy of each value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxzero.decide.activations import Problem
from fxzero.integer_program import solve

NUM_BOUNDS = 16
# Of the solver's search, so that a model without repeated blocks ends too: by count, as a clock would let ranks differ.
# What is found by then is an answer that holds, perhaps not the best. Blocks of transformers stay far below.
_MAX_NODES = 100
_LARGE = 300  # variables from which an answer may be this much worse than the best, as a fraction
_GAP = 0.005
_ROUNDING = 1e-7  # of a sum of seconds


@dataclass(frozen=True)
class Choice:
    """One answer to a problem.

    Args:
        kept: (index of a storage, index of its option), for each that is kept.
        again: the values that backward has again, in forward order.
        kept_bytes: device memory that the storages hold from forward to backward.
        seconds: that the answer adds to a step.
    """

    kept: tuple[tuple[int, int], ...]
    again: tuple[int, ...]
    kept_bytes: int
    seconds: float


@functools.lru_cache(maxsize=64)
def frontier(problem: Problem, *, num_bounds: int = NUM_BOUNDS) -> tuple[Choice, ...]:
    """Answers that no other beats both in bytes and in seconds: the two ends, and between them where most is unknown.

    Args:
        problem: of one block.
        num_bounds: how many bounds on bytes are tried between the ends; each halves the widest gap, by bytes times
            seconds, in which there may be an answer. Enough of them find all answers.

    Returns:
        Answers with falling bytes and rising seconds; the first takes the least time of all. Remembered: microbatches
        and first steps have the same blocks.
    """
    program = _Program(problem)
    first = program.fastest()
    last = program.fastest(program.smallest(instead=first).kept_bytes, instead=first)
    gaps = [_Gap(first, last, last.kept_bytes)]
    found = {first.kept_bytes: first, last.kept_bytes: last}
    for _ in range(num_bounds):
        gap = max(gaps, key=lambda g: (g.area, g.upper.kept_bytes))
        if not gap.area:
            break
        gaps.remove(gap)
        middle = (gap.upper.kept_bytes + gap.known_bytes) // 2
        between = program.fastest(middle, instead=gap.lower)
        found[between.kept_bytes] = between
        gaps.append(_Gap(gap.upper, between, middle))
        if between.kept_bytes > gap.lower.kept_bytes:
            gaps.append(_Gap(between, gap.lower, gap.known_bytes))
    best = [first]
    for size in sorted(found, reverse=True):
        if found[size].seconds > best[-1].seconds:
            best.append(found[size])
    return tuple(best)


@dataclass(frozen=True)
class _Gap:
    """Between two answers: nothing with at most `known_bytes` takes less time than the lower one."""

    upper: Choice
    lower: Choice
    known_bytes: int

    @property
    def area(self) -> float:
        """Bytes times seconds in which another answer may lie."""
        return max(self.upper.kept_bytes - self.known_bytes - 1, 0) * (self.lower.seconds - self.upper.seconds)


class _Program:
    """The integer program of a problem; columns: options of storages, then values that can be had again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.options = [(s, o) for s, options in enumerate(problem.storages) for o in range(len(options))]
        self.again = [index for index, value in enumerate(problem.values) if value.seconds is not None]
        self._column = {index: len(self.options) + place for place, index in enumerate(self.again)}
        self._kept_columns: dict[int, list[int]] = {}
        for column, (storage, _) in enumerate(self.options):
            self._kept_columns.setdefault(storage, []).append(column)
        self.bytes = np.zeros(len(self.options) + len(self.again))
        self.seconds = np.zeros_like(self.bytes)
        for column, (storage, number) in enumerate(self.options):
            option = problem.storages[storage][number]
            self.bytes[column], self.seconds[column] = option.kept_bytes, option.seconds
        for index, column in self._column.items():
            self.seconds[column] = problem.values[index].seconds
        self.rows = self._rows()

    def _rows(self) -> list[tuple[dict[int, float], float]]:
        """(coefficients by column, lower bound) of each constraint."""
        rows = [({column: -1.0 for column in columns}, -1.0) for columns in self._kept_columns.values()]
        for index, value in enumerate(self.problem.values):
            if value.read and value.storage is not None:
                rows.append((self._available(index), 1.0))
            if value.seconds is None:
                continue
            for source in value.sources:
                if self.problem.values[source].storage is not None:
                    rows.append(({**self._available(source), self._column[index]: -1.0}, 0.0))
        return rows

    def _available(self, index: int) -> dict[int, float]:
        """The columns of which one makes a value available in backward."""
        storage = self.problem.values[index].storage
        assert storage is not None
        columns = [*self._kept_columns[storage], *([self._column[index]] if index in self._column else [])]
        return dict.fromkeys(columns, 1.0)

    def fastest(self, bound_bytes: float = np.inf, *, instead: Choice | None = None) -> Choice:
        """The answer that takes the least time, with at most so many bytes; of those, the one with the fewest.

        Args:
            bound_bytes: the most that may be kept.
            instead: what to say where none is found.
        """
        quick = self._solve(self.seconds, bound_bytes=bound_bytes)
        if quick is None:
            assert instead is not None, "keeping everything is always an answer"
            return instead
        shortest = float(self.seconds @ quick)
        small = self._solve(self.bytes, bound_bytes=bound_bytes, bound_s=shortest * (1 + _ROUNDING))
        return self._choice(quick if small is None else small)

    def smallest(self, *, instead: Choice) -> Choice:
        """The answer that keeps the fewest bytes."""
        found = self._solve(self.bytes)
        return instead if found is None else self._choice(found)

    def _solve(self, cost: Any, *, bound_bytes: float = np.inf, bound_s: float = np.inf) -> Any:
        from scipy.sparse import csr_array  # imported here: it takes half a second

        if not self.rows:
            return np.zeros_like(cost)
        rows = list(self.rows)
        for size, bound in ((self.bytes, bound_bytes), (self.seconds, bound_s)):
            unit = max(size) or 1.0
            if np.isfinite(bound):
                rows.append(({column: -value / unit for column, value in enumerate(size) if value}, -bound / unit))
        where = [(number, column) for number, (row, _) in enumerate(rows) for column in row]
        entries = [value for row, _ in rows for value in row.values()]
        matrix = csr_array((entries, tuple(np.array(where).T)), shape=(len(rows), len(cost)))
        found = solve(
            cost / (max(cost) or 1.0),
            [(matrix, [bound for _, bound in rows], np.inf)],
            integral=np.ones(len(cost)),
            upper=1,
            max_nodes=_MAX_NODES,
            gap=_GAP if len(cost) > _LARGE else 0.0,
        )
        return None if found is None else np.round(found)

    def _choice(self, chosen: Any) -> Choice:
        """The answer without what nothing needs."""
        values = self.problem.values
        kept = {storage: number for column, (storage, number) in enumerate(self.options) if chosen[column]}
        wanted = [index for index, value in enumerate(values) if value.read]
        needed: set[int] = set()
        used: set[int] = set()
        while wanted:
            index = wanted.pop()
            storage = values[index].storage
            if storage is None or storage in kept:
                used |= set() if storage is None else {storage}
            elif index not in needed:
                is_again = index in self._column and chosen[self._column[index]]
                assert is_again, f"value {index} is neither kept nor had again"
                needed.add(index)
                wanted += values[index].sources
        options = {storage: self.problem.storages[storage][kept[storage]] for storage in used}
        seconds = sum(values[index].seconds or 0.0 for index in sorted(needed))
        return Choice(
            tuple((storage, kept[storage]) for storage in sorted(used)),
            tuple(sorted(needed)),
            sum(option.kept_bytes for option in options.values()),
            seconds + sum(options[storage].seconds for storage in sorted(options)),
        )
