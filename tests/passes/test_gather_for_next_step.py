"""What is gathered at the end of a step for the next one: which parameters, how many, where they are waited for."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fxzero import StepGraph
from fxzero.cost.hardware import known_hardware
from fxzero.cost.memory import memory_timeline
from fxzero.errors import VerifyError
from fxzero.graph import collectives as c10d
from fxzero.graph.verify import verify
from fxzero.passes.gather_for_next_step import gather_for_next_step
from fxzero.runtime.launched_ahead import launching_graph
from fxzero.simulate.prediction import predict
from tests.schedule.steps import rewritten

WITHOUT = rewritten(2, backend="gloo")


def carried(step: StepGraph, **options: Any) -> StepGraph:
    out = step.copy()
    gather_for_next_step.run(out, **options)
    verify(out, before=step, values=False)
    return out


def names_of(step: StepGraph) -> list[str]:
    return [node.meta["entry"].name for node in step.inputs("launched")]


def in_flight(step: StepGraph) -> list[str]:
    """The parameters whose gathers forward launches before it waits for one."""
    calls = step.calls()
    first = next(place for place, node in enumerate(calls) if c10d.is_wait(node))
    sent = [c10d.parameter_sent(c10d.sent(node)[0]) for node in calls[:first] if c10d.is_collective(node)]
    return [node.meta["entry"].name for node in sent if node is not None]


def test_what_would_be_in_flight_when_a_step_begins_is_carried() -> None:
    step = carried(WITHOUT)
    wanted = in_flight(WITHOUT)
    assert sorted(names_of(step)) == sorted(wanted) and len(wanted) > 1
    position = step.positions()
    for name in wanted:
        launch, value = step.results["launched", name], step.results["parameter", name]
        assert c10d.sent(launch) == [value] and position[launch] > position[value]
        assert launch.meta["algorithm"] == step.input("launched", name).meta["algorithm"] == "send_recv"
    launches = [sum(map(c10d.is_collective, graph.calls())) for graph in (step, WITHOUT)]
    assert launches[0] == launches[1]


def test_only_what_memory_leaves_room_for_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    page = importlib.import_module("fxzero.passes.gather_for_next_step")
    counted = lambda step: SimpleNamespace(total=np.array([len(step.inputs("launched"))]))  # noqa: E731
    everything = names_of(carried(WITHOUT))
    monkeypatch.setattr(page, "memory_timeline", counted)
    assert [len(names_of(carried(WITHOUT, memory_bytes=size))) for size in (0, 1, 100)] == [0, 1, len(everything)]
    assert sorted(names_of(carried(WITHOUT, memory_bytes=1))) == in_flight(WITHOUT)[:1]


def test_carrying_gathers_does_not_raise_this_peak() -> None:
    peaks = [int(memory_timeline(step).total.max()) for step in (WITHOUT, carried(WITHOUT))]
    assert peaks[1] <= peaks[0]


def test_a_step_of_a_chain_is_shorter() -> None:
    seconds = [predict([step], known_hardware("h100")).seconds for step in (WITHOUT, carried(WITHOUT))]
    assert seconds[1] < seconds[0]


def test_what_is_launched_before_a_first_step_is_what_its_program_waits_for() -> None:
    step = carried(WITHOUT)
    graph = launching_graph(step, names_of(step))
    for node in step.inputs("launched"):
        launch = graph.results[node.meta["entry"].key]
        assert launch.meta["val"].shape == node.meta["val"].shape and launch.meta["algorithm"] == "send_recv"


def test_a_gather_of_the_old_value_is_seen() -> None:
    step = carried(WITHOUT)
    launch = step.results["launched", names_of(step)[0]]
    launch.update_arg(0, step.input("parameter", names_of(step)[0]))
    with pytest.raises(VerifyError, match="rule 'order'"):
        verify(step, before=WITHOUT, values=False)
