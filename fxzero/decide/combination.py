"""One answer for each block, so that no place of the program holds more than the budget and the least time is lost.

An integer program again, over the answers of each block's frontier. Its bounds, one a place of the program, are added
as they are found broken: a few dozen decide, out of tens of thousands. What does not stand at a peak is so left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxzero.integer_program import solve

_NUM_WINDOWS = 16
_MAX_ROUNDS = 60
_RELATIVE_GAP = 5e-4
_MAX_NODES = 5000  # a bound by count: one by time would let ranks differ


@dataclass(frozen=True)
class Alternative:
    """One answer of a block.

    Args:
        seconds: that it adds to a step.
        change: place -> by how much more bytes are alive from there on than with nothing decided, in order.
        host_bytes: of host memory that it takes.
    """

    seconds: float
    change: Mapping[int, float]
    host_bytes: float = 0.0


class Combination:
    """Chooses among the alternatives of several blocks.

    Args:
        alive: bytes alive at each place of the program with nothing decided.
        blocks: the alternatives of each; the first changes nothing and costs nothing.
        host_bytes: of host memory that all may take together.
    """

    def __init__(
        self, alive: np.ndarray, blocks: Sequence[Sequence[Alternative]], *, host_bytes: float = float("inf")
    ) -> None:
        self.alive = alive
        self.blocks = blocks
        self.host_bytes = host_bytes
        self._all = [alternative for block in blocks for alternative in block]
        self._starts = np.cumsum([0, *map(len, blocks)])
        self._seconds = np.array([alternative.seconds for alternative in self._all])
        self._places = [np.fromiter(a.change, dtype=np.int64) for a in self._all]
        self._sums = [np.cumsum([0.0, *a.change.values()]) for a in self._all]

    def within(self, budget_bytes: float) -> list[int] | None:
        """The index of each block's answer such that the least time is lost; None where nothing fits."""
        return self._search(budget_bytes)

    def smallest(self) -> list[int]:
        """The index of each block's answer such that the peak is as low as it gets."""
        found = self._search(None)
        return [0] * len(self.blocks) if found is None else found  # the host has no room for what rests there anyway

    def alive_with(self, chosen: Sequence[int]) -> np.ndarray:
        """Bytes alive at each place with these answers."""
        change = np.zeros(len(self.alive) + 1)
        for start, number in zip(self._starts, chosen, strict=False):
            for place, size in self._all[start + number].change.items():
                change[min(place, len(self.alive))] += size
        return self.alive + np.cumsum(change[:-1])

    def _search(self, budget_bytes: float | None) -> list[int] | None:
        """Bounds are added until none is broken; without a budget, the bound itself is what is made small."""
        bounded: list[int] = [int(np.argmax(self.alive))]
        chosen: list[int] | None = None
        for _ in range(_MAX_ROUNDS):
            chosen = self._solve(bounded, budget_bytes)
            if chosen is None:
                return None
            alive = self.alive_with(chosen)
            limit = budget_bytes if budget_bytes is not None else max(alive[bounded])
            windows = np.array_split(np.arange(len(alive)), _NUM_WINDOWS)
            peaks = [int(window[np.argmax(alive[window])]) for window in windows if len(window)]
            broken = [place for place in peaks if alive[place] > limit * (1 + 1e-9) and place not in bounded]
            if not broken:
                return chosen
            bounded += broken
        return chosen

    def _solve(self, bounded: Sequence[int], budget_bytes: float | None) -> list[int] | None:
        count = len(self._all)
        unit = float(max(self.alive)) or 1.0
        one_each = np.zeros((len(self.blocks), count + 1))
        for row, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            one_each[row, start:end] = 1
        change = np.array([[self._change_at(number, place) for number in range(count)] for place in bounded]) / unit
        alive = self.alive[list(bounded)] / unit
        peak = -np.ones((len(bounded), 1)) if budget_bytes is None else np.zeros((len(bounded), 1))
        most = -alive if budget_bytes is None else budget_bytes / unit - alive
        cost = np.append(
            self._seconds / (max(abs(self._seconds)) or 1.0) * (1e-9 if budget_bytes is None else 1.0), 0.0
        )
        cost[-1] = 1.0 if budget_bytes is None else 0.0
        rows: list[tuple[Any, Any, Any]] = [(one_each, 1, 1), (np.hstack([change, peak]), -np.inf, most)]
        if np.isfinite(self.host_bytes) and any(a.host_bytes for a in self._all):
            taken = np.array([[*(a.host_bytes for a in self._all), 0.0]]) / unit
            rows.append((taken, -np.inf, self.host_bytes / unit))
        found = solve(
            cost,
            rows,
            integral=np.append(np.ones(count), 0),
            upper=np.append(np.ones(count), np.inf),
            max_nodes=_MAX_NODES,
            gap=_RELATIVE_GAP,
        )
        return None if found is None else self._chosen(found)

    def _chosen(self, solution: Any) -> list[int]:
        pairs = zip(self._starts, self._starts[1:], strict=False)
        return [int(np.argmax(solution[start:end])) for start, end in pairs]

    def _change_at(self, number: int, place: int) -> float:
        after = int(np.searchsorted(self._places[number], place, side="right"))
        return float(self._sums[number][after])
