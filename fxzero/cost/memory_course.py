"""The course of memory over the programs of a step: how much of which kind is alive where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fxzero.cost.memory import TIERS, MemoryProfile, memory_timeline, profile_of
from fxzero.graph import StepGraph
from fxzero.graph.swap_ops import swapped_bytes
from fxzero.graph.text import op_name


@dataclass(frozen=True)
class Place:
    """A node of a step's programs, in words that stay the same at other sizes.

    Args:
        program: index among the step's programs, one a microbatch.
        phase, module, op: of the node; the module of an update is that of its parameter, and what has none is counted
            with the node before it.
        number: how many nodes with the same of these come before it.
    """

    program: int
    phase: str
    module: str
    op: str
    number: int

    def __str__(self) -> str:
        return f"{self.op} ({self.phase} of {self.module or 'the model'})"


@dataclass(frozen=True, eq=False)
class Course:
    """Memory on this rank over the programs of a step.

    Args:
        state_bytes: what rests between steps, and the batch.
        places: each call in order.
        by_kind: kind -> the bytes alive while each of them runs, state included; int64 arrays.
        elsewhere: tier -> the most bytes there, for tiers that are used.
        swapped: (tier, "out" or "in") -> bytes that all microbatches of a step move.
    """

    state_bytes: int
    places: tuple[Place, ...]
    by_kind: Mapping[str, np.ndarray]
    elsewhere: Mapping[str, int]
    swapped: Mapping[tuple[str, str], int]

    @cached_property
    def totals(self) -> np.ndarray:
        """The bytes of all kinds at each place."""
        return sum(self.by_kind.values(), start=np.zeros(len(self.places), dtype=np.int64))

    @property
    def peak(self) -> int:
        """Index of the place where most is alive."""
        return int(self.totals.argmax())

    @property
    def peak_kinds(self) -> dict[str, int]:
        """Bytes by kind at the peak, of the kinds that are there."""
        peak = self.peak
        return {kind: int(line[peak]) for kind, line in self.by_kind.items() if line[peak]}


def memory_course(steps: Sequence[StepGraph], *, times: Sequence[int] | None = None) -> Course:
    """The course of memory over the programs of a step.

    This is the one place where predictions for other sizes and depths meet the memory profile.

    Args:
        steps: one program for each kind of microbatch.
        times: how often a step runs each of them; default: once.
    """
    places: list[Place] = []
    lines: list[dict[str, np.ndarray]] = []
    profiles: list[MemoryProfile] = []
    swapped: dict[tuple[str, str], int] = {}
    programs = list(zip(steps, times or [1] * len(steps), strict=True))
    for index, (step, count) in enumerate(programs):
        beside = (other for other, number in programs for _ in range(number - (other is step)))
        timeline = memory_timeline(step, beside=beside)
        profiles.append(profile_of(timeline))
        calls = [position for position, node in enumerate(timeline.nodes) if node.op == "call_function"]
        places += _places(step, index)
        lines.append({kind: line[calls] for kind, line in timeline.bytes_by_kind.items()})
        for key, size in swapped_bytes(step.calls()).items():
            swapped[key] = swapped.get(key, 0) + size * count
    by_kind = {kind: np.concatenate([line[kind] for line in lines]) for kind in lines[0]}
    elsewhere = {tier: max(getattr(profile, f"{tier}_bytes") for profile in profiles) for tier in TIERS[1:]}
    elsewhere = {tier: size for tier, size in elsewhere.items() if size}
    return Course(max(p.state_bytes for p in profiles), tuple(places), by_kind, elsewhere, swapped)


def _places(step: StepGraph, program: int) -> list[Place]:
    """The places of a program's calls."""
    places: list[Place] = []
    numbers: dict[tuple[str, str, str], int] = {}
    module = ""
    for node in step.calls():
        own = node.meta.get("module") or (node.meta.get("param") or "").rpartition(".")[0]
        module = own or (module if places and places[-1].phase == node.meta["phase"] else "")
        key = (node.meta["phase"], module, op_name(node.target))
        numbers[key] = numbers.get(key, -1) + 1
        places.append(Place(program, *key, numbers[key]))
    return places
