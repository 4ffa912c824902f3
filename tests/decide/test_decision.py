"""recompute="auto": the budget is met or refused, time falls as it grows, and what runs is bit-equal to keeping all."""

import functools
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import fxzero
import fxzero.decide.search as module
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.memory import memory_profile
from fxzero.decide import Decision, decide, decided_recipe
from fxzero.decide.activations import Activations
from fxzero.decide.frontier import frontier
from fxzero.decide.lifetimes import Lifetimes
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.text import to_text
from fxzero.recipe import captured_as, recipe
from tests.numerics.side_by_side import Values, first_difference
from tests.passes.test_recompute_blocks import LAYERS, Reader, batch, train

SETTINGS = {"zero 0, one rank": (0, 1, "fp32"), "zero 3, four ranks": (3, 4, "fp32"), "bf16": (2, 4, "bf16")}


def plan_of(setting: str, **keys: Any) -> fxzero.Plan:
    zero, ranks, precision = SETTINGS[setting]
    return fxzero.Plan(zero=zero, precision=precision, **keys).resolve(ranks)


def captured(plan: fxzero.Plan) -> StepGraph:
    """The step of a plan before any pass; a copy of what was captured for its dtypes before."""
    step = captured_in(plan.precision).copy()
    step.mesh = dict(plan.axes)
    return step


@functools.cache
def captured_in(precision: str) -> StepGraph:
    plan = fxzero.Plan(precision=precision)
    model = Reader()
    inventory = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters(), foreach=False)))[0]
    return capture_step(inventory, None, (batch(0),), {}, options=captured_as(plan)).step


@pytest.fixture(scope="module")
def steps() -> dict[str, StepGraph]:
    return {setting: captured(plan_of(setting)) for setting in SETTINGS}


@functools.cache
def peak(setting: str, recompute: str) -> int:
    plan = plan_of(setting, recompute=recompute)
    return memory_profile(recipe(plan, backend="gloo").run(captured(plan), check=False)).peak_bytes


def between(setting: str, part: float) -> int:
    """A budget that leaves this part of what recomputing blocks saves."""
    least = peak(setting, "blocks")
    return int(least + part * (peak(setting, "none") - least))


def decided(step: StepGraph, setting: str, budget: int) -> Decision:
    return decide(step, plan=plan_of(setting, recompute="auto", memory_budget=budget), backend="gloo")


@pytest.mark.parametrize(("setting", "parts"), zip(SETTINGS, [(0.1, 0.4, 0.8), (0.1, 0.4), (0.1, 0.4)], strict=True))
def test_budgets_are_met_and_time_falls_as_they_grow(
    setting: str, parts: tuple[float, ...], steps: dict[str, StepGraph]
) -> None:
    step = steps[setting]
    budgets = [between(setting, part) for part in parts]
    found = [decided(step, setting, budget) for budget in budgets]
    for budget, decision in zip(budgets, found, strict=True):
        plan = plan_of(setting, recompute="auto", memory_budget=budget)
        program = recipe(plan, backend="gloo", decided=decision.decided).run(step, check=budget == budgets[1])
        assert memory_profile(program).peak_bytes == decision.peak_bytes <= budget
        assert decision.names and decision.groups
    seconds = [decision.seconds for decision in found]
    assert all(seconds) and seconds == sorted(seconds, reverse=True)
    assert found[1].peak_bytes >= 0.9 * budgets[1], "far more is recomputed than the budget asks for"


def test_it_loses_less_time_than_blocks_do(steps: dict[str, StepGraph]) -> None:
    """Half of what blocks save, for less than half of their time."""
    setting = "zero 0, one rank"
    step = steps[setting]
    half = decided(step, setting, between(setting, 0.5))
    all_of_it = decided(step, setting, between(setting, 0.05))
    assert half.seconds < 0.5 * all_of_it.seconds


def test_an_ample_budget_gives_the_program_of_none(steps: dict[str, StepGraph]) -> None:
    setting = "zero 3, four ranks"
    plan = plan_of(setting, recompute="auto", memory_budget="1 GiB")
    pipeline, decision = decided_recipe(steps[setting], plan=plan, backend="gloo")
    assert decision is not None and not decision.names and decision.seconds == 0
    texts = [to_text(p.run(steps[setting])) for p in (pipeline, recipe(plan_of(setting), backend="gloo"))]
    assert texts[0].replace("chosen-recomputed, ", "") == texts[1]


def test_equal_steps_are_decided_alike(steps: dict[str, StepGraph]) -> None:
    setting = "zero 0, one rank"
    budget = between(setting, 0.4)
    first = decided(steps[setting], setting, budget)
    frontier.cache_clear()
    captured_in.cache_clear()
    assert first == decided(captured(plan_of(setting)), setting, budget)


def test_blocks_of_equal_structure_are_one_problem(steps: dict[str, StepGraph]) -> None:
    activations = Activations(steps["zero 0, one rank"], module.hardware_of(steps["zero 0, one rank"]))
    assert [block.name for block in activations.blocks] == ["", *(f"layers.{i}" for i in range(LAYERS))]
    assert len({block.problem for block in activations.blocks[2:-1]}) == 1  # the last one's end is read by the head


def test_a_tier_is_an_option_only_where_the_caller_allows_it(steps: dict[str, StepGraph]) -> None:
    setting = "zero 0, one rank"
    hardware = replace(module.hardware_of(steps[setting]), host_bytes_s=1e18)
    for tiers in ((), ("host",)):
        blocks = Activations(steps[setting], hardware, tiers=tiers).blocks
        names = {option.name for block in blocks for options in block.problem.storages for option in options}
        assert names == {"keep", "bool", *tiers}
    with mock.patch.object(module, "hardware_of", lambda step, backend: hardware):
        plan = plan_of(setting, recompute="auto", memory_budget=between(setting, 0.9))
        assert not decide(steps[setting], plan=plan, backend="gloo").decided.offloaded


# ---- what it says


def test_the_report_says_what_was_decided_and_why(steps: dict[str, StepGraph]) -> None:
    setting = "zero 0, one rank"
    decision = decided(steps[setting], setting, between(setting, 0.3))
    lines = str(decision).splitlines()
    head = r"budget [\d.]+ MiB: predicted peak [\d.]+ MiB, [\d.]+ MiB with everything kept; [\d.]+ ms beside a step's "
    assert re.match(head, lines[0]), lines[0]
    mlp = "  layers.*.mlp activations: recomputed in 4 of 4 blocks, 256.0 KiB for "
    assert any(line.startswith(mlp) for line in lines), str(decision)
    saved = [group.saved_bytes for group in decision.groups]
    assert saved == sorted(saved, reverse=True) and saved[0] > 0
    assert sum(group.seconds for group in decision.groups) <= decision.seconds
    nothing = decided(steps[setting], setting, 2**30)
    assert re.search(r"[\d.]+ MiB with everything kept; so everything is$", str(nothing))


@pytest.mark.parametrize("setting", ["zero 3, four ranks", "bf16"])
def test_activations_wait_on_a_tier_where_that_is_cheaper(setting: str, steps: dict[str, StepGraph]) -> None:
    """With a link of almost no cost, what is in the way leaves; with one that is dear, nothing does."""
    budget = between(setting, 0.6)
    for host_bytes_s, leaves in ((1e13, True), (1e3, False)):
        hardware = replace(module.hardware_of(steps[setting]), host_bytes_s=host_bytes_s)
        keys: dict[str, Any] = {"memory_budget": budget, "offload_activations": "host", "bucket_bytes": 2**13}
        plan = plan_of(setting, recompute="auto", **keys)
        with mock.patch.object(module, "hardware_of", lambda step, backend, found=hardware: found):
            pipeline, decision = decided_recipe(steps[setting], plan=plan, backend="gloo")
        assert decision is not None and bool(decision.decided.offloaded) is leaves
        assert memory_profile(pipeline.run(steps[setting])).peak_bytes == decision.peak_bytes <= budget
        assert any(group.how == "offloaded to host" for group in decision.groups) is leaves
        assert ("offloaded to host in" in str(decision)) is leaves


def test_twenty_steps_with_activations_on_a_tier_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = train({})[0]
    real = module.hardware_of
    monkeypatch.setattr(
        module, "hardware_of", lambda step, backend: replace(real(step), host_bytes_s=1e12, disk_bytes_s=1e12)
    )
    for tier in ("host", "nvme"):
        plan = {"recompute": "auto", "memory_budget": between("zero 0, one rank", 0.6), "offload_activations": tier}
        plan["bucket_bytes"] = 2**13  # of moves on their way
        values, step = train(plan)
        assert first_difference(values, kept) == ""
        assert step._last[-1].decision.decided.offloaded


def test_a_budget_that_is_too_small_is_refused(steps: dict[str, StepGraph]) -> None:
    says = (
        r"Plan.memory_budget: expected at least 1\.[34] MiB, the smallest predicted peak that was found on this rank "
        r"\(at %\w+: .*optimizer state of layers.\*.\S+ [\d.]+ KiB.*\), got 700.0 KiB; "
        r"give it more, or need less: zero=3, offload_optimizer='host', a smaller batch"
    )
    with pytest.raises(PlanError, match=says):
        decided(steps["zero 0, one rank"], "zero 0, one rank", 700 * 2**10)


def test_a_budget_holds_whatever_is_recomputed() -> None:
    says = r"expected at least 2.2 MiB, the predicted peak on this rank .* set recompute='auto', give it more"
    with pytest.raises(PlanError, match=says):
        train({"memory_budget": "1.5 MiB"}, steps=1)
    assert train({"memory_budget": "3 MiB"}, steps=1)[1].report().count("budget") == 0


def test_a_decision_that_does_not_meet_the_budget_is_found() -> None:
    """A planted fault: nothing is recomputed, whatever the search says; the finished program is checked."""

    def idle(search: Any, step: StepGraph, nothing: Decision) -> Decision:
        return nothing

    with mock.patch.object(module._Search, "run", idle), pytest.raises(PlanError, match="the predicted peak on this"):
        train({"recompute": "auto", "memory_budget": "1.5 MiB"}, steps=1)


def test_an_estimate_that_is_wrong_is_corrected(steps: dict[str, StepGraph]) -> None:
    """Lifetimes that promise twice as much: the first answer is above the budget, a later one is not."""
    setting = "zero 0, one rank"
    budget = between(setting, 0.4)
    change, evaluated, peaks = Lifetimes.change, module._Search._evaluated, []

    def generous(*args: Any) -> dict[int, float]:
        return {place: 2 * size for place, size in change(*args).items()}

    def noted(*args: Any) -> Decision:
        peaks.append(evaluated(*args).peak_bytes)
        return evaluated(*args)

    with mock.patch.object(Lifetimes, "change", generous), mock.patch.object(module._Search, "_evaluated", noted):
        decision = decided(steps[setting], setting, budget)
    assert peaks[0] > budget >= decision.peak_bytes


# ---- what runs


@pytest.fixture(scope="module")
def kept() -> Values:
    return train({})[0]


@pytest.mark.parametrize("budget", [2_000_000, 1_520_000])
def test_20_steps_are_bit_equal_to_keeping_everything(budget: int, kept: Values) -> None:
    values, step = train({"recompute": "auto", "memory_budget": budget})
    assert first_difference(kept, values) == ""
    assert memory_profile(step.graph).peak_bytes <= budget
    assert "layers.*.mlp activations: recomputed in " in step.report()


def test_every_microbatch_meets_the_budget() -> None:
    kept, step = train({"accumulate": 2}, steps=3)
    budget = 1_500_000
    assert memory_profile(step.graphs[0]).peak_bytes < budget < memory_profile(step.graphs[1]).peak_bytes
    values, step = train({"accumulate": 2, "recompute": "auto", "memory_budget": budget}, steps=3)
    assert first_difference(kept, values) == ""
    assert len(step.graphs) == 2
    assert all(memory_profile(graph).peak_bytes <= budget for graph in step.graphs)
