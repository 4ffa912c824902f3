"""Where state rests is decided with what is recomputed: budgets are met, and what runs is bit-equal to keeping all."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fxzero
import fxzero.decide.search as module
from fxzero.cost.memory import bytes_beside, highest_profile, memory_profile
from fxzero.decide import Decision, decide, decided_recipe
from fxzero.errors import FxzeroError, PlanError
from fxzero.graph.swap_ops import swapped_bytes
from fxzero.runtime.homes import Homes
from tests.decide.test_decision import SETTINGS, captured, peak, plan_of
from tests.numerics.reference import num_programs
from tests.numerics.side_by_side import Values, first_difference
from tests.passes.test_recompute_blocks import batch, train

SMALL = {"offload_below": 0, "bucket_bytes": 2**13}
STATE = {"offload_optimizer": "auto", "offload_parameters": "auto", **SMALL}
EVERYTHING = {**STATE, "offload_activations": "auto", "update_on_host": "auto", "recompute": "auto"}


def decided(setting: str, part: float, **keys: Any) -> Decision:
    """What is decided for this part of the peak with everything kept."""
    plan = plan_of(setting, memory_budget=int(part * peak(setting, "none")), **SMALL, **keys)
    return decide(captured(plan_of(setting)), plan=plan, backend="gloo")


@pytest.mark.parametrize(("setting", "parts"), zip(SETTINGS, [(0.3, 0.6), (0.3,), (0.3,)], strict=True))
def test_budgets_far_below_recomputation_are_met(setting: str, parts: tuple[float, ...]) -> None:
    step = captured(plan_of(setting))
    seconds = []
    for part in parts:
        plan = plan_of(setting, memory_budget=int(part * peak(setting, "none")), **EVERYTHING)
        pipeline, decision = decided_recipe(step, plan=plan, backend="gloo")
        assert decision is not None and plan.memory_budget is not None
        profile = memory_profile(pipeline.run(step, check=part == 0.3))
        assert 0.9 * plan.memory_budget < profile.peak_bytes == decision.peak_bytes <= plan.memory_budget
        assert profile.host_bytes
        seconds.append(decision.seconds)
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(parts) and seconds[-1] > 0
    assert min(peak(setting, "blocks"), peak(setting, "none")) > 0.3 * peak(setting, "none")


def test_only_as_much_rests_elsewhere_as_must() -> None:
    setting = "zero 0, one rank"
    sizes = [
        sum(g.saved_bytes for g in decided(setting, part, offload_optimizer="auto").groups) for part in (0.95, 0.85)
    ]
    assert 0 < sizes[0] < sizes[1]
    assert not decided(setting, 1.0, offload_optimizer="auto").groups


def test_where_an_update_runs_follows_from_link_and_host() -> None:
    setting = "zero 0, one rank"
    step = captured(plan_of(setting))
    keys = {"offload_optimizer": "auto", "update_on_host": "auto", "memory_budget": int(0.85 * peak(setting, "none"))}
    gpu = module.hardware_of(step, backend="nccl")
    for host_memory_bytes_s, there in ((1e14, True), (1e6, False)):
        host = replace(gpu, host_memory_bytes_s=host_memory_bytes_s)
        with mock.patch.object(module, "hardware_of", lambda step, backend, found=host: found):
            placed = decide(step, plan=plan_of(setting, **SMALL, **keys), backend="nccl").decided.placed
        assert placed.tiers and bool(placed.on_host) is there
    fixed = decide(  # the host is the device here: fewer bytes move
        step, plan=plan_of(setting, offload_optimizer="host", update_on_host="auto", offload_below=0), backend="gloo"
    )
    assert fixed.decided.placed.on_host and fixed.seconds < 0 and "updated there" in str(fixed)


def test_files_are_taken_where_the_host_is_full(tmp_path: Path) -> None:
    setting = "zero 0, one rank"
    step = captured(plan_of(setting))
    budgets = {"memory_budget": int(0.85 * peak(setting, "none")), "host_budget": 150_000}
    with pytest.raises(PlanError, match="smallest predicted peak that was found"):
        decide(step, plan=plan_of(setting, offload_optimizer="auto", **SMALL, **budgets), backend="gloo")
    plan = plan_of(setting, offload_optimizer="auto", offload_dir=str(tmp_path), **SMALL, **budgets)
    decision = decide(step, plan=plan, backend="gloo")
    assert set(decision.decided.placed.tiers.values()) == {"host", "nvme"}
    program = decided_recipe(step, plan=plan, backend="gloo")[0].run(step)
    assert memory_profile(program).host_bytes <= 150_000 and memory_profile(program).nvme_bytes
    with pytest.raises(PlanError, match=r"Plan.host_budget: expected at least \d.*, got 97.7 KiB; give it more"):
        train({"offload_optimizer": "host", "host_budget": 100_000, "offload_below": 0}, steps=1)


# ---- what runs


@pytest.fixture(scope="module")
def kept() -> Values:
    return train({})[0]


def test_twenty_steps_are_bit_equal(kept: Values, tmp_path: Path) -> None:
    most = peak("zero 0, one rank", "none")
    for part, keys in ((0.85, STATE), (0.3, EVERYTHING), (0.3, {**EVERYTHING, "offload_dir": str(tmp_path)})):
        plan = {**keys, "memory_budget": int(part * most)}
        plan |= {"host_budget": 500_000} if "offload_dir" in keys else {}
        values, step = train(plan)
        assert first_difference(values, kept) == ""
        assert memory_profile(step.graph).peak_bytes <= plan["memory_budget"]
        moved = swapped_bytes(step.graph.calls())
        assert moved and (("nvme", "in") in moved) is ("offload_dir" in keys)
        assert "optimizer state: offloaded to " in step.report()


def test_a_program_that_takes_state_to_rest_elsewhere_is_refused() -> None:
    """A planted fault: what was decided never reaches the memory that state rests in."""
    plan = {**EVERYTHING, "memory_budget": int(0.5 * peak("zero 0, one rank", "none"))}
    everything_here = property(lambda self: fxzero.graph.placement.NOTHING_PLACED, lambda self, value: None)
    with mock.patch.object(Homes, "placed", everything_here, create=True), pytest.raises(FxzeroError, match="home"):
        train(plan, steps=1)


def test_state_that_is_loaded_before_the_first_step_moves_to_its_place(tmp_path: Path) -> None:
    dcp.save(train({}, steps=3)[1].state_dict(), checkpoint_id=tmp_path)
    plan = {**EVERYTHING, "memory_budget": int(0.5 * peak("zero 0, one rank", "none"))}
    losses = []
    for keys in ({}, plan):
        step = train(keys, steps=0)[1]
        found = step.state_dict()
        dcp.load(found, checkpoint_id=tmp_path)
        step.load_state_dict(found)
        torch.manual_seed(0)
        losses.append([step(batch(i)).item() for i in (5, 6)])
    assert losses[0] == losses[1]
    host = step._state.homes.swapper.held()["host"]  # in whole blocks
    assert memory_profile(step.graph).host_bytes <= host <= 2 * memory_profile(step.graph).host_bytes


def test_microbatches_share_one_placement() -> None:
    values, step = train({"accumulate": 2}, steps=3)
    most = highest_profile(step.graphs)[1].peak_bytes
    budget = int(0.6 * most)
    got, moved = train({"accumulate": 2, "memory_budget": budget, **EVERYTHING}, steps=3)
    assert first_difference(values, got) == ""
    assert highest_profile(moved.graphs)[1].peak_bytes <= budget
    tiers = [
        {n.meta["entry"].key: n.meta.get("tier") for n in graph.inputs("parameter", "optimizer")}
        for graph in moved.graphs
    ]
    assert all(tiers[1][key] == tier for key, tier in tiers[0].items())
    assert moved._last[0].placed == moved._last[1].placed


def test_a_schedule_leaves_room_for_the_other_microbatches() -> None:
    values, step = train({"accumulate": 2}, steps=2)
    index, profile = highest_profile(step.graphs)
    beside = bytes_beside(step.graphs[index], [step.graphs[1 - index]])
    assert beside and profile.peak_bytes == memory_profile(step.graphs[index]).peak_bytes + beside
    got, scheduled = train({"accumulate": 2, "schedule": "cost", "memory_budget": profile.peak_bytes}, steps=2)
    assert first_difference(values, got) == ""
    assert highest_profile(scheduled.graphs)[1].peak_bytes <= profile.peak_bytes
    assert any(record.name == "schedule_step" for record in scheduled._last[index].records)


def test_a_batch_of_another_shape_finds_state_where_it_rests() -> None:
    plan = {**EVERYTHING, "memory_budget": int(0.5 * peak("zero 0, one rank", "none"))}
    losses = []
    for keys in ({}, plan):
        step = train(keys, steps=2)[1]
        losses.append([step(batch(2)[:3]).item(), step(batch(3)).item()])
        assert num_programs(step) == 2
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"offload_optimizer": "auto"}, r"Plan.memory_budget: expected one, with offload_optimizer='auto'"),
        (
            {"offload_activations": "auto", "memory_budget": "1 GiB"},
            r"Plan.recompute: expected 'auto', with offload_activations='auto', got 'none'",
        ),
        ({"update_on_host": "auto"}, r"Plan.update_on_host: expected offload_optimizer='host'"),
        (
            {"update_on_host": 0.5, "offload_optimizer": "auto", "memory_budget": "1 GiB"},
            r"Plan.update_on_host: expected offload_optimizer='host' \(or 'auto' for both\)",
        ),
        ({"update_on_host": "half", "offload_optimizer": "host"}, r"a part, from 0 to 1, or 'auto', got 'half'"),
        ({"host_budget": "1 GiB"}, r"Plan.host_budget: expected one of them 'host' or 'auto'"),
        (
            {"offload_io": "buffered", "offload_parameters": "auto", "memory_budget": "1 GiB"},
            r"Plan.offload_io: expected one of them 'nvme', or 'auto' and offload_dir",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ", ".join(value),
)
def test_keys_that_do_not_fit_together(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        fxzero.Plan(**keys)
