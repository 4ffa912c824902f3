"""The picture of a program's memory: what it shows, and what it says where it cannot be drawn."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from fxzero.cost.memory import memory_timeline
from fxzero.simulate.memory_picture import COLORS, PictureError, areas_of_timeline, check_can_draw, draw_memory


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x).relu().sum()


@pytest.fixture
def drawn(capture: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`drawn(budget)` is (timeline, the figure that was saved)."""
    model = Small()
    timeline = memory_timeline(capture(model, torch.optim.AdamW(model.parameters()), torch.randn(4, 8)))
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])

    def draw(budget: int | None) -> Any:
        path = tmp_path / "memory.png"
        draw_memory(areas_of_timeline(timeline), path, title="a small step", budget_bytes=budget)
        assert path.read_bytes().startswith(b"\x89PNG")
        return timeline, figures[-1]

    return draw


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_areas_add_up_to_the_total(drawn) -> None:
    timeline, figure = drawn(None)
    (axes,) = figure.axes
    top = max(area.get_paths()[0].get_extents().y1 for area in axes.collections)
    assert top * 2**10 == pytest.approx(timeline.total.max())
    assert axes.get_ylabel() == "tensors on this rank, KiB" and axes.get_ylim()[1] > top
    assert {text.get_text() for text in axes.texts} == {"forward", "backward", "update"} - short(timeline)
    assert len(axes.collections) == sum(line.any() for line in timeline.bytes_by_kind.values())
    assert any(text.startswith("peak") for text in texts(figure)) and not any("budget" in t for t in texts(figure))


def short(timeline: Any) -> set[str]:
    """Phases of too few nodes to be named."""
    calls = [node.meta["phase"] for node in timeline.nodes if node.op == "call_function"]
    return {phase for phase in set(calls) if calls.count(phase) < 0.12 * (len(calls) + 1)}


def test_a_budget_is_a_line_where_it_is_near_and_words_where_it_is_not(drawn) -> None:
    timeline, near = drawn(2**10)
    assert near.axes[0].get_ylim()[1] < 1.2 * max(timeline.total.max(), 2**10) / 2**10
    assert "budget 1.00" in texts(near)
    timeline, far = drawn(2**30)
    assert far.axes[0].get_ylim()[1] < 1.2 * timeline.total.max() / 2**10
    assert any(text.endswith("above the picture") for text in texts(far))


def test_every_kind_has_a_colour_of_its_own() -> None:
    assert len(set(COLORS.values())) == len(COLORS) == 8


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PictureError, match=r"expected matplotlib, which draws it.*pip install 'fxzero\[plots\]'"):
        check_can_draw("memory.png")


def test_a_suffix_that_is_no_picture_is_refused() -> None:
    with pytest.raises(PictureError, match="expected the suffix of a picture, got no suffix; name it"):
        check_can_draw("memory")
