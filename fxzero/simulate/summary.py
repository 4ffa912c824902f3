"""Tables about a step's timeline: lanes, what compute stands still for, what it would pay to make faster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tabulate import tabulate

from fxzero.graph.blocks import with_stars
from fxzero.graph.lanes import Event, launch_of
from fxzero.graph.step_graph import num_bytes
from fxzero.graph.text import launch_name, size_text
from fxzero.simulate.prediction import Prediction
from fxzero.simulate.timeline import Timeline

WORST = 8  # rows of what compute stands still for


@dataclass(frozen=True)
class Exposed:
    """Launches alike for which compute stands still.

    Args:
        what: op of the launch.
        phase: of its waits.
        module: path, with * for numbers; "" at the root.
        lane: that does it.
        seconds: for which compute stands still, all together.
        num_bytes: of what they yield, all together.
        nodes: names of the waits, longest first.
    """

    what: str
    phase: str
    module: str
    lane: str
    seconds: float
    num_bytes: int
    nodes: tuple[str, ...]


def exposed_by_place(timeline: Timeline) -> list[Exposed]:
    """What compute stands still for, longest first; the same of all layers is one."""
    groups: dict[tuple[str, str, str, str], list[Event]] = defaultdict(list)
    for event in timeline.exposed:
        launch = launch_of(event.node)
        module = with_stars(event.node.meta.get("module", ""))
        key = (launch_name(launch), event.node.meta.get("phase", ""), module, timeline.lane_of(event))
        groups[key].append(event)
    found = []
    for key, events in groups.items():
        size = sum(num_bytes(event.node.meta.get("val")) for event in events)
        names = tuple(event.node.name for event in events)
        found.append(Exposed(*key, sum(event.seconds for event in events), size, names))
    return sorted(found, key=lambda item: -item.seconds)


def timeline_tables(prediction: Prediction) -> str:
    """Predicted time, lanes, exposed communication and gains, as text for a terminal."""
    parts = [
        headline(prediction),
        lane_table(prediction.timeline),
        exposed_table(prediction.timeline),
        gain_lines(prediction),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(prediction: Prediction) -> str:
    """The time of the step, beside the least that any order takes."""
    line = f"predicted step {time_text(prediction.seconds)} on {prediction.hardware.name}"
    bound = prediction.bound_s
    if bound is not None:
        line += f", {bound / prediction.seconds:.1%} of the bound ({time_text(bound)})"
    still = prediction.timeline.exposed_s
    return f"{line}; compute stands still for {time_text(still)} of it ({still / max(prediction.seconds, 1e-12):.1%})"


def lane_table(timeline: Timeline) -> str:
    """Busy and idle time of each lane."""
    rows = []
    for lane in timeline.lanes:
        busy, idle = timeline.busy_s[lane], timeline.idle_s[lane]
        rows.append([lane, _ms(busy), _ms(idle), f"{busy / max(timeline.step_seconds, 1e-12):.1%}"])
    headers = ["lane", "busy ms", "idle ms", "busy"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right"))


def exposed_table(timeline: Timeline) -> str:
    """What compute stands still for; "" where it never does."""
    found = exposed_by_place(timeline)
    if not found:
        return ""
    rows = []
    for item in found[:WORST]:
        place = [item.what, item.phase, item.module, item.lane]
        rows.append([*place, len(item.nodes), size_text(item.num_bytes), _ms(item.seconds), f"%{item.nodes[0]}"])
    rest = found[WORST:]
    if rest:
        count = sum(len(item.nodes) for item in rest)
        size = sum(item.num_bytes for item in rest)
        rows.append(["others", "", "", "", count, size_text(size), _ms(sum(item.seconds for item in rest)), ""])
    headers = ["compute stands still for", "phase", "of", "lane", "waits", "bytes", "ms", "longest at"]
    align = ("left", "left", "left", "left", "right", "right", "right", "left")
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=align)


def gain_lines(prediction: Prediction) -> str:
    """What the step would gain, lane by lane."""
    words = {"no waits": "if compute never stood still"}
    lines = []
    for what, seconds in prediction.gains_s.items():
        share = seconds / max(prediction.seconds, 1e-12)
        lines.append(f"  {words.get(what, f'with {what} twice as fast')}: {_ms(seconds)} ms less ({share:.1%})")
    return "\n".join(["what would make the step shorter:", *lines])


def time_text(seconds: float) -> str:
    """A time as people say it: 12.3 ms."""
    if seconds >= 1:
        return f"{seconds:,.3f} s"
    return f"{1e3 * seconds:,.2f} ms" if seconds >= 1e-4 else f"{1e6 * seconds:,.1f} us"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
