"""The timeline of a step: hand-made programs with known times, captured ones by their invariants, planted faults."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import fx

from fxzero.cost.hardware import known_hardware
from fxzero.cost.tasks import FREE, Task, step_tasks
from fxzero.graph import StepGraph, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import COMPUTE, HOST, LAUNCHES, RUNS, WAITS, Event, is_launch, is_wait, launch_of
from fxzero.graph.step_graph import Result, Sharding, StateEntry
from fxzero.simulate.timeline import SimulationError, Timeline, simulate
from tests.simulate.conftest import Rewritten

aten = torch.ops.aten
NET = "net:dp"
H100 = known_hardware("h100")


class Made:
    """A program written call by call, with the task of each."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.tasks: dict[fx.Node, Task] = {self.x: FREE}

    def call(self, target: Any, *args: Any, task: Task = FREE) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["phase"] = "forward"
        self.tasks[node] = task
        return node

    def compute(self, seconds: float, *sources: fx.Node) -> fx.Node:
        return self.call(aten.add.Tensor, *(sources or (self.x,)), task=Task(COMPUTE, seconds))

    def gather(self, seconds: float, *, axis: str = "dp", launch_s: float = 0.0) -> fx.Node:
        return self.call(c10d.all_gather, self.x, 4, axis, task=Task(f"net:{axis}", seconds, launch_s))

    def wait(self, launch: fx.Node, seconds: float = 0.0) -> fx.Node:
        target = c10d.wait if c10d.is_collective(launch) else swap_ops.swap_wait
        return self.call(target, launch, task=Task(COMPUTE, seconds) if seconds else FREE)

    def run(self, **options: Any) -> Timeline:
        self.graph.output(())
        return simulate(StepGraph(self.graph, {"dp": 4}), self.tasks, **options)


def spans(timeline: Timeline) -> list[tuple[str, str, float, float]]:
    return [(event.lane, event.kind, event.start_s, event.end_s) for event in timeline.events]


def test_a_gather_in_the_shadow_of_compute_costs_only_its_launch() -> None:
    made = Made()
    gather = made.gather(3.0, launch_s=0.5)
    made.compute(4.0)
    made.wait(gather)
    found = made.run()
    assert spans(found) == [(COMPUTE, LAUNCHES, 0, 0.5), (NET, RUNS, 0.5, 3.5), (COMPUTE, RUNS, 0.5, 4.5)]
    assert (found.step_seconds, found.exposed_s) == (4.5, 0)
    assert found.busy_s == {COMPUTE: 4.5, NET: 3.0} and found.idle_s == {COMPUTE: 0, NET: 1.5}


def test_compute_stands_still_for_a_gather_that_is_not_done_and_a_lane_takes_one_at_a_time() -> None:
    made = Made()
    first, second = made.gather(3.0), made.gather(2.0)
    other = made.gather(4.0, axis="tp")
    made.compute(1.0)
    waits = [made.wait(launch) for launch in (first, second, other)]
    made.compute(1.0, *waits)
    found = made.run()
    assert found.step_seconds == 6.0 and found.exposed_s == 4.0
    assert [(event.node, event.start_s, event.end_s) for event in found.exposed] == [
        (waits[0], 1.0, 3.0),
        (waits[1], 3.0, 5.0),
    ]
    assert [found.lane_of(event) for event in found.exposed] == [NET, NET]
    assert found.lanes == [COMPUTE, NET, "net:tp"]
    assert list(found.reached_s[0]) == [0, 0, 0, 0, 0, 1, 3, 5, 5, 6]


def test_what_a_wait_computes_comes_after_it() -> None:
    made = Made()
    made.wait(made.gather(3.0), seconds=0.25)
    assert spans(made.run())[1:] == [(COMPUTE, WAITS, 0, 3), (COMPUTE, RUNS, 3, 3.25)]


def test_compute_is_slower_exactly_while_lanes_are_busy() -> None:
    made = Made()
    made.compute(1.0)
    gather, other = made.gather(2.0), made.gather(4.0, axis="tp")
    made.compute(4.0)
    for launch in (gather, other):
        made.wait(launch)
    made.compute(1.0)
    factors = {NET: 2.0, "net:tp": 1.25}
    found = made.run(slowdown=lambda lane: factors.get(lane, 1.0))
    # 2 s at 2.5: 0.8 done; 2 s at 1.25: 1.6 done; then 1.6 alone
    assert found.step_seconds == pytest.approx(1 + 2 + 2 + 1.6 + 1)


def test_lanes_are_slower_exactly_while_compute_runs() -> None:
    made = Made()
    made.compute(1.0)
    first, second = made.gather(2.0), made.gather(1.0)
    made.compute(4.0)
    made.wait(first)
    made.compute(2.0)
    made.wait(second)
    found = made.run(hindrance=lambda lane: 4.0 if lane == NET else 1.0)
    # beside 4 s of compute 1 s of the first is done, 1 s is left; beside 2 s half of the second, then the rest of it
    assert spans(found) == [
        (COMPUTE, RUNS, 0, 1),
        (NET, RUNS, 1, 6),
        (NET, RUNS, 6, 8.5),
        (COMPUTE, RUNS, 1, 5),
        (COMPUTE, WAITS, 5, 6),
        (COMPUTE, RUNS, 6, 8),
        (COMPUTE, WAITS, 8, 8.5),
    ]
    assert found.step_seconds == pytest.approx(8.5) and found.busy_s[NET] == pytest.approx(7.5)


def test_what_a_slower_lane_does_within_one_stall_is_seen_there() -> None:
    made = Made()
    gathers = [made.gather(1.0) for _ in range(3)]
    made.compute(2.0)
    made.wait(gathers[-1])
    made.gather(3.0)
    found = made.run(hindrance=lambda lane: 4.0)
    on_net = [(begin, end) for lane, _, begin, end in spans(found) if lane == NET]
    assert on_net == [(0, 2.5), (2.5, 3.5), (3.5, 4.5), (4.5, 7.5)]  # behind the last call compute stands still, too


def test_compute_and_a_lane_slow_each_other_down() -> None:
    made = Made()
    gather = made.gather(1.0)
    made.compute(4.0)
    made.wait(gather)
    made.compute(1.0)
    found = made.run(slowdown=lambda lane: 1.5, hindrance=lambda lane: 3.0)
    # the gather takes 3 s beside compute, which does 2 of its 4 s meanwhile
    assert found.step_seconds == pytest.approx(3 + 2 + 1) and not found.exposed


def test_updates_on_the_host_hold_what_is_issued_later_but_not_what_was_issued_before() -> None:
    made = Made()
    out = made.call(swap_ops.swap_out, made.x, "host", task=Task("d2h", 1.0))
    stored = made.wait(out)
    made.compute(5.0)
    updated = made.call(aten.mul.Tensor, stored, 2, task=Task(HOST, 3.0))
    made.compute(1.0)
    back = made.call(swap_ops.swap_in, updated, task=Task("h2d", 1.0))
    made.compute(1.0)
    made.wait(back)
    found = made.run()
    # the host begins at 1, while the GPU has 5 s to do; what is issued at 4 waits for that
    (host,) = (event for event in found.events if event.lane == HOST)
    assert (host.start_s, host.end_s) == (1.0, 4.0)
    assert [event.start_s for event in found.events if event.kind == RUNS and event.lane != HOST] == [0, 1, 6, 7, 7]
    assert found.step_seconds == 8.0


def test_a_host_update_waits_for_what_is_moved_to_it() -> None:
    made = Made()
    stored = made.wait(made.call(swap_ops.swap_out, made.x, "host", task=Task("d2h", 2.0)))
    made.call(aten.mul.Tensor, stored, 2, task=Task(HOST, 1.0))
    made.compute(1.0)
    found = made.run()
    assert [(e.start_s, e.end_s) for e in found.events if e.lane == HOST] == [(2.0, 3.0)]
    assert found.step_seconds == 4.0


def test_programs_of_microbatches_follow_one_another() -> None:
    made = Made()
    made.compute(1.0)
    made.graph.output(())
    step = StepGraph(made.graph, {"dp": 4})
    found = simulate([step, step], made.tasks)
    assert [(event.program, event.start_s) for event in found.events] == [(0, 0.0), (1, 1.0)]
    assert found.step_seconds == 2.0


def test_what_a_step_launches_for_the_next_is_on_its_way_when_that_begins() -> None:
    made = Made()
    rows = made.x
    rows.meta = {"entry": StateEntry("parameter", "w"), "sharding": Sharding("dp", 4, 4)}
    launched = made.graph.placeholder("w_launched")
    launched.meta = {"entry": StateEntry("launched", "w")}
    made.compute(1.0)
    made.compute(1.0, made.wait(launched))
    gather = made.gather(2.5)
    made.graph.output((gather,)).meta = {"results": (Result("launched", "w"),)}
    found = simulate(StepGraph(made.graph, {"dp": 4}), made.tasks)
    net = [(event.start_s, event.end_s) for event in found.events if event.lane == NET]
    assert [(e.kind, e.start_s, e.end_s) for e in found.events if e.lane == COMPUTE] == [
        (RUNS, 0.0, 1.0),
        (WAITS, 1.0, 2.5),
        (RUNS, 2.5, 3.5),
    ]
    assert net == [(0.0, 2.5)] and found.step_seconds == 3.5  # alone it would take 2.0, and the gather 2.5 after it
    assert found.lane_of(found.exposed[0]) == NET and found.busy_s[NET] == 2.5


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (None, "expected a task for every call, got none; make tasks with fxzero.cost.tasks.step_tasks"),
        (Task(COMPUTE, -1.0), "expected finite seconds, 0 or more, got seconds=-1.0"),
        (Task(COMPUTE, math.nan), "expected finite seconds"),
        (Task(COMPUTE, 1.0, math.inf), "launch_s=inf"),
        (Task("net:dp", 1.0), "expected compute or host: it launches nothing, got 'net:dp'"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(task: Task | None, words: str) -> None:
    made = Made()
    node = made.compute(1.0)
    if task is None:
        del made.tasks[node]
    else:
        made.tasks[node] = task
    with pytest.raises(SimulationError, match=words) as error:
        made.run()
    assert "%add" in str(error.value)


def test_an_unknown_lane_and_a_factor_below_one_are_refused() -> None:
    made = Made()
    made.tasks[made.gather(1.0)] = Task("pigeon", 1.0)
    with pytest.raises(SimulationError, match="expected a lane of compute, host, net, d2h, h2d, nvme, got 'pigeon'"):
        made.run()
    made = Made()
    made.gather(1.0)
    with pytest.raises(SimulationError, match=r"slowdown of net:dp: expected a factor of 1 or more, got 0\.5"):
        made.run(slowdown=lambda lane: 0.5)
    with pytest.raises(SimulationError, match=r"hindrance of net:dp: expected a factor of 1 or more, got inf"):
        made.run(hindrance=lambda lane: float("inf"))


# ---- captured programs


def faults(timeline: Timeline, tasks: dict[fx.Node, Task]) -> Iterable[str]:
    """What no timeline may have: two things at a time on a lane, a reader before its value, an order of its own."""
    free: dict[str, float] = {}
    done: dict[fx.Node, float] = {}
    for event in timeline.events:
        name = f"{event.node.name} on {event.lane}"
        if event.start_s < free.get(event.lane, 0.0) - 1e-12:
            yield f"{name} begins before its lane is free"
        if event.end_s < event.start_s:
            yield f"{name} ends before it begins"
        if event.kind == RUNS and not is_wait(event.node):
            for source in event.node.all_input_nodes:
                if event.start_s < done.get(source, 0.0) - 1e-12:
                    yield f"{name} begins before {source.name} is done"
        free[event.lane] = event.end_s
        if event.kind == WAITS or (event.kind == RUNS and not is_launch(event.node)):
            done[event.node] = event.end_s
    waited = {(e.program, e.node): e.end_s for e in timeline.events if e.kind == WAITS}
    for (program, wait), end in waited.items():
        if abs(end - timeline.transfers[program, launch_of(wait)].end_s) > 1e-12:
            yield f"{wait.name} does not end with its launch"
    for lane, busy in timeline.busy_s.items():
        given = sum(t.seconds for n, t in tasks.items() if t.resource == lane)
        if lane != COMPUTE and abs(busy - given) > 1e-9 * max(given, 1e-9):
            yield f"{lane} is busy for {busy}, expected {given}"


@pytest.mark.parametrize(
    "keys", [{"zero": 3}, {"zero": 1}, {"zero": 3, "prefetch": 0}, {"zero": 2, "offload_optimizer": "host"}], ids=str
)
def test_a_captured_step_keeps_order_lanes_and_dependences(rewritten: Rewritten, keys: dict[str, Any]) -> None:
    step = rewritten(3, **keys)
    tasks = step_tasks(step, H100)
    found = simulate(step, tasks)
    assert list(faults(found, tasks)) == []
    alone = sum(task.seconds for task in tasks.values() if task.resource == COMPUTE)
    assert found.busy_s[COMPUTE] >= alone > 0 and found.step_seconds >= max(found.busy_s.values())
    assert found.idle_s[COMPUTE] >= found.exposed_s - 1e-12


def test_a_fault_in_a_timeline_is_seen(rewritten: Rewritten) -> None:
    step = rewritten(2, zero=3)
    tasks = step_tasks(step, H100)
    found = simulate(step, tasks)
    events = list(found.events)
    early = next(i for i, event in enumerate(events) if event.kind == RUNS and event.start_s > 0)
    moved = Event(events[early].node, 0, events[early].lane, RUNS, 0.0, events[early].seconds)
    broken = Timeline(found.steps, (*events[:early], moved, *events[early + 1 :]), found.reached_s, found.step_seconds)
    assert list(faults(broken, tasks))


def test_more_time_for_anything_never_makes_a_step_shorter(rewritten: Rewritten) -> None:
    step = rewritten(2, zero=3)
    tasks = step_tasks(step, H100)
    before = simulate(step, tasks).step_seconds
    for node, task in [*tasks.items()][::7]:
        longer = Task(task.resource, task.seconds * 1.5 + 1e-6, task.launch_s) if task.resource else task
        assert simulate(step, tasks | {node: longer}).step_seconds >= before - 1e-15


def test_time_is_linear_in_the_number_of_calls() -> None:
    """A hundred thousand calls take seconds: a planted search through all launches would take hours."""
    made = Made()
    for _ in range(25_000):
        gather = made.gather(1.0, launch_s=0.1)
        made.compute(0.5)
        made.wait(gather)
        made.compute(1.0)
    made.graph.output(())
    step = StepGraph(made.graph, {"dp": 4})
    start = time.process_time()
    found = simulate(step, made.tasks, slowdown=lambda lane: 1.5 if lane == NET else 1.0)
    assert len(found.events) > 75_000 and time.process_time() - start < 10
