"""Memory of a deep model from three shallow ones: exact where memory is linear in the number of blocks.

[Note: depth]
The programs of a model with 4, 5 and 6 blocks differ in how often a block occurs and in nothing else. So each place
that all of them have (before, between and after the blocks; in the first blocks and in the last ones, counted from
their end) has memory that is linear in the number of blocks: two depths give the line, the third must lie on it, at
every place. The peak at another depth is the highest of all lines there; it may stand at another place than in the
shallow models. Places inside middle blocks are between those of the first and the last blocks; that is checked, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fxzero.cost.memory_course import Course, Place

_NUMBERED = re.compile(r"^((?:.*?\.)?)(\d+)(?=\.|$)")  # a path up to its first number: "layers." and 3


@dataclass(frozen=True)
class Predicted:
    """Predicted memory of a step on one rank.

    Args:
        state_bytes: what rests between steps, and the batch.
        peak_bytes: the most that is alive, state included.
        place: where that is, in words.
        kinds: bytes by kind at the peak; they add up to it.
    """

    state_bytes: int
    peak_bytes: int
    place: str
    kinds: dict[str, int]

    @classmethod
    def of(cls, course: Course) -> Predicted:
        """The peak of a course."""
        peak = course.peak
        return cls(course.state_bytes, course.totals[peak], str(course.places[peak]), dict(course.peak_kinds))


class DepthLines:
    """Lines through the memory of three depths.

    Args:
        courses: depth -> course, at three depths.
        edge: how many blocks at either end have places of their own: the first whose memory is that of the next one's
            plus a constant, with what a schedule moves from block to block.

    Raises:
        ValueError: saying why memory is not linear in depth.
    """

    def __init__(self, courses: Mapping[int, Course], *, edge: int) -> None:
        (self.first, self.second, third) = sorted(courses)
        deep = _lists_that_grow([courses[depth] for depth in sorted(courses)])
        if not deep:
            raise ValueError("no list of modules grows with it")
        totals = {depth: _by_place(course, deep, edge) for depth, course in courses.items()}
        self.low, self.high = totals[self.first], totals[self.second]
        self.courses = courses
        if not totals[self.first].keys() == totals[self.second].keys() == totals[third].keys():
            raise ValueError("the programs do not repeat from block to block")
        lines = ((place, self._at(self.low[place], self.high[place], third)) for place in self.low)
        off = next((place for place, expected in lines if expected != totals[third][place]), None)
        if off is not None:
            raise ValueError(f"memory is not linear at {off}")
        for depth, course in courses.items():
            if max(totals[depth].values()) != max(course.totals):
                raise ValueError("the peak is in a middle block")

    def at(self, depth: int) -> Predicted:
        """What the course at another depth peaks at."""
        peak = max(self.low, key=lambda place: self._at(self.low[place], self.high[place], depth))
        low, high = self.courses[self.first], self.courses[self.second]
        total = self._at(self.low[peak], self.high[peak], depth)
        kinds = {
            kind: self._at(low.peak_kinds.get(kind, 0), high.peak_kinds.get(kind, 0), depth)
            for kind in {**low.peak_kinds, **high.peak_kinds}
        }
        # a place that is no peak of the shallow models: its kinds are not known
        kinds = kinds if sum(kinds.values()) == total and min(kinds.values()) >= 0 else {}
        return Predicted(self._at(low.state_bytes, high.state_bytes, depth), total, str(peak), kinds)

    def _at(self, low: int, high: int, depth: int) -> int:
        slope, rest = divmod(high - low, self.second - self.first)
        if rest:
            raise ValueError("memory does not grow by whole bytes a block")
        return low + slope * (depth - self.first)


def _lists_that_grow(courses: list[Course]) -> dict[str, list[int]]:
    """Path before the number -> how many modules the list has at each depth, where that differs."""
    sizes: dict[str, list[int]] = {}
    for index, course in enumerate(courses):
        for place in course.places:
            match = _NUMBERED.match(place.module)
            if match:
                counts = sizes.setdefault(match[1], [0] * len(courses))
                counts[index] = max(counts[index], int(match[2]) + 1)
    return {path: counts for path, counts in sizes.items() if len(set(counts)) > 1}


def _by_place(course: Course, deep: Mapping[str, list[int]], edge: int) -> dict[Place, int]:
    """The totals of a course at the places that it has at any depth."""
    size = {path: 1 + max(_numbers(course, path)) for path in deep}
    found: dict[Place, int] = {}
    for place, total in zip(course.places, course.totals, strict=True):
        match = _NUMBERED.match(place.module)
        if match is None or match[1] not in size:
            found[place] = total
            continue
        number, count = int(match[2]), size[match[1]]
        if edge <= number < count - edge:
            continue
        name = str(number) if number < edge else f"last-{count - 1 - number}"
        found[replace(place, module=match[1] + name + place.module[match.end() :])] = total
    return found


def _numbers(course: Course, path: str) -> list[int]:
    matches = (_NUMBERED.match(place.module) for place in course.places)
    return [int(match[2]) for match in matches if match and match[1] == path]
