"""What messages and compute do to each other: found again from steps as the simulator tells them."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxzero.calibrate import recorded_steps
from fxzero.calibrate.beside_compute import BesideCompute, beside_compute
from fxzero.calibrate.recorded_steps import StepMeans
from fxzero.calibrate.small_step import ALONE, BY_ALL_REDUCES, BY_MESSAGES, FORMS, small_step
from fxzero.cost.communication import message_bytes
from fxzero.cost.tasks import Task
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import Event, is_launch, is_wait
from fxzero.runtime.recording import Sample
from fxzero.simulate.timeline import simulate

PLANTED = BesideCompute(launch_s=2e-4, launch_bytes_s=1e8, slowdown=1.5, hindrance=2.0, among_ranks=1.0)


@functools.cache
def programs(ranks: int = 2) -> dict[str, StepGraph]:
    return {form: small_step(ranks, form, torch.device("cpu"), fast=True) for form in FORMS}


def alone_s(form: str, size: float) -> float:
    return (1e-3 if form == BY_MESSAGES else 2e-3) + size / 2e9


def seen(step: StepGraph, form: str, machine: BesideCompute) -> StepMeans:
    """What would be recorded of a step where calls take 5 ms."""
    tasks = {}
    for node in step.calls():
        if is_launch(node):
            size = message_bytes(node)
            tasks[node] = Task("net:dp", alone_s(form, size), machine.launch_s + size / machine.launch_bytes_s)
        else:
            tasks[node] = Task("compute", 1e-6 if is_wait(node) else 5e-3)
    told = simulate(step, tasks, slowdown=lambda _: machine.slowdown, hindrance=lambda _: machine.hindrance)
    sample = Sample((step,), told.events, (), told.step_seconds, told.step_seconds)
    found = StepMeans(**recorded_steps._seen(sample, [0.0] * sum(map(is_launch, tasks))))
    return replace(found, step_s=found.step_s + (machine.among_ranks - 1) * sum(found.compute_s))


def figures(machine: BesideCompute, **changed: Mapping[str, Any]) -> tuple[BesideCompute, list[float]]:
    steps = {form: seen(program, form, machine) for form, program in programs().items()}
    for form, values in changed.items():
        steps[form] = replace(steps[form], **values)
    found, rows = beside_compute(steps, programs(), alone_s)
    return found, [row.residual for row in rows]


@pytest.mark.parametrize(
    "planted",
    [
        PLANTED,
        replace(PLANTED, launch_s=0.0, slowdown=1.0),
        replace(PLANTED, hindrance=1.0, launch_s=1e-3),
        replace(PLANTED, slowdown=2.5, hindrance=4.0),
        replace(PLANTED, among_ranks=1.2),
    ],
)
def test_figures_of_steps_are_found_again(planted: BesideCompute) -> None:
    found, residuals = figures(planted)
    assert vars(found) == pytest.approx(vars(planted), rel=0.1, abs=1e-9)
    assert residuals == pytest.approx([0.0, 0.0], abs=0.03)


def test_steps_that_say_nothing_of_it_change_nothing() -> None:
    found, _ = figures(PLANTED, **{BY_MESSAGES: {"step_s": 1e-3}, BY_ALL_REDUCES: {"step_s": 1e-3}})
    assert found.among_ranks == 1.0
    found, _ = figures(PLANTED, **{ALONE: {"compute_s": [1.0] * len(seen_alone())}})  # slower alone
    assert found.slowdown == 1.0
    found, _ = figures(PLANTED, **{form: {"flight_s": 1e3} for form in (BY_MESSAGES, BY_ALL_REDUCES)})
    assert found.hindrance == 20.0


def seen_alone() -> list[float]:
    return list(seen(programs()[ALONE], ALONE, PLANTED).compute_s)


def test_a_message_travels_from_where_all_have_launched_it() -> None:
    step = programs()[BY_MESSAGES]
    launches = [node for node in step.calls() if is_launch(node)][:2]
    events = []
    for number, launch in enumerate(launches):
        events.append(Event(launch, 0, "compute", "launches", number, number + 0.25))
        events.append(Event(launch, 0, "net:dp", "runs", number + 0.25, number + 1.0))
    wait = next(node for node in step.calls() if is_wait(node))
    call = next(node for node in step.calls() if not is_launch(node) and not is_wait(node))
    events.append(Event(call, 0, "compute", "runs", 0.5, 1.0))
    events.append(Event(wait, 0, "compute", "waits", 1.25, 2.0))
    sample = Sample((step,), tuple(events), (), 2.0, 2.0)
    found = recorded_steps._seen(sample, [0.25, 1.25])
    assert (found["flight_s"], found["still_s"], found["beside_s"]) == (1.5, 0.75, 0.5)  # 0.25 beside a launch
    found = recorded_steps._seen(sample, [0.75, 1.5])  # the other rank came later
    assert (found["flight_s"], found["still_s"], found["beside_s"]) == (0.75, 0.5, 0.25)
    found = recorded_steps._seen(sample, [7.0, 7.0])  # as clocks of two processes may have it
    assert (found["flight_s"], found["still_s"], found["beside_s"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_forms_of_the_small_step_compute_the_same(ranks: int) -> None:
    calls = {
        form: [node.target for node in step.calls() if not is_launch(node) and not is_wait(node)]
        for form, step in programs(ranks).items()
    }
    assert calls[ALONE] == calls[BY_MESSAGES] == calls[BY_ALL_REDUCES] and len(calls[ALONE]) > 100
    kinds = {form: {node.target for node in step.calls() if is_launch(node)} for form, step in programs(ranks).items()}
    messages = {c10d.all_gather, c10d.reduce_scatter}
    assert kinds == {ALONE: set(), BY_MESSAGES: messages, BY_ALL_REDUCES: {c10d.all_reduce}}
