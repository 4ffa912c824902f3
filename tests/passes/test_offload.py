"""What leaves the device: which tensors, when they come back, and how many are on their way at a time."""

import functools
import itertools
from typing import Any

import pytest
import torch

import fxzero
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.errors import PlanError, RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.parse import from_text
from fxzero.graph.step_graph import first_argument, num_bytes
from fxzero.graph.swap_ops import is_launch, is_wait, swap_in, swap_out, swapped_bytes, tier_of, wait_of
from fxzero.graph.text import to_text
from fxzero.passes.offload_activations import offload_activations
from fxzero.recipe import captured_as, recipe
from tests.passes.test_recompute_blocks import Reader, batch


@functools.cache
def captured() -> StepGraph:
    """The step of a small GPT."""
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    inventory, _ = rehearse(Inventory.of(model, optimizer))
    return capture_step(inventory, None, (batch(0),), {}, options=captured_as(fxzero.Plan())).step


def program(*, ranks: int = 1, check: bool = False, **keys: Any) -> StepGraph:
    """What a plan makes of it, nothing being too small to leave the device."""
    below = {"offload_below": 0} if keys else {}
    plan = fxzero.Plan(**{**below, **keys}).resolve(ranks)
    step = captured().copy()
    step.mesh = dict(plan.axes)
    return recipe(plan, backend="gloo").run(step, check=check)


def state_bytes(step: StepGraph, *kinds: str) -> int:
    return sum(num_bytes(node.meta["val"]) for node in step.inputs(*kinds) if node.meta["val"].dim())


def on_the_way(step: StepGraph, target: Any) -> int:
    """The most bytes that moves of one kind have on their way at a time."""
    now = most = 0
    for node in step.calls():
        if node.target is target:
            now += num_bytes(node.meta["val"])
            most = max(most, now)
        elif is_wait(node) and first_argument(node).target is target:
            now -= num_bytes(node.meta["val"])
    return most


@pytest.mark.parametrize("ranks", [1, 4])
def test_optimizer_state_comes_in_once_and_goes_out_once(ranks: int) -> None:
    step = program(ranks=ranks, offload_optimizer="host")
    state = state_bytes(step, "optimizer")
    assert swapped_bytes(step.calls()) == {("host", "in"): state, ("host", "out"): state}
    assert all(tier_of(n) == "host" for n in step.inputs("optimizer") if n.meta["val"].dim())
    in_blocks = swapped_bytes(program(ranks=ranks, offload_optimizer="nvme").calls())[("nvme", "in")]
    assert in_blocks > state and in_blocks % 4096 == 0


@pytest.mark.parametrize("ranks", [1, 4])
def test_parameters_come_in_for_each_phase(ranks: int) -> None:
    step = program(ranks=ranks, offload_parameters="host")
    loads = [node for node in step.calls(swap_in)]
    phases = {(first_argument(n).name, n.meta["phase"]) for n in loads}
    assert len(phases) == len(loads)
    for node in step.inputs("parameter"):
        assert {phase for name, phase in phases if name == node.name} >= {"forward", "update"}
    if ranks > 1:  # rows travel: what is gathered has come in before
        gathers = [n for n in step.calls() if c10d.is_collective(n) and c10d.gathers_parameters(n)]
        assert gathers and all(is_wait(n) for launch in gathers for n in c10d.sent(launch))


def test_no_view_of_a_parameter_outlives_its_phase() -> None:
    step = program(offload_parameters="nvme")
    here = {n for n in step.calls() if is_wait(n) and first_argument(n).target is swap_in}
    for node in here:
        for user in node.users:
            if user.op == "call_function" and user.meta["phase"] == "forward":
                assert all(r.meta["phase"] == "forward" for r in user.users if "view" in str(user.target)), user


@pytest.mark.parametrize("distance", [0, 1, 2])
@pytest.mark.parametrize("bucket_bytes", [0, 8192])
def test_few_moves_are_on_their_way_at_a_time(distance: int, bucket_bytes: int) -> None:
    plan = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "offload_activations": "nvme"}
    step = program(**plan, prefetch=distance, bucket_bytes=bucket_bytes)
    largest = max(bucket_bytes, *(num_bytes(node.meta["val"]) for node in step.calls() if is_launch(node)))
    for target in (swap_in, swap_out):
        assert on_the_way(step, target) <= (distance + 1) * largest
        assert on_the_way(step, target) > distance * largest / 4  # and what may be, is


def test_a_launch_stands_ahead_of_its_need() -> None:
    plan = {"offload_optimizer": "nvme", "bucket_bytes": 0}
    ahead = {}
    for distance in (0, 1, 3):
        step = program(**plan, prefetch=distance)
        at = step.positions()
        ahead[distance] = sum(at[wait_of(launch)] - at[launch] for launch in step.calls(swap_in, swap_out))
    assert ahead[0] < ahead[1] < ahead[3]


def test_activations_leave_between_forward_and_backward() -> None:
    kept, left = program(), program(offload_activations="host")
    moved = swapped_bytes(left.calls())
    assert moved[("host", "in")] == moved[("host", "out")] > 0
    at = left.positions()
    for out in left.calls(swap_out):
        source = first_argument(out)
        back = next(iter(wait_of(out).users))
        assert back.target is swap_in and source.meta["phase"] == "forward"
        late = [n for n in source.users if n.op == "call_function" and n.meta["phase"] != "forward"]
        assert not late, f"{source} is still read by {late}"
        assert max(at[n] for n in source.users) == at[out] or out.meta["phase"] == "forward"
    assert len(left.calls()) > len(kept.calls())


def test_only_what_is_named_leaves() -> None:
    step = program()
    chosen = first_argument(program(offload_activations="host").calls(swap_out)[3]).name
    assert offload_activations.run(step, names=((chosen, "nvme"),)) == 1
    assert [first_argument(n).name for n in step.calls(swap_out)] == [chosen]
    with pytest.raises(RewriteError, match="nobody"):
        offload_activations.run(step, names=(("nobody", "nvme"),))


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_a_part_of_the_state_is_updated_on_the_host(part: float) -> None:
    step = program(offload_optimizer="host", update_on_host=part)
    streamed = swapped_bytes(step.calls())
    total = state_bytes(step, "optimizer")
    kept = total - sum(num_bytes(n.meta["val"]) for n in step.calls(swap_in) if first_argument(n).op == "placeholder")
    assert abs(kept / total - part) < 0.15
    computed = [n for n in step.phase("update") if tier_of(n) == "host" and not is_launch(n) and not is_wait(n)]
    assert bool(computed) is (part > 0)
    if part == 1.0:  # a gradient and a parameter go out, a parameter comes in
        parameters = state_bytes(step, "parameter")
        assert streamed == {("host", "out"): 2 * parameters, ("host", "in"): parameters}


def test_small_tensors_stay() -> None:
    step = program(offload_optimizer="host", offload_below=2000)
    for node in step.inputs("optimizer"):
        assert (tier_of(node) == "host") is (node.meta["val"].numel() >= 2000)


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_the_text_of_a_swapped_step_reads_back(tier: str) -> None:
    plan = {"offload_optimizer": tier, "offload_parameters": tier, "offload_activations": tier}
    step = program(ranks=4, check=True, **plan, update_on_host=0.5 if tier == "host" else 0.0)
    text = to_text(step)
    assert f"on {tier}" in text and "swap_in" in text and "swap_out" in text
    assert to_text(from_text(text)) == text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"offload_optimizer": "disk"},
            "Plan.offload_optimizer: expected 'none' or 'host' or 'nvme' or 'auto', got 'disk'",
        ),
        ({"offload_dir": "/tmp"}, "Plan.offload_dir: expected one of them 'nvme' or 'auto' with it"),
        (
            {"update_on_host": 0.5, "offload_optimizer": "nvme"},
            "Plan.update_on_host: expected offload_optimizer='host'",
        ),
        ({"update_on_host": 2.0, "offload_optimizer": "host"}, "Plan.update_on_host: expected a part, from 0 to 1"),
        ({"offload_io": "fast", "offload_optimizer": "nvme"}, "Plan.offload_io"),
        ({"offload_dir": "", "offload_optimizer": "nvme"}, "Plan.offload_dir: expected a path"),
        ({"offload_below": 0}, "Plan.offload_below"),
    ],
)
def test_a_plan_that_says_something_odd_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        fxzero.Plan(**keys)
    assert says in str(caught.value)


def test_plans_with_offload_go_through_files() -> None:
    for optimizer, parameters in itertools.product(("none", "host", "nvme"), repeat=2):
        plan = fxzero.Plan(offload_optimizer=optimizer, offload_parameters=parameters)
        assert fxzero.Plan.from_toml(plan.to_toml()) == plan == fxzero.Plan.from_json(plan.to_json())
