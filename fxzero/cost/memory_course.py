"""The course of memory over the programs of a step: how much is alive where, and of what kind that is at the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxzero.cost.memory import memory_profile, memory_timeline
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import CARRIED_KINDS, num_bytes
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
    peaks: list[tuple[int, dict[str, int]]] = []
    state_bytes = 0
    for index, step in enumerate({id(step): step for step in steps}.values()):
        profile = memory_profile(step)
        state_bytes = max(state_bytes, profile.state_bytes)
        numbers: dict[tuple[str, str, str], int] = {}
        module = ""
        for node, total, alive in memory_timeline(step):
            own = node.meta.get("module") or (node.meta.get("param") or "").rpartition(".")[0]
            module = own or (module if places and places[-1].phase == node.meta["phase"] else "")
            key = (node.meta["phase"], module, op_name(node.target))
            numbers[key] = numbers.get(key, -1) + 1
            places.append(Place(index, *key, numbers[key]))
            totals.append(profile.state_bytes + total)
            if node is profile.peak_node:
                peaks.append((profile.peak_bytes, {**_resting(step), **_standing(dict(alive))}))
    return Course(state_bytes, tuple(places), tuple(totals), max(peaks, key=lambda peak: peak[0])[1])


def _resting(step: StepGraph) -> dict[str, int]:
    """Bytes of a program's inputs, by their kind."""
    kinds: dict[str, int] = {}
    for node in step.placeholders:
        kind = node.meta["entry"].kind
        if kind not in CARRIED_KINDS and num_bytes(node.meta["val"]):
            kinds[kind] = kinds.get(kind, 0) + num_bytes(node.meta["val"])
    return kinds


def _standing(alive: dict[fx.Node, int]) -> dict[str, int]:
    """Bytes of what is alive beside the inputs, by what it is for."""
    kinds: dict[str, int] = {}
    for node, size in alive.items():
        kinds[_kind(node)] = kinds.get(_kind(node), 0) + size
    return kinds


def _kind(node: fx.Node) -> str:
    if "grad_of" in node.meta or node.op == "placeholder":
        return "gradients"
    if c10d.is_collective(node) or c10d.is_wait(node):
        return "communicated"
    return "forward values" if node.meta["phase"] == "forward" else f"{node.meta['phase']} values"
