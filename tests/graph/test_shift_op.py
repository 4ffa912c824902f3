"""A tensor that is passed on: what the op yields, and that nothing writes over it while it is under way."""

from __future__ import annotations

import pytest
import torch

from fxzero import compat
from fxzero.cost.hardware import known_hardware
from fxzero.cost.tasks import step_tasks
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.edit import coordinate
from fxzero.graph.lanes import is_launch, lane_of_launch
from fxzero.graph.step_graph import Result
from fxzero.graph.storage import InPlace
from tests.graph.test_text import blank

aten = torch.ops.aten


def test_what_arrives_has_the_shape_of_what_is_sent_and_is_contiguous() -> None:
    mode = compat.new_fake_mode()
    with mode:
        found = c10d.shift(torch.empty(3, 4, dtype=torch.bfloat16).t(), 1, 2, 0, "sp")
    assert (tuple(found.shape), found.stride(), found.dtype) == ((4, 3), (3, 1), torch.bfloat16)


def passed_on(*, waited_first: bool) -> StepGraph:
    """A tensor is sent, and another one made of it before or behind the wait."""
    at = blank(x=torch.ones(4))
    (x,) = at.step.placeholders
    with at.before(at.step.output):
        sent = at.call(aten.neg.default, x)
        launch = at.call(c10d.shift, sent, 1, 4, coordinate(at.step, "dp"), "dp")
        wait = at.call(c10d.wait, launch) if waited_first else None
        made = at.call(aten.add.Tensor, sent, 1.0, name="made")
        wait = wait or at.call(c10d.wait, launch)
    at.step.output.args = ((wait, made),)
    at.step.output.meta["results"] = (Result("metric", "wait"), Result("metric", "made"))
    return at.step


@pytest.mark.parametrize("waited_first", [True, False])
def test_nothing_writes_over_what_is_under_way(waited_first: bool) -> None:
    step = passed_on(waited_first=waited_first)
    (made,) = step.calls(aten.add.Tensor)
    assert (made in InPlace(step).forms) is waited_first


def test_it_runs_on_the_lane_of_its_axis() -> None:
    step = passed_on(waited_first=True)
    (launch,) = step.calls(c10d.shift)
    assert is_launch(launch) and lane_of_launch(launch) == "net:dp"
    task = step_tasks(step, known_hardware("h100"))[launch]
    assert task.resource == "net:dp" and task.seconds > 0 and task.launch_s > 0
