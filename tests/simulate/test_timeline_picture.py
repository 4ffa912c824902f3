"""The picture of a timeline: strips say how busy lanes are, whatever the number of calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fxzero.cost.hardware import known_hardware
from fxzero.simulate.memory_picture import PictureError
from fxzero.simulate.prediction import predict
from fxzero.simulate.timeline import Timeline
from fxzero.simulate.timeline_picture import EVENT_COLORS, STANDS_STILL, draw_timeline, strip_of
from tests.simulate.conftest import Rewritten


@pytest.fixture
def timeline(rewritten: Rewritten) -> Timeline:
    step = rewritten(3, zero=3, offload_optimizer="host", offload_below=1)
    return predict([step], known_hardware("h100")).timeline


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    found: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k))[1])
    return found


def test_it_has_a_strip_a_lane_and_says_what_was_predicted(
    timeline: Timeline, figures: list[Figure], tmp_path: Path
) -> None:
    draw_timeline(timeline, tmp_path / "timeline.png", title="a small step")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    labels = [axes.get_ylabel().partition("\n")[0] for axes in figure.axes]
    assert labels == [*timeline.lanes, "memory of this"]
    title = figure.get_suptitle()
    assert "a small step\npredicted step " in title and "compute stands still for" in title and "peak" in title
    shown = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"forward", "backward", "update", "gathers", "reductions", "swaps out", "swaps in", STANDS_STILL} <= shown
    hatched = [area for axes in figure.axes for area in axes.collections if area.get_hatch()]
    assert len(hatched) == 1


@pytest.mark.parametrize("columns", [7, 100, 5000])
def test_strips_add_up_to_the_time_that_lanes_are_busy(timeline: Timeline, columns: int) -> None:
    edges = np.linspace(0, timeline.step_seconds, columns + 1)
    width = timeline.step_seconds / columns
    for lane in timeline.lanes:
        strip = strip_of([event for event in timeline.events if event.lane == lane], edges)
        busy = sum(float(part.sum()) * width for name, part in strip.items() if name != STANDS_STILL)
        assert busy == pytest.approx(timeline.busy_s[lane])
        total: Any = sum(strip.values())
        assert total.max() <= 1 + 1e-6 and total.min() >= -1e-9


def test_a_strip_of_two_lanes_would_be_seen(timeline: Timeline) -> None:
    edges = np.linspace(0, timeline.step_seconds, 101)
    total: Any = sum(strip_of(timeline.events, edges).values())
    assert total.max() > 1 + 1e-6


def test_every_kind_of_event_has_a_colour_of_its_own() -> None:
    assert len(set(EVENT_COLORS.values())) == len(EVENT_COLORS)


def test_a_suffix_that_is_no_picture_is_refused(timeline: Timeline, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="expected the suffix of a picture"):
        draw_timeline(timeline, tmp_path / "timeline.json", title="")
