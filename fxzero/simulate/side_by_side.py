"""A step as predicted and as measured, side by side: in all, by lane, and by class of calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tabulate import tabulate

from fxzero.cost.compute import computes
from fxzero.cost.op_classes import op_class
from fxzero.graph.lanes import COMPUTE, LAUNCHES, WAITS, Event, is_wait
from fxzero.graph.text import op_name
from fxzero.simulate.prediction import Prediction
from fxzero.simulate.summary import time_text
from fxzero.simulate.timeline import Timeline
from fxzero.simulate.trace import write_trace

STANDS_STILL, LAUNCHING, AFTER_WAITS, VIEWS = "stands still", "launches", "sums after waits", "views and numbers"


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Args:
        what: a lane, or a class of calls on one.
        lane: that lane.
        calls: in a step.
        predicted_s, measured_s: of all of them; measured: the median of the recorded steps.
    """

    what: str
    lane: str
    calls: int
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Predicted over measured; 1 is right, infinite where nothing was measured."""
        return self.predicted_s / self.measured_s if self.measured_s else float("inf")


@dataclass(frozen=True)
class SideBySide:
    """Prediction and measurement of one step on one rank.

    Args:
        prediction: of these programs.
        replayed: the simulator's timeline of the times that the calls of the typical step took: what of a difference
            is due to the costs, and what to the way in which programs are taken to run.
        measured: the recorded steps.
        call_s: median seconds of the whole call of the step, of which the programs are a part.
    """

    prediction: Prediction
    replayed: Timeline
    measured: tuple[Timeline, ...]
    call_s: float

    @property
    def predicted_s(self) -> float:
        """Seconds of the programs, as predicted."""
        return self.prediction.seconds

    @property
    def measured_s(self) -> float:
        """Seconds of the programs, the median of the recorded steps."""
        return median(timeline.step_seconds for timeline in self.measured)

    @property
    def ratio(self) -> float:
        """Predicted over measured time of the programs."""
        return self.predicted_s / self.measured_s

    @property
    def typical(self) -> Timeline:
        """The measured step of median time."""
        return sorted(self.measured, key=lambda timeline: timeline.step_seconds)[len(self.measured) // 2]

    def by_lane(self) -> list[Row]:
        """Busy time of each lane."""
        lanes = list(dict.fromkeys([*self.prediction.timeline.lanes, *self.measured[0].lanes]))
        rows = []
        for lane in lanes:
            calls = sum(event.lane == lane and event.kind != WAITS for event in self.prediction.timeline.events)
            measured = median(timeline.busy_s.get(lane, 0.0) for timeline in self.measured)
            rows.append(Row(lane, lane, calls, self.prediction.timeline.busy_s.get(lane, 0.0), measured))
        return rows

    def by_class(self) -> list[Row]:
        """Time of each class of calls on each lane, the longest measured one first."""
        predicted = _totals(self.prediction.timeline.events)
        measured = [_totals(timeline.events) for timeline in self.measured]
        calls = Counter((event.lane, class_of(event)) for event in self.measured[0].events)
        keys = dict.fromkeys([*calls, *predicted])
        rows = [
            Row(what, lane, calls[lane, what], predicted[lane, what], median(found[lane, what] for found in measured))
            for lane, what in keys
        ]
        return sorted(rows, key=lambda row: -row.measured_s)

    def write(self, path: str | Path) -> None:
        """The predicted and the measured step are in a file for ui.perfetto.dev, as two processes."""
        both = {"predicted": self.prediction.timeline, "measured": self.typical}
        write_trace(both, path, about={"hardware": self.prediction.hardware.name})

    def __str__(self) -> str:
        head = (
            f"predicted {time_text(self.predicted_s)} on {self.prediction.hardware.name}, measured "
            f"{time_text(self.measured_s)} (median of {len(self.measured)} steps): ratio {self.ratio:.3f}\n"
            f"the simulator with the measured times of its calls: {time_text(self.replayed.step_seconds)}, ratio "
            f"{self.replayed.step_seconds / self.typical.step_seconds:.3f}\n"
            f"the whole call of the step takes {time_text(self.call_s)}"
        )
        return "\n\n".join([head, _table(self.by_lane(), "busy lane"), _table(self.by_class(), "class of calls")])


def class_of(event: Event) -> str:
    """The class of calls that an event counts for."""
    node = event.node
    if event.kind in (WAITS, LAUNCHES):
        return STANDS_STILL if event.kind == WAITS else LAUNCHING
    if event.lane not in (COMPUTE, "host"):
        return op_name(node.target)
    if is_wait(node):
        return AFTER_WAITS
    return op_class(node) if computes(node) else VIEWS


def _totals(events: Iterable[Event]) -> dict[tuple[str, str], float]:
    """(lane, class) -> seconds."""
    totals: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        totals[event.lane, class_of(event)] += event.seconds
    return totals


def _table(rows: Sequence[Row], what: str) -> str:
    shown = [
        [row.what, row.lane, row.calls, f"{1e3 * row.predicted_s:,.2f}", f"{1e3 * row.measured_s:,.2f}", _ratio(row)]
        for row in rows
    ]
    headers = [what, "lane", "calls", "predicted ms", "measured ms", "ratio"]
    align = ("left", "left", "right", "right", "right", "right")
    return tabulate(shown, headers=headers, disable_numparse=True, colalign=align)


def _ratio(row: Row) -> str:
    return f"{row.ratio:.2f}" if row.measured_s else "-"
