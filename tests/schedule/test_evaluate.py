"""Times and memory of an order are those of the simulator and of the memory model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fxzero.cost.hardware import Hardware
from fxzero.cost.memory import memory_timeline
from fxzero.errors import RewriteError
from fxzero.graph.edit import reorder
from fxzero.schedule.evaluate import memory_of, times_of
from fxzero.schedule.local_search import find_schedule
from fxzero.schedule.problem import Problem
from fxzero.simulate.timeline import simulate
from tests.schedule.orders import random_order
from tests.schedule.steps import problem_of, rewritten, tasks_of

PLANS = {
    "zero3": {"zero": 3},
    "zero1": {"zero": 1},
    "hybrid": {"zero": 3, "mesh": {"dp_replicate": 2, "dp": 2}},
    "int8": {"zero": 3, "compress_gathers": "int8", "compress_reductions": "int8", "compress_below": 50},
    "within_nodes": {"zero": 3, "node_size": 2},
    "gloo": {"zero": 3, "backend": "gloo"},
    "chain": {"zero": 3, "cross_step": True, "prefetch": 3},
    "chain_gloo": {"zero": 3, "cross_step": True, "backend": "gloo"},
    "offload": {"zero": 3, "offload_optimizer": "host", "offload_activations": "host", "offload_below": 8},
    "on_host": {"zero": 3, "offload_optimizer": "host", "update_on_host": 1.0, "offload_below": 8},
}


@pytest.mark.parametrize("name", PLANS)
def test_memory_is_that_of_the_model(name: str) -> None:
    """In the program's order to the byte; in others too, where no more or less is written in place."""
    step = rewritten(**PLANS[name])
    problem = problem_of(step)
    rng = random.Random(0)
    for index in range(4):
        order = random_order(problem, rng) if index else list(range(len(problem)))
        assert problem.is_legal(order)
        reorder(step, [problem.nodes[call] for call in order])
        model = memory_timeline(step).total[len(step.placeholders) :]
        counted = memory_of(problem, order)
        assert np.array_equal(model, counted) if not index else model.max() <= counted.max()


def factors_of(hardware: str) -> dict[str, Any]:
    """How lanes and compute slow each other down there; on the CPU, also lanes down."""
    machine = Hardware.load(hardware)
    if hardware == "cpu":
        machine = replace(machine, beside_compute={"net": 3.0, "d2h": 1.5})
    return {"slowdown": machine.slowdown, "hindrance": machine.hindrance}


@pytest.mark.parametrize("hardware", ["h100", "h100_ethernet", "cpu"])
@pytest.mark.parametrize("name", PLANS)
def test_times_are_those_of_the_simulator(name: str, hardware: str) -> None:
    step = rewritten(**PLANS[name])
    tasks, factors = tasks_of(step, hardware), factors_of(hardware)
    problem = Problem.of(step, tasks, **factors)
    rng = random.Random(1)
    for index in range(3):
        order = random_order(problem, rng) if index else list(range(len(problem)))
        reorder(step, [problem.nodes[call] for call in order])
        timeline, times = simulate(step, tasks, **factors), times_of(problem, order)
        assert times.seconds == pytest.approx(timeline.step_seconds, rel=1e-12)
        waits = {event.node: event.seconds for event in timeline.exposed}
        assert {problem.nodes[call]: s for call, s in times.stalls} == pytest.approx(waits)


@pytest.mark.parametrize(("hardware", "factor"), [("h100_ethernet", "slowdown"), ("cpu", "hindrance")])
def test_a_factor_of_a_lane_shows(hardware: str, factor: str) -> None:
    """The test above can fail: without the factor of the machine, times are others."""
    step = rewritten(zero=3)
    tasks, factors = tasks_of(step, hardware), factors_of(hardware)
    alone, beside = (Problem.of(step, tasks, **(factors | other)) for other in ({factor: lambda lane: 1.0}, {}))
    order = find_schedule(alone).order
    reorder(step, [alone.nodes[call] for call in order])
    simulated = simulate(step, tasks, **factors).step_seconds
    assert times_of(beside, order).seconds == pytest.approx(simulated, rel=1e-12)
    assert times_of(alone, order).seconds < simulated


def test_a_use_that_is_forgotten_shows() -> None:
    step = rewritten(zero=3)
    problem = problem_of(step)
    memory = problem.memory
    longest = max(range(len(memory.size)), key=lambda s: len(memory.uses[s]) * memory.size[s])
    uses = [calls if s != longest else calls[:1] for s, calls in enumerate(memory.uses)]
    wrong = replace(problem, memory=replace(memory, uses=uses))
    order = list(range(len(problem)))
    assert not np.array_equal(memory_of(wrong, order), memory_of(problem, order))


def test_a_task_is_asked_for_each_call() -> None:
    step = rewritten(zero=3)
    tasks = tasks_of(step)
    del tasks[step.calls()[3]]
    with pytest.raises(RewriteError, match="expected a task for each call, got none"):
        Problem.of(step, tasks)


def test_a_wait_holds_compute_until_its_launch_is_done() -> None:
    problem = problem_of(rewritten(zero=3))
    order = list(range(len(problem)))
    times = times_of(problem, order)
    assert times.seconds > 0
    assert sum(seconds for _, seconds in times.stalls) > 0
    problem = replace(problem, slowdown=[1.0] * len(problem.lanes), hindrance=[1.0] * len(problem.lanes))
    times = times_of(problem, order)
    slower = replace(problem, seconds=[2 * s for s in problem.seconds], launch_s=[2 * s for s in problem.launch_s])
    assert times_of(slower, order).seconds == pytest.approx(2 * times.seconds)
