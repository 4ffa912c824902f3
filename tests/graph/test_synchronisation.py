"""No graph makes the host wait for the device: each numerics case, before any pass and after all of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import CARRIED_KINDS
from fxzero.graph.synchronisation import synchronisations
from fxzero.recipe import captured_as, recipe
from tests.numerics.models import all_cases, clipped_cases
from tests.numerics.reference import batches, build

CASES = all_cases() | clipped_cases()
# a host scalar of the optimizer is selected by what the device finds: capturable=True keeps it on the device
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_grad_norm": 1.0},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "loss_scale": "dynamic", "clip_grad_norm": 1.0},
    "accumulated": {"accumulate": 3},
    "unsharded": {"accumulate": 3, "accumulate_in": "unsharded"},
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def rewritten(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, batch: tuple[Any, ...], plan: fxzero.Plan
) -> list[StepGraph]:
    """The programs of a step, captured and after all passes."""
    options = captured_as(plan)
    inventory, fresh = rehearse(Inventory.of(model, optimizer))
    out: list[StepGraph] = []
    carried: list[str] = []
    for index in range(plan.accumulate):
        how = replace(options, accumulation=options.accumulation.at(index, carried=carried))
        step = capture_step(inventory, loss, batch[0], batch[1], options=how, fresh=fresh).step
        carried = [name for kind, name in step.results if kind in CARRIED_KINDS]
        step.mesh = dict(plan.axes)
        out += [step, recipe(plan, backend="nccl").run(step)]
    return out


@pytest.mark.parametrize("name", CASES)
def test_no_case_makes_the_host_wait(name: str) -> None:
    case = CASES[name]
    model, optimizer = build(case)
    first = batches(case)[0]
    for step in rewritten(model, optimizer, case.loss, first, fxzero.Plan().resolve(2)):
        assert synchronisations(step) == {}


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("name", PLANS)
def test_no_plan_makes_the_host_wait(name: str, zero: int) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, capturable="loss_scale" in PLANS[name])
    plan = fxzero.Plan(zero=zero, **PLANS[name]).resolve(2)
    for step in rewritten(model, optimizer, mean_square, ((torch.randn(4, 8),), {}), plan):
        assert synchronisations(step) == {}


def indexed_by_mask(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)[x[:, 0] > 0].square().mean()


def selected(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.masked_select(model(x), x[:, :4] > 0).square().mean()


@pytest.mark.parametrize(
    ("loss", "build", "reason"),
    [
        (indexed_by_mask, torch.optim.SGD, "finds where a mask is true"),
        (selected, torch.optim.SGD, "yields a shape that depends on values"),
        (mean_square, torch.optim.AdamW, "optimizer 0.weight:step is kept on the host, its next value is computed on"),
    ],
)
def test_a_place_where_the_host_waits_is_found(loss: Callable[..., Any], build: Any, reason: str) -> None:
    model = network()
    plan = fxzero.Plan(zero=0, loss_scale=2.0 if build is torch.optim.AdamW else None).resolve(1)
    (captured, final) = rewritten(model, build(model.parameters(), lr=0.1), loss, ((torch.randn(4, 8),), {}), plan)
    for step in (captured, final):
        assert any(found.startswith(reason) for found in synchronisations(step).values())


def test_the_report_says_where_the_host_waits() -> None:
    model = network()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=mean_square)
    step(torch.randn(4, 8))
    assert "the host waits for the device nowhere inside the step" in step.report()
    model = network()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=indexed_by_mask)
    step(torch.randn(4, 8))
    assert "finds where a mask is true" in step.report()
