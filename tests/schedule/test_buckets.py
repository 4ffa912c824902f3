"""Buckets by cost: what a step sends is read rightly, estimates are near the simulator, no fixed size is better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import fx

from fxzero import StepGraph
from fxzero.cost.hardware import Hardware, Link
from fxzero.cost.memory import memory_timeline
from fxzero.errors import PlanError, RewriteError
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import num_bytes
from fxzero.passes.bucket_all_gathers import make_buckets
from fxzero.passes.choose_buckets import choose_buckets
from fxzero.passes.keep_gathered import keep_gathered
from fxzero.plan import Plan
from fxzero.recipe import recipe
from fxzero.schedule.buckets import SIZES, Choice, Search, Size, buckets_of, even, told, twice_gathered
from fxzero.schedule.flow import Flow, Rules, flow_of
from fxzero.schedule.traffic import BACKWARD, BIRTH, END, FORWARD, NEED, REDUCTIONS, STREAMS, Traffic, traffic_of
from fxzero.simulate.prediction import predict
from tests.schedule.steps import captured, rewritten

H100 = Hardware.load("h100")
PLAIN: dict[str, Any] = {"zero": 3, "bucket_form": "coalesced", "hardware": "h100"}


@pytest.fixture(scope="module")
def step() -> StepGraph:
    return captured(2, world=64)


def run(step: StepGraph, *, until: str | None = None, check: bool = False, **keys: Any) -> StepGraph:
    plan = Plan(**{**PLAIN, **keys}).resolve(64)
    return recipe(plan, backend="nccl").run(step, until=until, check=check)


@pytest.fixture(scope="module")
def traffic(step: StepGraph) -> Traffic:
    return traffic_of(run(step, until="choose_collective_algorithms"), H100)


def seconds(step: StepGraph) -> float:
    return predict([step], H100).seconds


def peak(step: StepGraph) -> int:
    return int(memory_timeline(step).total.max())


# What a step sends


def test_every_gather_and_reduction_is_a_message_with_its_marks(step: StepGraph, traffic: Traffic) -> None:
    program = run(step, until="choose_collective_algorithms")
    launches = [n for n in program.calls() if c10d.is_collective(n)]
    assert len(traffic.messages) == len(launches)
    for kind, streams in ((NEED, (FORWARD, BACKWARD)), (END, (FORWARD, BACKWARD)), (BIRTH, (REDUCTIONS,))):
        marked = {index for found, index, _, _ in traffic.marks if found == kind}
        assert marked == {i for stream in streams for i in traffic.stream(stream)}
    twice = twice_gathered(traffic)
    assert sorted(twice) == traffic.stream(BACKWARD)
    assert traffic.messages[twice[0]].param == "embed.weight"  # the tied head: last in forward, first in backward


def test_the_highest_of_a_range_is_what_a_walk_over_it_finds(traffic: Traffic) -> None:
    here = [mark[3] for mark in traffic.marks]
    for first in range(0, len(here), 7):
        for last in range(first, len(here), 5):
            assert traffic.highest(first, last) == max(here[first : last + 1])


@pytest.mark.parametrize("size", [0, 1024, 4096, 2**20])
def test_an_estimate_of_the_fixed_order_is_near_what_the_simulator_plays(
    step: StepGraph, traffic: Traffic, size: int
) -> None:
    program = run(step, bucket_bytes=size)
    found = flow_of(traffic, buckets_of(traffic, even(size)), Rules(by_cost=False))
    assert found.seconds == pytest.approx(seconds(program), rel=0.05)
    assert found.peak_bytes == pytest.approx(peak(program), rel=0.15)


@pytest.mark.parametrize("latency_s", [1e-6, H100.network_link.latency_s])
@pytest.mark.parametrize("size", [0, 4096])
def test_an_estimate_knows_that_lanes_are_slower_beside_compute(
    step: StepGraph, traffic: Traffic, size: int, latency_s: float
) -> None:
    """It is as near to the simulator as where they are not; with that left out it is far from it."""
    alone = replace(H100, network_link=Link(latency_s, H100.network_link.bytes_s))
    beside = replace(alone, beside_compute={"net": 4.0})
    program = run(step, bucket_bytes=size)

    def ratio(machine: Hardware, estimated_for: Hardware) -> float:
        own = Traffic(traffic.messages, traffic.marks, traffic.mesh, estimated_for)
        found = flow_of(own, buckets_of(traffic, even(size)), Rules(by_cost=False))
        return found.seconds / predict([program], machine).seconds

    assert ratio(beside, beside) == pytest.approx(ratio(alone, alone), abs=0.03)
    assert ratio(beside, alone) < ratio(alone, alone) - 0.05


def test_an_estimate_without_latency_is_far_from_it(step: StepGraph, traffic: Traffic) -> None:
    free = Traffic(traffic.messages, traffic.marks, traffic.mesh, replace(H100, network_link=Link(0.0, 1e12)))
    found = flow_of(free, buckets_of(free, even(0)), Rules(by_cost=False))
    assert found.seconds < 0.8 * seconds(run(step, bucket_bytes=0))


# Cuts


@pytest.mark.parametrize("size", SIZES[:6])
def test_a_cut_has_each_message_once_and_buckets_of_one_kind(traffic: Traffic, size: int) -> None:
    buckets = buckets_of(traffic, even(size))
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(traffic.messages)))
    for bucket in buckets:
        assert len({traffic.messages[i].alike for i in bucket}) == 1 and list(bucket) == sorted(bucket)
        assert len(bucket) == 1 or sum(traffic.messages[i].sent_bytes for i in bucket) <= size


def test_buckets_grow_from_the_exposed_end(traffic: Traffic) -> None:
    size = Size(2**20, first_bytes=600, growth=0.5)
    assert [size.at(0), size.at(1000), size.at(2**30)] == [600, 1100, 2**20]
    buckets = buckets_of(traffic, dict.fromkeys(STREAMS, size))
    reductions = [b for b in buckets if traffic.messages[b[0]].stream == REDUCTIONS]
    sizes = [sum(traffic.messages[i].sent_bytes for i in bucket) for bucket in reductions]
    assert sizes[-1] < max(sizes)  # what ends backward is exposed


def test_a_message_by_itself_takes_what_its_task_says_and_a_merge_saves_latency(traffic: Traffic) -> None:
    first, second = traffic.stream(FORWARD)[1:3]
    apart = traffic.seconds([first, second], form="separate")
    assert apart == pytest.approx(sum(traffic.seconds([i], form="coalesced") for i in (first, second)))
    assert traffic.seconds([first, second], form="coalesced") < 0.6 * apart


# The decision


@pytest.mark.parametrize(("schedule", "world"), [("fixed", 8), ("fixed", 1024), ("cost", 1024)])
def test_no_fixed_size_is_better(step: StepGraph, schedule: str, world: int) -> None:
    step = step.copy()
    step.mesh = {"dp": world}
    keys = {"schedule": schedule, "mesh": {"dp": world}, "regather": True}

    def time_of(size: int | str) -> float:
        plan = Plan(**{**PLAIN, **keys, "bucket_bytes": size})
        return seconds(recipe(plan, backend="nccl").run(step, check=False))

    fixed = [time_of(size) for size in (0, 2048, 2**20)]
    assert time_of("auto") <= min(fixed) * 1.002
    assert max(fixed) > 1.1 * min(fixed)  # a size matters


def test_a_worse_choice_is_seen(step: StepGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    good = seconds(run(step, bucket_bytes="auto"))
    monkeypatch.setattr(Search, "best", lambda self, choices: max(choices, key=lambda c: c.flow.seconds))
    assert seconds(run(step, bucket_bytes="auto")) > 1.2 * good


def test_equal_graphs_are_decided_alike(step: StepGraph) -> None:
    assert str(run(step, bucket_bytes="auto", schedule="cost")) == str(run(step, bucket_bytes="auto", schedule="cost"))


def test_of_equal_cuts_the_one_that_holds_least_is_taken(traffic: Traffic) -> None:
    search = Search(traffic, Rules(by_cost=False), room_bytes=100)
    made = [Choice({}, (), Flow(*pair)) for pair in ((1.0, 90), (1.00005, 50), (1.01, 10), (0.5, 101))]
    assert search.best(made) is made[1]  # the last does not fit, the third takes longer
    assert search.best(made[3:]) is made[3]  # nothing fits


def test_a_number_is_obeyed_and_an_open_one_follows_the_schedule(step: StepGraph) -> None:
    def names(**keys: Any) -> list[str]:
        plan = Plan(**{**PLAIN, **keys}).resolve(64)
        return [p.name for p in recipe(plan, backend="nccl").passes]

    assert "choose_buckets" not in names() and "choose_buckets" not in names(schedule="cost", bucket_bytes=2048)
    assert {"choose_buckets", "keep_gathered"} <= {*names(schedule="cost")}
    assert "choose_buckets" in names(bucket_bytes="auto") and "keep_gathered" not in names(bucket_bytes="auto")
    assert "choose_buckets" not in names(bucket_bytes="auto", offload_optimizer="host")
    program = run(step, schedule="cost", bucket_bytes=2048)
    sent = [sum(num_bytes(n.meta["val"]) for n in [launch]) for launch in program.calls(c10d.all_gather_coalesced)]
    assert sent and max(sent) <= 2048


def test_numbered_collectives_share_a_launch_where_they_are_alike(traffic: Traffic) -> None:
    first, second, third = (traffic.messages[i].node for i in traffic.stream(FORWARD)[:3])
    nodes: list[fx.Node] = [first, second, third]
    old = [node.meta.get("bucket") for node in nodes]
    try:
        for node, number in zip(nodes, (1, 2, 1), strict=True):
            node.meta["bucket"] = number
        assert make_buckets(nodes, None, size_of=lambda n: 1) == [[first, third]]
    finally:
        for node, number in zip(nodes, old, strict=True):
            node.meta["bucket"] = number


# Memory


def test_a_budget_is_kept_and_what_does_not_fit_is_not_chosen(step: StepGraph) -> None:
    free = run(step, bucket_bytes="auto", schedule="cost", regather=True)
    small = peak(run(step, bucket_bytes=0, prefetch=0))
    budget = small + (peak(free) - small) // 3
    for schedule in ("fixed", "cost"):
        tight = run(step, bucket_bytes="auto", schedule=schedule, memory_budget=budget, prefetch=0)
        assert peak(tight) <= budget < peak(free)


def test_a_search_that_does_not_count_memory_is_seen(step: StepGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    small = peak(run(step, bucket_bytes=0, prefetch=0))
    monkeypatch.setattr("fxzero.passes.choose_buckets._above", lambda *args: 0)
    monkeypatch.setattr(Search, "judge", lambda self, cut, kept=frozenset(): _huge(self, cut, kept))
    program = run(step, bucket_bytes="auto", memory_budget=small + 1000, prefetch=0)
    assert peak(program) > small + 1000


def _huge(search: Search, cut: dict[str, Size], kept: frozenset[int]) -> Choice:
    return Choice(even(2**30), buckets_of(search.traffic, even(2**30), kept=kept), Flow(1.0, 0), kept)


# What stays gathered


def gathers(step: StepGraph, phase: str) -> int:
    return sum(len(c10d.sent(n)) for n in step.calls() if c10d.gathers_parameters(n) and n.meta["phase"] == phase)


def test_what_pays_stays_gathered_within_the_memory_that_there_is(step: StepGraph) -> None:
    keys = {"schedule": "cost", "bucket_bytes": "auto", "check": True}
    twice, once = run(step, regather=True, **keys), run(step, regather=False, **keys)
    auto, wide = run(step, **keys), run(step, memory_budget="1 GiB", **keys)
    assert gathers(once, "backward") == 0 < gathers(twice, "backward")
    assert gathers(wide, "backward") < gathers(twice, "backward")
    assert peak(auto) <= peak(run(step, regather=True, schedule="fixed", bucket_bytes="auto")) * 1.02
    assert seconds(wide) <= seconds(auto) * 1.002 <= seconds(twice) * 1.004
    assert "stay gathered" in wide.remarks["choose_buckets"]


def test_only_what_is_marked_stays_and_it_must_have_been_gathered(step: StepGraph) -> None:
    program = run(step, until="choose_collective_algorithms")
    choose_buckets.run(program, by_cost=False, hardware="h100")
    launches = [n for n in program.calls(c10d.all_gather) if n.meta["phase"] == "backward"]
    launches[1].meta["stays"] = True
    before = len(program.calls())
    name = launches[1].meta["param"]
    assert keep_gathered.run(program) == 1
    assert len(program.calls()) == before - 3  # a gather, its wait, a release
    assert all(n.meta["param"] != name or n.meta["phase"] != "backward" for n in program.calls(c10d.all_gather))
    for launch in program.calls(c10d.all_gather):
        launch.meta["stays"] = True
    with pytest.raises(RewriteError, match="expected the same tensor gathered in forward, got none; set regather=True"):
        keep_gathered.run(program)


# What is told


def test_a_report_says_what_was_chosen_and_why(step: StepGraph, traffic: Traffic) -> None:
    remark = run(step, bucket_bytes="auto").remarks["choose_buckets"]
    assert remark.startswith("buckets by cost on H100: ")
    assert "gathers of forward: " in remark and "a merge saves " in remark and "us of latency" in remark
    rules = Rules(by_cost=True)
    alone = Search(traffic, rules).judge(even(0))
    assert "a merge saves" not in told(traffic, alone, rules)


def test_a_plan_that_does_not_gather_twice_cannot_say_so() -> None:
    with pytest.raises(PlanError, match=r"Plan\.regather: expected zero=3 with it, got zero=1; "):
        Plan(zero=1, precision="bf16", regather=True)


def test_other_plans_are_decided_too() -> None:
    for keys in (
        {"zero": 0},
        {"mesh": {"dp_replicate": 2, "dp": 2}, "clip_grad_norm": 1.0},
        {"precision": "bf16", "node_size": 2},
        {"compress_gathers": "int8", "compress_below": 0, "memory_budget": "1 GiB"},
        {"bucket_bytes": 1024, "regather": "auto", "memory_budget": "1 GiB"},
    ):
        rewritten(1, **{"bucket_bytes": "auto", **keys, "hardware": "h100", "regather": keys.get("regather")})
