"""A picture of a program's memory: areas of each kind stacked over the nodes in order, phases, the peak, a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxzero.cost.memory import MemoryTimeline
from fxzero.cost.memory_course import Course
from fxzero.cost.memory_kinds import (
    ACTIVATIONS,
    COMMUNICATION,
    GATHERED,
    GRADIENTS,
    INPUTS,
    KINDS,
    OPTIMIZER,
    PARAMETERS,
    WORKSPACE,
)
from fxzero.errors import FxzeroError
from fxzero.graph import PHASES

# What rests is grey and blue, what moves is not; Okabe and Ito's colours, which are told apart without red and green.
COLORS = {
    PARAMETERS: "#4d4d4d",
    OPTIMIZER: "#9a9a9a",
    INPUTS: "#d0d0d0",
    GATHERED: "#0072b2",
    ACTIVATIONS: "#56b4e9",
    GRADIENTS: "#e69f00",
    COMMUNICATION: "#009e73",
    WORKSPACE: "#cc79a7",
}
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_BUDGET_IN_SIGHT = 2  # times the peak: a budget above would leave nothing to see of what is below
_LEAST_SHARE = 0.12  # of the picture's width that a phase's name takes
_MAX_POINTS = 4000  # more than a picture has columns


class PictureError(FxzeroError):
    """Raised when a picture cannot be drawn: without matplotlib, or in a format that it does not know."""


@dataclass(frozen=True)
class Areas:
    """What is drawn of one program.

    Args:
        phases: of each node in order; "" of the inputs, which come before the first call and are not shown.
        bytes_by_kind: kind -> bytes at each of them.
        peak_name: of the node at the peak.
    """

    phases: tuple[str, ...]
    bytes_by_kind: Mapping[str, np.ndarray]
    peak_name: str

    @property
    def total(self) -> np.ndarray:
        """The bytes of all kinds at each node."""
        return sum(self.bytes_by_kind.values(), start=np.zeros(len(self.phases), dtype=np.int64))


def areas_of_timeline(timeline: MemoryTimeline) -> Areas:
    """The areas of a program at hand."""
    phases = tuple(node.meta.get("phase", "") if node.op == "call_function" else "" for node in timeline.nodes)
    return Areas(phases, timeline.bytes_by_kind, f"%{timeline.nodes[timeline.peak].name}")


def areas_of_course(course: Course) -> Areas:
    """The areas of a predicted course; of several programs, those of the one that peaks highest."""
    highest = course.places[course.peak]
    shown = [index for index, place in enumerate(course.places) if place.program == highest.program]
    by_kind = {kind: line[shown] for kind, line in course.by_kind.items()}
    return Areas(tuple(course.places[index].phase for index in shown), by_kind, f"{highest.op} of {highest.module}")


def draw_memory(areas: Areas, path: str | Path, *, title: str, budget_bytes: int | None = None) -> None:
    """The picture of one program is in a file; its suffix says in which format.

    Args:
        areas: from `areas_of_timeline` or `areas_of_course`.
        path: of the file, such as memory.png.
        title: what it is of.
        budget_bytes: drawn as a line, where there is one.

    Raises:
        PictureError: if matplotlib is not installed, or knows no such format.
    """
    check_can_draw(path)
    figure_class, patch_class = matplotlib_classes()
    total = areas.total
    positions, lines = _columns(areas, total)
    peak, at = int(total.max()), int(total.argmax())
    in_sight = budget_bytes is not None and budget_bytes <= _BUDGET_IN_SIGHT * peak
    top = max(peak, budget_bytes or 0) if in_sight else max(peak, 1)
    unit, size = next(((u, s) for u, s in UNITS if top >= s), ("B", 1))
    figure = figure_class(figsize=(11, 5.5), layout="constrained")
    axes = figure.add_subplot()
    used = [kind for kind in KINDS if lines[kind].any()]
    stacked = [lines[kind] / size for kind in used]
    axes.stackplot(positions, stacked, colors=[COLORS[kind] for kind in used], linewidth=0, step="post")
    _mark_phases(axes, areas)
    handles = [axes.axhline(peak / size, color="black", linewidth=0.8, linestyle="--")]
    labels = [f"peak {peak / size:,.2f}\n{_shortened(areas.peak_name)}"]
    axes.plot([at], [peak / size], marker="v", color="black", markersize=5)
    if budget_bytes is not None:
        handles.append(axes.axhline(budget_bytes / size, color="#d62728", linewidth=1.2))
        labels.append(f"budget {budget_bytes / size:,.2f}" + ("" if in_sight else ", above the picture"))
    for kind in reversed(used):  # as the areas lie, from the top
        handles.append(patch_class(color=COLORS[kind]))
        labels.append(f"{kind} {int(areas.bytes_by_kind[kind][at]) / size:,.2f}")
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, title=f"at the peak, {unit}")
    axes.set(xlim=(_first_call(areas), len(areas.phases)), ylim=(0, top / size * 1.08))
    axes.set_xlabel("node of the program, in order")
    axes.set_ylabel(f"tensors on this rank, {unit}")
    axes.set_title(title, loc="left", fontsize=10, pad=20)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def check_can_draw(path: str | Path) -> None:
    """Raise PictureError unless a picture of this name can be drawn: before a long capture, not after it."""
    figure_class, _ = matplotlib_classes()
    known = figure_class().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in known:
        got = repr(Path(path).suffix) if suffix else "no suffix"
        fix = "name it memory.png, memory.svg or memory.pdf"
        raise PictureError.of(str(path), expected="the suffix of a picture", got=got, fix=fix)


def matplotlib_classes() -> tuple[Any, Any]:
    """The classes of a figure and of a legend's patch; no window system is asked for."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise PictureError.of(
            "a picture of memory",
            expected="matplotlib, which draws it",
            got=str(error),
            fix="pip install 'fxzero[plots]', or leave the picture out",
        ) from error
    return Figure, Patch


def _shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:30]}.."


def _columns(areas: Areas, total: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Positions and bytes of each kind there: of long programs the node with the most of each run of nodes."""
    count = len(total)
    run = -(-count // _MAX_POINTS)
    starts = np.arange(0, count, run)
    picked = np.array([start + int(total[start : start + run].argmax()) for start in starts])
    return starts, {kind: line[picked] for kind, line in areas.bytes_by_kind.items()}


def _mark_phases(axes: Any, areas: Areas) -> None:
    """Each phase begins at a line and, if it is not too short, is named above the areas."""
    first = _first_call(areas)
    width = len(areas.phases) - first
    for phase, begin, end in _phase_runs(areas):
        if begin > first:
            axes.axvline(begin, color="white", linewidth=1.0)
            axes.axvline(begin, color="black", linewidth=0.6, linestyle=":")
        if end - begin > _LEAST_SHARE * width:
            middle = ((begin + end) / 2 - first) / width
            axes.text(middle, 1.01, phase, transform=axes.transAxes, ha="center", va="bottom", fontsize=9)


def _first_call(areas: Areas) -> int:
    return next((index for index, phase in enumerate(areas.phases) if phase), 0)


def _phase_runs(areas: Areas) -> Iterator[tuple[str, int, int]]:
    """(phase, first position, position after its last): forward, backward, then the updates that follow it."""
    phases = areas.phases
    last = {phase: index for index, phase in enumerate(phases)}
    begin = _first_call(areas)
    for name in (name for name in PHASES if name in last):
        end = last[name] + 1
        if end > begin:
            updates = name == "backward" and "update" in phases[begin:end]
            yield ("backward, with updates" if updates else name), begin, end
            begin = end
