"""The whole course of memory of a deep model, from the lines through three shallow ones.

[Note: sweeps]
The places of a block come by in sweeps over the blocks: up in forward, down in backward, and once more or several times
in the update. A sweep repeats itself with each block, so a program with one middle block holds one period of each
sweep: from where the first of the middle block's places of the sweep is, to where that of the next block is. What a
schedule moves from block to block (gathers launched ahead) is inside such a period. A program with n more blocks is the
same one with n more copies of each period, their numbers counted on; the program of the third depth must come out so,
place by place. The bytes are those of the lines ([Note: depth] in `cost/memory_at_depth.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxzero.cost.memory_at_depth import DepthLines
from fxzero.cost.memory_course import Course, Place


@dataclass(frozen=True)
class _Sweep:
    """One period of a sweep in the program with one middle block: positions, the last not included."""

    list_path: str
    start: int
    end: int
    ascending: bool


def course_at(lines: DepthLines, depth: int) -> Course:
    """The course at a depth that is at least the second of the lines'.

    Raises:
        ValueError: saying why the programs do not repeat from block to block.
    """
    expansion = _Expansion(lines)
    if expansion.course(lines.third).places != lines.courses[lines.third].places:
        raise ValueError("the programs do not repeat from block to block")
    return expansion.course(depth)


class _Expansion:
    """The program of the second depth, taken apart."""

    def __init__(self, lines: DepthLines) -> None:
        self.lines = lines
        self.places = lines.courses[lines.second].places
        self.blocks = [lines.block_of(place) for place in self.places]
        self.keys = [lines.key_of(place, block) for place, block in zip(self.places, self.blocks, strict=True)]
        self.sweep_of: dict[Place, _Sweep] = {}
        for path in lines.lists:
            self._find_sweeps(path)
        self.sweeps = sorted(set(self.sweep_of.values()), key=lambda sweep: sweep.start)
        if any(before.end > after.start for before, after in zip(self.sweeps, self.sweeps[1:], strict=False)):
            raise ValueError("sweeps over the blocks overlap")

    def course(self, depth: int) -> Course:
        """The course at a depth, from the second of the lines' on."""
        more = depth - self.lines.second
        numbered = list(self._numbered(more))
        rows = self._bytes(depth, numbered)
        by_kind = dict(zip(self.lines.kinds, rows.T, strict=True))
        places = tuple(self._place(index, number) for index, number in numbered)
        elsewhere, swapped = self.lines.elsewhere_at(depth), self.lines.swapped_at(depth)
        return Course(self.lines.state_at(depth), places, by_kind, elsewhere, swapped)

    def _find_sweeps(self, path: str) -> None:
        """The sweeps over a list: of its places, the spans from the middle block to the next are near in time."""
        middle = self.lines.edge
        found: dict[Place, dict[int, int]] = {}
        for index, block in enumerate(self.blocks):
            if block is not None and block.list_path == path:
                found.setdefault(self.keys[index], {})[block.number] = index
        spans: list[tuple[int, int, bool, Place]] = []
        for key, at in found.items():
            if middle not in at:
                continue
            if not {middle - 1, middle + 1} <= at.keys():
                raise ValueError(f"not every block has {key}")
            ascending = at[middle] < at[middle + 1]
            spans.append((at[middle], at[middle + 1 if ascending else middle - 1], ascending, key))
        for group in _near(sorted(spans, key=lambda span: span[:2])):
            start, end = min(span[0] for span in group), min(span[1] for span in group)
            if any(block is None or block.list_path != path for block in self.blocks[start:end]):
                raise ValueError("something else runs between two blocks")
            sweep = _Sweep(path, start, end, group[0][2])
            self.sweep_of.update((key, sweep) for *_, key in group)

    def _numbered(self, more: int) -> Iterator[tuple[int, int | None]]:
        """(index in the second depth's program, number of the block) in the order of a program with more blocks."""
        begin = 0
        for sweep in self.sweeps:
            yield from self._once(begin, sweep.start, more)
            for copy in range(more + 1):
                shift = copy if sweep.ascending else more - copy
                for index in range(sweep.start, sweep.end):
                    yield index, self._number(index) + shift
            begin = sweep.end
        yield from self._once(begin, len(self.places), more)

    def _once(self, begin: int, end: int, more: int) -> Iterator[tuple[int, int | None]]:
        """What is outside of all periods: blocks behind the middle are counted on."""
        for index in range(begin, end):
            if self.blocks[index] is None:
                yield index, None
                continue
            number, sweep = self._number(index), self.sweep_of.get(self.keys[index])
            behind = number > self.lines.edge if sweep is None else (index >= sweep.end) == sweep.ascending
            yield index, number + (more if behind else 0)

    def _number(self, index: int) -> int:
        block = self.blocks[index]
        assert block is not None, "periods have been checked to hold places of blocks alone"
        return block.number

    def _place(self, index: int, number: int | None) -> Place:
        block = self.blocks[index]
        if block is None:
            return self.places[index]
        return replace(self.places[index], module=f"{block.list_path}{number}{block.rest}")

    def _bytes(self, depth: int, numbered: Sequence[tuple[int, int | None]]) -> np.ndarray:
        """The bytes at each place, a column for each kind."""
        lines, sizes = self.lines, self.lines.sizes_at(depth)
        table = lines.table_at(depth)
        middle: dict[tuple[str, int], np.ndarray] = {}
        rows = []
        for index, number in numbered:
            named = lines.named(self._place(index, number), sizes)
            if named is not None:
                rows.append(table[lines.row[named]])
                continue
            block = self.blocks[index]
            assert block is not None and number is not None, "only blocks are in the middle"
            if (block.list_path, number) not in middle:
                middle[block.list_path, number] = lines.middle_at(depth, dict.fromkeys(lines.lists, number))
            rows.append(middle[block.list_path, number][lines.middle_row[self.keys[index]]])
        return np.stack(rows)


def _near(spans: Sequence[tuple[int, int, bool, Place]]) -> Iterator[list[tuple[int, int, bool, Place]]]:
    """Spans, ordered by their start, in groups of one direction that overlap or are less than half a span apart."""
    group: list[tuple[int, int, bool, Place]] = []
    for span in spans:
        start, end, ascending, _ = span
        apart = start - max((end for _, end, _, _ in group), default=start)
        if group and (apart > (end - start) // 2 or ascending != group[-1][2]):
            yield group
            group = []
        group.append(span)
    if group:
        yield group
