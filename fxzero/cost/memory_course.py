"""The course of memory over the programs of a step: how much is alive where, and of what kind that is at the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxzero.cost.memory import MemoryProfile, memory_timeline, profile_of
from fxzero.graph import StepGraph
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


@dataclass(frozen=True)
class Course:
    """Memory on this rank over the programs of a step.

    Args:
        state_bytes: what rests between steps, and the batch.
        places, totals: each call in order, and the bytes alive while it runs, state included.
        peak_kinds: bytes by kind at the peak.
    """

    state_bytes: int
    places: tuple[Place, ...]
    totals: tuple[int, ...]
    peak_kinds: dict[str, int]

    @property
    def peak(self) -> int:
        """Index of the place where most is alive."""
        return max(range(len(self.totals)), key=self.totals.__getitem__)


def memory_course(steps: Sequence[StepGraph]) -> Course:
    """The course of memory over the distinct programs of a step.

    This is the one place where predictions for other sizes and depths meet the memory profile.
    """
    places: list[Place] = []
    totals: list[int] = []
    peaks: list[MemoryProfile] = []
    distinct = list({id(step): step for step in steps}.values())
    for index, step in enumerate(distinct):
        timeline = memory_timeline(step, beside=(other for other in distinct if other is not step))
        peaks.append(profile_of(timeline))
        numbers: dict[tuple[str, str, str], int] = {}
        module = ""
        for node, total in zip(timeline.nodes, timeline.total, strict=True):
            if node.op != "call_function":
                continue
            own = node.meta.get("module") or (node.meta.get("param") or "").rpartition(".")[0]
            module = own or (module if places and places[-1].phase == node.meta["phase"] else "")
            key = (node.meta["phase"], module, op_name(node.target))
            numbers[key] = numbers.get(key, -1) + 1
            places.append(Place(index, *key, numbers[key]))
            totals.append(int(total))
    highest = max(peaks, key=lambda profile: profile.peak_bytes)
    kinds = {kind: size for kind, size in highest.by_kind.items() if size}
    return Course(max(profile.state_bytes for profile in peaks), tuple(places), tuple(totals), kinds)
