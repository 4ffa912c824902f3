"""Steps that launch gathers for the next one: what is carried, when it is there, and the lower bound of the chain."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from fxzero import StepGraph
from fxzero.cost.hardware import Hardware, Link
from fxzero.cost.memory import memory_timeline
from fxzero.passes.gather_for_next_step import gather_for_next_step
from fxzero.schedule import chain
from fxzero.schedule.bound import lower_bound
from fxzero.schedule.clock import Clock
from fxzero.schedule.evaluate import peak_of as peak_of_order
from fxzero.schedule.evaluate import times_of
from fxzero.schedule.list_schedule import Policy, _Run, list_schedule, ranks, ways_to_end
from fxzero.schedule.local_search import find_schedule
from fxzero.schedule.problem import CARRIED, LAUNCH, RUN, WAIT, Problem
from tests.schedule.chains import carrying_step
from tests.schedule.orders import random_order
from tests.schedule.small import all_orders, drawn_problem
from tests.schedule.steps import rewritten, tasks_of

LINKS = ("h100_ethernet", "cpu")
ROUNDS = 12  # steps of a chain, until each takes as long as the one before


def chained(hardware: str = "h100_ethernet", **keys: object) -> Problem:
    machine = replace(Hardware.load(hardware), beside_compute={"net": 1.5})
    step = rewritten(zero=3, cross_step=True, **keys)
    tasks = tasks_of(step, hardware)
    return Problem.of(step, tasks, slowdown=machine.slowdown, hindrance=machine.hindrance)


def seconds_in_a_chain(problem: Problem, order: Sequence[int]) -> list[float]:
    """Of each of many equal steps."""
    clock, found = None, []
    for _ in range(ROUNDS):
        clock = Clock(problem, before=clock)
        for call in order:
            clock.issue(call)
        found.append(clock.end)
    return found


# ---- what is there when


def test_a_wait_for_the_step_before_waits_for_what_that_has_launched() -> None:
    problem = chained()
    carried = [call for call, kind in enumerate(problem.kind) if kind == CARRIED]
    assert carried and {problem.launch_of[call] for call in carried} == set(problem.leads)
    order = list(range(len(problem)))
    launch = problem.launch_of[carried[0]]
    first = times_of(problem, order)
    slower = replace(problem, seconds=[s + (call == launch) for call, s in enumerate(problem.seconds)])  # a second more
    later = times_of(slower, order)
    assert later.seconds > first.seconds + 0.5
    assert dict(later.stalls)[carried[0]] > dict(first.stalls).get(carried[0], 0.0) + 0.5


def test_without_a_step_before_it_all_is_there() -> None:
    problem = chained()
    clock = Clock(problem)
    for call in range(len(problem)):
        clock.issue(call)
    assert not any(problem.kind[call] == CARRIED for call, _ in clock.stalls)


@pytest.mark.parametrize("hardware", LINKS)
def test_the_second_step_of_a_chain_is_like_those_behind_it(hardware: str) -> None:
    problem = chained(hardware)
    rng = random.Random(0)
    firsts_unlike = 0
    for order in [find_schedule(problem).order, *(random_order(problem, rng) for _ in range(5))]:
        many = seconds_in_a_chain(problem, order)
        assert times_of(problem, order).seconds == pytest.approx(many[-1], rel=1e-3)
        firsts_unlike += many[0] != pytest.approx(many[-1], rel=1e-3)
    assert firsts_unlike, "the first step taken for the second would not show"


# ---- the bound


@pytest.mark.parametrize("hardware", LINKS)
def test_no_chain_is_faster_than_its_bound(hardware: str) -> None:
    problem = chained(hardware)
    rng = random.Random(1)
    bound = lower_bound(problem)
    assert set(bound.by_reason) >= {"load of compute", "load of net:dp", "critical path"}
    best = find_schedule(problem)
    assert best.bound == bound
    for order in [best.order, *(random_order(problem, rng) for _ in range(20))]:
        assert seconds_in_a_chain(problem, order)[-1] >= bound.seconds * (1 - 1e-9)


def test_a_chain_of_calls_that_counts_too_much_is_found() -> None:
    """The planted fault: a launch for the next step is taken to be waited for by the end of this one, too."""
    problem = chained("cpu")
    order = find_schedule(problem).order
    around = chain._around
    with mock.patch.object(chain, "_around", lambda p, wait: around(p, wait) + times_of(p, order).seconds):
        assert seconds_in_a_chain(problem, order)[-1] < lower_bound(problem).seconds


def above_the_bound(problem: Problem) -> float:
    """Seconds of the fastest order within each bound on memory that makes a difference, less the lower bound."""
    tried = [(peak_of_order(problem, order), seconds_in_a_chain(problem, order)[-1]) for order in all_orders(problem)]
    limits = sorted({peak for peak, _ in tried})
    return min(
        min(seconds for peak, seconds in tried if peak <= limit)
        - lower_bound(problem, bound_bytes=limit, places=8).seconds
        for limit in limits
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_a_small_chain_is_below_its_bound(seed: int) -> None:
    assert above_the_bound(carrying_step(random.Random(seed))) >= -1e-9


def test_a_reduction_and_the_gather_behind_it_are_covered_by_nothing_else() -> None:
    """Five seconds each. Beside them: a free call and an update of one, a product of four that is sent for two.

    So compute, of 8 seconds, stands still for 10 - 1 - 1 - (4 - 2).
    """
    drawn = carrying_step(random.Random(0))
    seconds = [0.0, 1.0, 1.0, 4.0, 2.0, 0.0, 1.0, 1.0, 5.0, 0.0, 0.0, 5.0]
    problem = replace(drawn, seconds=seconds, launch_s=[0.0] * 12, slowdown=[1.0, 1.0], hindrance=[1.0, 1.0])
    assert lower_bound(problem).seconds == 14.0
    assert min(seconds_in_a_chain(problem, order)[-1] for order in all_orders(problem)) == 14.0


def test_calls_of_the_next_step_that_are_not_counted_show() -> None:
    """The planted fault: nothing of the next step is taken to run before what it waits for."""
    behind = chain.exposed_behind
    with mock.patch.object(chain, "exposed_behind", lambda *args, **keys: behind(*args, **{**keys, "free": set()})):
        assert min(above_the_bound(carrying_step(random.Random(seed))) for seed in range(12)) < -1e-9


# ---- what is carried


def uncarried() -> StepGraph:
    return rewritten(zero=3, cross_step=True, disable=("gather_for_next_step",))


def names_carried(step: StepGraph) -> list[str]:
    return [node.meta["entry"].name for node in step.inputs("launched")]


def machine_with(bytes_s: float, path: Path) -> str:
    """The file of a machine with such links."""
    machine, link = Hardware.load("h100"), Link(0.0, bytes_s)
    rates = {kind: replace(rate, overhead_s=0.0) for kind, rate in machine.collectives.items()}
    path.write_text(replace(machine, node_link=link, network_link=link, collectives=rates).to_toml())
    return str(path)


def peak_of(step: StepGraph) -> int:
    return int(memory_timeline(step).total.max())


def test_costs_carry_what_forward_would_wait_for(tmp_path: Path) -> None:
    counts = []
    for bytes_s in (1e6, 1e8, 1e12):
        step = uncarried()
        gather_for_next_step.run(step, hardware=machine_with(bytes_s, tmp_path / f"{bytes_s}.toml"))
        counts.append(len(names_carried(step)))
    assert counts[0] > counts[1] > counts[2] >= 0, counts


def test_lanes_that_compute_hinders_carry_more(tmp_path: Path) -> None:
    counts = []
    for hindrance in (1.0, 3.0):
        file = Path(machine_with(3e8, tmp_path / f"{hindrance}.toml"))
        file.write_text(replace(Hardware.load(str(file)), beside_compute={"net": hindrance}).to_toml())
        step = uncarried()
        gather_for_next_step.run(step, hardware=str(file))
        counts.append(len(names_carried(step)))
    assert counts[0] < counts[1], counts


def test_what_is_carried_fits_into_memory(tmp_path: Path) -> None:
    slow = machine_with(1e6, tmp_path / "slow.toml")
    unbound, bound, step = uncarried(), uncarried(), uncarried()
    gather_for_next_step.run(unbound, hardware=slow)
    gather_for_next_step.run(bound, hardware=slow, memory_bytes=1)
    assert peak_of(unbound) > peak_of(step) >= peak_of(bound)
    assert 0 < len(names_carried(bound)) < len(names_carried(unbound))
    gather_for_next_step.run(step, hardware=slow, memory_bytes=10**12)
    assert names_carried(step) == names_carried(unbound)


# ---- lists


def test_launches_of_a_lane_go_by_what_follows_them() -> None:
    """Not by how long they take themselves: a long gather with little behind it does not come first."""
    problem = chained()
    ways = ways_to_end(problem)
    place = ranks(problem, ways)
    launches = [call for call, kind in enumerate(problem.kind) if kind == LAUNCH and call not in problem.leads]
    longer = replace(problem, seconds=[s * (100 if call in launches else 1) for call, s in enumerate(problem.seconds)])
    behind = [ways[call] - problem.seconds[call] for call in launches]
    assert [place[call] for call in launches] == pytest.approx([-b for b in behind])
    last = max(launches, key=lambda call: place[call])
    assert ranks(longer, ways_to_end(longer))[last] <= 0.0
    for launch, lead in problem.leads.items():
        assert ways[launch] == pytest.approx(problem.seconds[launch] + problem.launch_s[launch] - lead)


def test_launches_are_issued_while_compute_stands_still() -> None:
    """A launch holds compute: where that waits for a gather anyway, the next launch costs nothing."""
    kind = [LAUNCH, WAIT, RUN, LAUNCH, WAIT, RUN]
    reads: list[list[int]] = [[], [0], [1], [], [3], [2, 4]]
    launch_of = [-1, 0, -1, -1, 3, -1]
    drawn = drawn_problem(
        random.Random(0), kind, reads, launch_of, ["forward"] * 6, slowdown=1, hindrance=1, least_s=1, launch_s=0.5
    )
    problem = replace(drawn, seconds=[4.0, 0.0, 1.0, 4.0, 0.0, 1.0], launch_s=[0.5, 0, 0, 0.5, 0, 0])
    listed = list_schedule(problem, Policy(), way_out=list(range(6)), bound_bytes=10**9, ways=ways_to_end(problem))
    assert times_of(problem, listed).seconds == 9.5  # launch, both gathers, the last call
    assert times_of(problem, [0, 1, 2, 3, 4, 5]).seconds > 9.5


def test_launches_are_issued_while_compute_stands_still_though_their_lane_is_busy() -> None:
    kind = [LAUNCH, WAIT, RUN] * 3
    reads: list[list[int]] = [[], [0], [1], [], [3], [2, 4], [], [6], [5, 7]]
    launch_of = [-1, 0, -1, -1, 3, -1, -1, 6, -1]
    drawn = drawn_problem(
        random.Random(0), kind, reads, launch_of, ["forward"] * 9, slowdown=1, hindrance=1, least_s=1, launch_s=0.5
    )
    problem = replace(drawn, seconds=[4.0, 0.0, 8.0, 4.0, 0.0, 1.0, 4.0, 0.0, 1.0], launch_s=[0.5, 0, 0] * 3)
    listed = list_schedule(problem, Policy(), way_out=list(range(9)), bound_bytes=10**9, ways=ways_to_end(problem))
    assert times_of(problem, listed).seconds == 14.5  # a launch, its gather, all that is computed


def test_updates_that_a_gather_for_the_next_step_waits_for_come_before_others() -> None:
    """The others then run beside that gather."""
    problem = chained()
    assert problem.leading > set(problem.leads)
    priority = _Run(problem, Policy(), range(len(problem)), 10**9, ways_to_end(problem), None, None).priority
    others = [
        call
        for call, node in enumerate(problem.nodes)
        if node.meta["phase"] == "update" and call not in problem.leading
    ]
    assert others and min(priority[call] for call in others) > max(priority[call] for call in problem.leading)
