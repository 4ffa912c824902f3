"""Memory of a deep model from three shallow ones: exact where memory is linear in the number of blocks.

[Note: depth]
The programs of a model with 4, 5 and 6 blocks differ in how often a block occurs and in nothing else. So each place
that all of them have (before, between and after the blocks; in the first blocks and in the last ones, counted from
their end) has memory, kind by kind, that is linear in the number of blocks: two depths give the line, the third must
lie on it, at every place. Memory at a place of the blocks in the middle is linear in the number of blocks and in the
block's own number; the middle blocks of the second and third depth say how, and the places of the last block before the
middle, or of the first behind it, must bear it out (a schedule that runs up at one end has not settled there). The peak
at another depth is the highest of all of these; it may stand at another place than in the shallow models.
`cost/course_at_depth.py` draws the whole course.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fxzero.cost.memory_course import Course, Place

_Name = TypeVar("_Name", bound=Hashable)
_NUMBERED = re.compile(r"^((?:.*?\.)?)(\d+)(?=\.|$)")  # a path up to its first number: "layers." and 3


@dataclass(frozen=True)
class Predicted:
    """Predicted memory of a step on one rank.

    Args:
        state_bytes: what rests between steps, and the batch.
        peak_bytes: the most that is alive, state included.
        place: where that is, in words.
        kinds: bytes by kind at the peak; they add up to it.
        elsewhere: tier -> the most bytes there, for tiers that are used.
        swapped: (tier, "out" or "in") -> bytes that a step moves.
    """

    state_bytes: int
    peak_bytes: int
    place: str
    kinds: dict[str, int]
    elsewhere: dict[str, int]
    swapped: dict[tuple[str, str], int]

    @classmethod
    def of(cls, course: Course) -> Predicted:
        """The peak of a course."""
        peak, kinds = course.peak, course.peak_kinds
        place = str(course.places[peak])
        elsewhere, swapped = dict(course.elsewhere), dict(course.swapped)
        return cls(course.state_bytes, sum(kinds.values()), place, kinds, elsewhere, swapped)


@dataclass(frozen=True)
class Block:
    """Which module of a list a place is in.

    Args:
        list_path: of the list, with its dot: "layers."; among the lists that grow.
        number: of the module.
        rest: path below it.
    """

    list_path: str
    number: int
    rest: str


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
        (self.first, self.second, self.third) = sorted(courses)
        self.courses, self.edge = courses, edge
        self.lists = _lists_that_grow([courses[depth] for depth in sorted(courses)])
        if not self.lists:
            raise ValueError("no list of modules grows with it")
        for path, sizes in self.lists.items():
            if sizes != list(range(sizes[0], sizes[0] + 3)) or sizes[1] <= 2 * edge:
                raise ValueError(f"{path}* does not grow by one block each")
        self.kinds = list(courses[self.first].by_kind)
        self._set_lines()
        self._set_middle()
        if self.elsewhere_at(self.third) != dict(courses[self.third].elsewhere):
            raise ValueError("what is off the device is not linear")
        if self.swapped_at(self.third) != dict(courses[self.third].swapped):
            raise ValueError("what is swapped is not linear")

    def at(self, depth: int) -> Predicted:
        """What the course at another depth peaks at."""
        names, tables = [*self.row], [self.table_at(depth)]
        sizes = self.sizes_at(depth)
        for number in (lambda size: self.edge, lambda size: size - 1 - self.edge):
            numbers = {path: number(size) for path, size in sizes.items()}
            if min(numbers.values()) >= self.edge:  # the first and the last block of the middle
                names += [_starred(key, str(numbers[path])) for key, path in self.middle.items()]
                tables.append(self.middle_at(depth, numbers))
        table = np.concatenate(tables)
        peak = int(table.sum(axis=1).argmax())
        kinds = {kind: int(size) for kind, size in zip(self.kinds, table[peak], strict=True) if size}
        place, elsewhere, swapped = str(names[peak]), self.elsewhere_at(depth), self.swapped_at(depth)
        return Predicted(self.state_at(depth), sum(kinds.values()), place, kinds, elsewhere, swapped)

    def _set_lines(self) -> None:
        """Lines through the places that all depths have."""
        courses = self.courses
        rows = {depth: self._rows(course) for depth, course in courses.items()}
        self.row = {place: index for index, place in enumerate(rows[self.first])}
        if not rows[self.first].keys() == rows[self.second].keys() == rows[self.third].keys():
            raise ValueError("the programs do not repeat from block to block")
        tables = {depth: self._table(courses[depth], [rows[depth][place] for place in self.row]) for depth in courses}
        self.low, self.high = tables[self.first], tables[self.second]
        off = (self.table_at(self.third) != tables[self.third]).any(axis=1)
        if off.any():
            raise ValueError(f"memory is not linear at {list(self.row)[int(off.argmax())]}")

    def _set_middle(self) -> None:
        """How memory at the places of a middle block grows with the depth and with the block's number."""
        second, third = self.courses[self.second], self.courses[self.third]
        sides = [self._of_block(second, 0), self._of_block(third, 0), self._of_block(third, 1)]
        if not sides[0].keys() == sides[1].keys() == sides[2].keys():
            raise ValueError("the programs do not repeat from block to block")
        self.middle = {key: key.module.partition("*")[0] for key in sides[0]}
        tables = (
            self._table(course, [side[key] for key in self.middle])
            for course, side in zip((second, third, third), sides, strict=True)
        )
        at_second, self.base, next_block = tables
        self.by_depth, self.by_number = self.base - at_second, next_block - self.base
        self.middle_row = {key: index for index, key in enumerate(self.middle)}
        borne_out = [self._agrees(lambda size: self.edge - 1), self._agrees(lambda size: size - self.edge)]
        off = ~(borne_out[0] | borne_out[1]).all(axis=1)
        if off.any():
            raise ValueError(f"memory of middle blocks is not linear at {list(self.middle)[int(off.argmax())]}")

    def _agrees(self, number_of: Callable[[int], int]) -> np.ndarray:
        """Which bytes of middle places, each kind for itself, go on in a block outside of the middle."""
        agrees = np.ones_like(self.base, dtype=bool)
        for depth in self.courses:
            sizes = self.sizes_at(depth)
            numbers = {path: number_of(size) for path, size in sizes.items()}
            expected, table = self.middle_at(depth, numbers), self.table_at(depth)
            for index, (key, path) in enumerate(self.middle.items()):
                named = self.named(_starred(key, str(numbers[path])), sizes)
                row = self.row.get(named) if named is not None else None
                agrees[index] &= False if row is None else expected[index] == table[row]
        return agrees

    def middle_at(self, depth: int, numbers: Mapping[str, int]) -> np.ndarray:
        """Bytes at another depth, a row for each place of a middle block (`middle`), a column for each kind.

        Args:
            depth: of the model.
            numbers: list -> which of its blocks.
        """
        ahead = np.array([[numbers[path] - self.edge] for path in self.middle.values()], dtype=np.int64)
        table: np.ndarray = self.base + self.by_number * ahead.reshape(-1, 1) + self.by_depth * (depth - self.third)
        return table

    def sizes_at(self, depth: int) -> dict[str, int]:
        """List that grows -> how many blocks it has at another depth."""
        return {path: sizes[0] + depth - self.first for path, sizes in self.lists.items()}

    def state_at(self, depth: int) -> int:
        """Bytes of state at another depth."""
        low, high = self.courses[self.first], self.courses[self.second]
        return int(self._at(np.array([low.state_bytes]), np.array([high.state_bytes]), depth)[0])

    def table_at(self, depth: int) -> np.ndarray:
        """Bytes at another depth, a row for each place that all depths have (`row`), a column for each kind."""
        return self._at(self.low, self.high, depth)

    def elsewhere_at(self, depth: int) -> dict[str, int]:
        """Tier -> the most bytes there at another depth."""
        return self._amounts(self.courses[self.first].elsewhere, self.courses[self.second].elsewhere, depth)

    def swapped_at(self, depth: int) -> dict[tuple[str, str], int]:
        """(tier, "out" or "in") -> bytes that a step moves at another depth."""
        return self._amounts(self.courses[self.first].swapped, self.courses[self.second].swapped, depth)

    def block_of(self, place: Place) -> Block | None:
        """The block of a place, if it is in a list that grows."""
        match = _NUMBERED.match(place.module)
        if match is None or match[1] not in self.lists:
            return None
        return Block(match[1], int(match[2]), place.module[match.end() :])

    def named(self, place: Place, sizes: Mapping[str, int]) -> Place | None:
        """The place as all depths have it; None inside middle blocks.

        Args:
            place: of a course.
            sizes: list -> how many blocks it has there.
        """
        block = self.block_of(place)
        if block is None:
            return place
        from_end = sizes[block.list_path] - 1 - block.number
        if self.edge <= block.number and self.edge <= from_end:
            return None
        name = str(block.number) if block.number < self.edge else f"last-{from_end}"
        return replace(place, module=block.list_path + name + block.rest)

    def key_of(self, place: Place, block: Block | None) -> Place:
        """A place, the number of its block left out."""
        return place if block is None else replace(place, module=f"{block.list_path}*{block.rest}")

    def _rows(self, course: Course) -> dict[Place, int]:
        """The places that a course has at any depth -> their index in it."""
        sizes = self.sizes_at(next(depth for depth, other in self.courses.items() if other is course))
        named = ((self.named(place, sizes), index) for index, place in enumerate(course.places))
        return {place: index for place, index in named if place is not None}

    def _of_block(self, course: Course, ahead: int) -> dict[Place, int]:
        """The places of a middle block of each list -> their index in a course.

        Args:
            course: of the second or third depth.
            ahead: how many middle blocks come before it.
        """
        blocks = ((place, self.block_of(place), index) for index, place in enumerate(course.places))
        inside = ((p, b, i) for p, b, i in blocks if b is not None and b.number == self.edge + ahead)
        return {self.key_of(place, block): index for place, block, index in inside}

    def _table(self, course: Course, indices: list[int]) -> np.ndarray:
        table: np.ndarray = np.stack([course.by_kind[kind] for kind in self.kinds], axis=1)[indices]
        return table

    def _amounts(self, low: Mapping[_Name, int], high: Mapping[_Name, int], depth: int) -> dict[_Name, int]:
        names = list({**low, **high})
        at_low, at_high = (np.array([side.get(name, 0) for name in names], dtype=np.int64) for side in (low, high))
        return dict(zip(names, map(int, self._at(at_low, at_high, depth)), strict=True))

    def _at(self, low: np.ndarray, high: np.ndarray, depth: int) -> np.ndarray:
        slope, rest = np.divmod(high - low, self.second - self.first)
        if rest.any():
            raise ValueError("memory does not grow by whole bytes a block")
        return low + slope * (depth - self.first)


def _starred(key: Place, number: str) -> Place:
    """The place of a block, from one with the number left out."""
    return replace(key, module=key.module.replace("*", number, 1))


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
