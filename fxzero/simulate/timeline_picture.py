"""A picture of a step's timeline: a strip for each lane, what compute stands still for, and memory below.

A strip is as high as its lane is busy: in each column of the picture, the parts of its time that go to each colour are
stacked. So a step of eight layers shows single collectives, and one of eighty, whose collectives are thinner than a
column, shows what part of each (wider) column they take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxzero.cost.allocator import Allocator
from fxzero.cost.memory_kinds import KINDS
from fxzero.graph import collectives as c10d
from fxzero.graph import swap_ops
from fxzero.graph.lanes import COMPUTE, WAITS, Event
from fxzero.simulate.memory_over_time import MemoryOverTime, memory_over_time
from fxzero.simulate.memory_picture import COLORS, UNITS, check_can_draw, matplotlib_classes
from fxzero.simulate.timeline import Timeline

STANDS_STILL = "compute stands still"
# Okabe and Ito's colours again: compute is blue to grey, what moves parameters green, what moves gradients orange.
EVENT_COLORS = {
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "update": "#7f7f7f",
    "gathers": "#009e73",
    "reductions": "#e69f00",
    "other collectives": "#cc79a7",
    "swaps out": "#d55e00",
    "swaps in": "#f0e442",
    STANDS_STILL: "#ffffff",
}
_GATHERS = (c10d.all_gather, c10d.all_gather_coalesced)
_REDUCTIONS = (
    c10d.reduce_scatter,
    c10d.reduce_scatter_coalesced,
    c10d.all_reduce,
    c10d.all_reduce_coalesced,
)
_COLUMNS = 1400  # about as many as the picture has
_FEW_COLUMNS = 280  # for steps of which single transfers cannot be seen: their shares are even then
_MANY_TRANSFERS = 500
_STRIP = 0.62  # inches a lane
_TIMES = (("s", 1.0), ("ms", 1e3), ("us", 1e6))

Strip = dict[str, np.ndarray]  # colour's name -> part of each column's time


def draw_timeline(
    timeline: Timeline, path: str | Path, *, title: str, said: str = "predicted", allocator: Allocator | None = None
) -> None:
    """The picture of a step is in a file; its suffix says in which format.

    Args:
        timeline: predicted or measured.
        path: of the file, such as timeline.png.
        title: what it is of.
        said: "predicted" or "measured".
        allocator: whose rules sizes of memory follow; default: that of the graph's device.

    Raises:
        PictureError: if matplotlib is not installed, or knows no such format.
    """
    check_can_draw(path)
    figure_class, patch_class = matplotlib_classes()
    lanes = timeline.lanes
    memory = memory_over_time(timeline, allocator=allocator)
    unit, scale = _time_unit(timeline.step_seconds)
    size, memory_unit = _memory_unit(memory.peak_bytes)
    figure = figure_class(figsize=(13, 3.4 + _STRIP * len(lanes)), layout="constrained")
    heights = [_STRIP] * len(lanes) + [2.2]
    rows = figure.subplots(len(lanes) + 1, 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    used: set[str] = set()
    columns = _COLUMNS if len(timeline.transfers) <= _MANY_TRANSFERS else _FEW_COLUMNS
    edges = np.linspace(0.0, timeline.step_seconds, columns + 1)
    for axes, lane in zip(rows, lanes, strict=False):
        strip = strip_of([event for event in timeline.events if event.lane == lane], edges)
        used |= strip.keys()
        _draw_strip(axes, strip, edges * scale)
        share = timeline.busy_s[lane] / max(timeline.step_seconds, 1e-12)
        axes.set_ylabel(f"{lane}\n{share:.0%} busy", rotation=0, ha="right", va="center", fontsize=9)
    _draw_memory(rows[-1], memory, timeline.step_seconds, scale, size)
    rows[-1].set_ylabel(f"memory of this\nrank, {memory_unit}", rotation=0, ha="right", va="center", fontsize=9)
    rows[-1].set_xlabel(f"time, {unit}")
    rows[-1].set_xlim(0, timeline.step_seconds * scale)
    _legends(figure, patch_class, used, memory, size, memory_unit)
    still = timeline.exposed_s
    figure.suptitle(
        f"{title}\n{said} step {timeline.step_seconds * scale:,.1f} {unit}, compute stands still for "
        f"{still * scale:,.1f} {unit} of it ({still / max(timeline.step_seconds, 1e-12):.0%}), "
        f"peak {memory.peak_bytes / size:,.2f} {memory_unit}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def strip_of(events: Sequence[Event], edges: np.ndarray) -> Strip:
    """The part of each column that goes to each colour; `edges` are the columns' times, in seconds."""
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        spans[color_of(event)].append((event.start_s, event.end_s))
    strip = {}
    for name in (name for name in EVENT_COLORS if name in spans):
        times = np.array(sorted(spans[name]))
        busy = np.concatenate([[0.0], np.cumsum(times[:, 1] - times[:, 0])])
        until = np.interp(edges, times.reshape(-1), np.stack([busy[:-1], busy[1:]], axis=1).reshape(-1))
        strip[name] = np.diff(until) / np.diff(edges)
    return strip


def color_of(event: Event) -> str:
    """What an event is drawn as, a key of EVENT_COLORS."""
    node: Any = event.node
    if event.kind == WAITS:
        return STANDS_STILL
    if event.lane == COMPUTE or event.lane == "host":
        return str(node.meta.get("phase", "forward"))
    if swap_ops.is_launch(node):
        return "swaps out" if node.target is swap_ops.swap_out else "swaps in"
    if node.target in _GATHERS:
        return "gathers"
    return "reductions" if node.target in _REDUCTIONS else "other collectives"


def _draw_strip(axes: Any, strip: Strip, edges: np.ndarray) -> None:
    base = np.zeros(len(edges) - 1)
    for name, part in strip.items():
        top = base + part
        hatched: dict[str, Any] = {"hatch": "////", "edgecolor": "#d62728"} if name == STANDS_STILL else {}
        axes.fill_between(
            edges,
            np.append(base, base[-1]),
            np.append(top, top[-1]),
            step="post",
            facecolor=EVENT_COLORS[name],
            linewidth=0,
            **hatched,
        )
        base = top
    axes.set(ylim=(0, 1), yticks=[])
    axes.tick_params(axis="x", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_memory(axes: Any, memory: MemoryOverTime, end_s: float, scale: float, size: float) -> None:
    total = memory.total
    picked = _greatest_of_each_column(memory.seconds, total, end_s)
    times = np.append(memory.seconds[picked], end_s) * scale
    lines = [memory.bytes_by_kind[kind][picked] / size for kind in KINDS]
    axes.stackplot(
        times,
        [np.append(line, line[-1]) for line in lines],
        colors=[COLORS[kind] for kind in KINDS],
        linewidth=0,
        step="post",
    )
    at = int(total.argmax())
    axes.axhline(memory.peak_bytes / size, color="black", linewidth=0.8, linestyle="--")
    axes.plot([memory.seconds[at] * scale], [memory.peak_bytes / size], marker="v", color="black", markersize=5)
    axes.set_ylim(0, max(memory.peak_bytes / size * 1.08, 1e-9))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _greatest_of_each_column(seconds: np.ndarray, total: np.ndarray, end_s: float) -> np.ndarray:
    """The moment with the most memory in each column, in order."""
    column = np.minimum((seconds / max(end_s, 1e-12) * _COLUMNS).astype(int), _COLUMNS - 1)
    order = np.lexsort((total, column))
    return order[np.append(column[order][1:] != column[order][:-1], True)]


def _legends(figure: Any, patch: Any, used: set[str], memory: MemoryOverTime, size: float, unit: str) -> None:
    handles, labels = [], []
    for name in (name for name in EVENT_COLORS if name in used):
        hatch: dict[str, Any] = {"hatch": "////", "edgecolor": "#d62728"} if name == STANDS_STILL else {}
        handles.append(patch(facecolor=EVENT_COLORS[name], **hatch))
        labels.append(name)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, title="what runs")
    at = int(memory.total.argmax())
    kinds = [kind for kind in reversed(KINDS) if memory.bytes_by_kind[kind].any()]
    handles = [patch(color=COLORS[kind]) for kind in kinds]
    labels = [f"{kind} {int(memory.bytes_by_kind[kind][at]) / size:,.2f}" for kind in kinds]
    figure.legend(handles, labels, loc="outside right lower", frameon=False, fontsize=9, title=f"at the peak, {unit}")


def _time_unit(seconds: float) -> tuple[str, float]:
    return next(((name, scale) for name, scale in _TIMES if seconds * scale >= 1), _TIMES[-1])


def _memory_unit(num_bytes: int) -> tuple[float, str]:
    return next(((float(size), name) for name, size in UNITS if num_bytes >= size), (1.0, "B"))
