"""Steps cut into regions, without a compiler: state and losses are bit-equal to the plain loop's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxzero
from fxzero.graph.regions import regions
from tests.lower.interpreted import interpreted
from tests.lower.models import Decoder, tokens
from tests.numerics.models import all_cases, clipped_cases, rarer_cases
from tests.numerics.reference import first_difference, num_programs, run_compiled, run_plain

aten = torch.ops.aten
CASES = {**all_cases(), **rarer_cases(), "clip_norm2": clipped_cases()["clip_norm2"]}
PLAN = fxzero.Plan(lowering="inductor")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regions_compute_what_the_plain_loop_does(case: Any) -> None:
    with interpreted() as store:
        got, step = run_compiled(case, PLAN)
    difference = first_difference(run_plain(case), got)
    assert difference is None, str(difference)
    assert num_programs(step) == case.captures
    assert store.texts, "no region"


def shifted(op: Any, by: float) -> Callable[[torch.fx.GraphModule], None]:
    """An op's results are off by a little."""

    def edit(module: torch.fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=op):
            with module.graph.inserting_after(node):
                moved = module.graph.call_function(aten.add.Tensor, (node, by))
            node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)

    return edit


@pytest.mark.parametrize("op", [aten.lerp.Scalar, aten.sqrt.default], ids=str)
def test_a_fault_in_a_region_is_seen(op: Any) -> None:
    case = CASES["adamw"]
    with interpreted(shifted(op, 1e-6)):
        got, _ = run_compiled(case, PLAN)
    assert first_difference(run_plain(case), got) is not None


PLANS: dict[str, dict[str, Any]] = {
    "offloaded": {"offload_optimizer": "nvme", "offload_parameters": "host", "offload_activations": "host"}
    | {"offload_below": 0},
    "updated_on_host": {"offload_optimizer": "host", "update_on_host": 1.0, "offload_below": 0},
    "recomputed": {"recompute": "auto", "memory_budget": 400_000},
    "scaled_and_clipped": {"loss_scale": 8.0, "clip_grad_norm": 0.3, "precision": "bf16"},
    "accumulated": {"accumulate": 2, "accumulate_in": "unsharded", "schedule": "cost"},
}


def trained(lowering: str, **keys: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and parameters of a few steps with dropout."""
    torch.manual_seed(0)
    model = Decoder(dropout=0.1)
    plan = fxzero.Plan(lowering=lowering, **keys)
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2), plan)
    torch.manual_seed(1)
    losses = [step(*tokens(index, rows=4)).item() for index in range(3)]
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("keys", PLANS.values(), ids=PLANS)
def test_regions_compute_the_same_under_other_plans(keys: dict[str, Any]) -> None:
    with interpreted() as store:
        losses, parameters = trained("inductor", **keys)
    expected, wanted = trained("eager", **keys)
    assert store.texts and losses == expected
    assert all(torch.equal(got, other) for got, other in zip(parameters, wanted, strict=True))


def test_a_recording_shares_the_time_of_a_region_among_its_calls() -> None:
    torch.manual_seed(0)
    model = Decoder(1)
    with interpreted():
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), PLAN)
        recording = step.record(*tokens(0), steps=1)
    calls = set(regions(step.graph)[0].calls)
    events = [event for event in recording.typical.events if event.node in calls]
    assert len(events) > 1 and events[0].seconds > 0
    assert [event.seconds for event in events] == pytest.approx([events[0].seconds] * len(events))
    assert [event.start_s for event in events[1:]] == pytest.approx([event.end_s for event in events[:-1]])
