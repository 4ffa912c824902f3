"""Which gathers read rows where they rest, what has to come first, and what a program that breaks it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.memory import memory_timeline
from fxzero.errors import VerifyError
from fxzero.graph import collectives as c10d
from fxzero.graph.edit import reorder
from fxzero.graph.parse import from_text
from fxzero.graph.shared_rows import gathers_in_place, meetings_before_writes, release_of, rows_gathered
from fxzero.graph.verify import verify
from fxzero.recipe import captured_as, recipe, shares_rows
from tests.schedule.steps import rewritten


def gathers(step: StepGraph) -> Iterator[fx.Node]:
    return (node for node in step.calls(c10d.all_gather) if node.meta["phase"] != "update")


def read_in_place(step: StepGraph) -> list[str]:
    """The parameters of the gathers that copy nothing, once a gather."""
    found = [node for node in step.calls(c10d.all_gather) if c10d.carrier_of(node) == c10d.SHARED_ROWS]
    return [node.meta["param"] for node in found]


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, **keys: Any) -> StepGraph:
    plan = Plan(zero=3, **keys).resolve(2)
    inventory, options = rehearse(Inventory.of(model, optimizer))[0], captured_as(plan)
    options = replace(options, accumulation=options.accumulation.at(0, weighted=False, carried=()))
    step = capture_step(inventory, lambda model, x: model(x).square().mean(), (x,), {}, options=options).step
    step.mesh = dict(plan.axes)
    return recipe(plan, backend="shm").run(step)


KEYS: list[dict[str, Any]] = [
    {},
    {"clip_grad_norm": 1.0, "loss_scale": "dynamic", "recompute": ("layers.0",)},
    {"schedule": "cost"},
    {"regather": False, "lowering": "inductor"},
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_all_gathers_of_updated_parameters_read_in_place(keys: dict[str, Any]) -> None:
    step = rewritten(1, backend="shm", **keys)
    assert [node.meta["param"] for node in gathers(step)] == read_in_place(step)
    assert len(read_in_place(step)) >= 5
    assert read_in_place(from_text(str(step))) == read_in_place(step)


def test_what_is_gathered_in_place_takes_no_memory() -> None:
    copied, in_place = (rewritten(1, backend="shm", all_gather=how) for how in ("shared_memory", "auto"))
    assert not read_in_place(copied)
    held = [int(memory_timeline(step).total.sum()) for step in (copied, in_place)]
    assert held[1] < held[0]


def test_a_parameter_that_no_step_writes_is_copied() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight.requires_grad_(False)
    step = step_of(model, torch.optim.SGD([model[1].weight], lr=0.1), torch.randn(4, 8))
    assert {node.meta["param"] for node in gathers(step)} == {"0.weight", "1.weight"}
    assert {*read_in_place(step)} == {"1.weight"}


def test_an_update_that_gathers_reads_a_copy() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    step = step_of(model, Lookahead(model.parameters()), torch.randn(4, 8))
    updates = [n for n in step.calls(c10d.all_gather) if n.meta["phase"] == "update" and rows_gathered(n) is not None]
    assert updates and all(c10d.carrier_of(node) == c10d.SHARED_MEMORY for node in updates)
    assert {*read_in_place(step)} == {"0.weight", "1.weight"}


class Lookahead(torch.optim.Optimizer):
    """Each weight is divided by its largest singular value, so that its update has to gather it."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad @ parameter.t() @ parameter, alpha=0.1)


def test_gradients_that_are_handed_on_mean_a_later_write() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 8), accumulate=2)
    assert ("parameter", "0.weight") not in step.results  # the first microbatch's program: it updates nothing
    assert {*meetings_before_writes(step).values()} == {None}
    assert {*read_in_place(step)} == {"0.weight", "1.weight"}


@pytest.mark.parametrize(
    ("keys", "backend"),
    [
        ({"cross_step": True}, "shm"),
        ({"zero": 2}, "shm"),
        ({"bucket_form": "coalesced"}, "shm"),
        ({"all_gather": "shared_memory"}, "shm"),
        ({"offload_parameters": "host"}, "shm"),
        ({}, "gloo"),
        ({}, "nccl"),
    ],
    ids=str,
)
def test_where_rows_are_not_shared(keys: dict[str, Any], backend: str) -> None:
    assert not shares_rows(Plan(**keys).resolve(2), backend)
    assert shares_rows(Plan().resolve(2), "shm") and not shares_rows(Plan().resolve(1), "shm")


# ---- faults: each is what a wrong pass could do to a program that is right


def one(step: StepGraph, name: str) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """(last gather of a parameter, its release, the meeting, the first call that writes the parameter's rows)."""
    launch = [n for n in step.calls(c10d.all_gather) if n.meta["param"] == name and n.meta["phase"] != "update"][-1]
    parameter, release = rows_gathered(launch), release_of(launch)
    assert parameter is not None and release is not None
    meeting = meetings_before_writes(step)[parameter]
    assert meeting is not None
    return launch, release, meeting, next(user for user in parameter.users if user.meta.get("phase") == "update")


def moved(step: StepGraph, node: fx.Node, *, before: fx.Node | None = None, after: fx.Node | None = None) -> None:
    order = [other for other in step.calls() if other is not node]
    place = order.index(before) if before is not None else order.index(after) + 1
    reorder(step, [*order[:place], node, *order[place:]])


def released_late(step: StepGraph, name: str) -> None:
    _, release, meeting, _ = one(step, name)
    moved(step, release, after=meeting)


def decayed_early(step: StepGraph, name: str) -> None:
    """AdamW's decay follows from no gradient: a scheduler may think that it can come at any time."""
    *_, meeting, write = one(step, name)
    moved(step, write, before=meeting)


@pytest.mark.parametrize("fault", [released_late, decayed_early])
def test_a_program_in_a_wrong_order_is_refused_and_would_be_copied(fault: Callable[[StepGraph, str], None]) -> None:
    name = "layers.0.1.weight"
    step = rewritten(1, backend="shm")
    fault(step, name)
    with pytest.raises(VerifyError, match=r"rule .collectives.*as others read these rows in place"):
        verify(step, values=False)
    assert name not in {node.meta["param"] for node in gathers_in_place(step) if node is one(step, name)[0]}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda step: next(n for n in step.calls(c10d.all_gather) if rows_gathered(n) is None), "own rows"),
        (lambda step: next(iter(step.calls(c10d.reduce_scatter))), "own rows"),
    ],
    ids=["of_a_cast", "reduction"],
)
def test_what_is_no_gather_of_rows_at_rest_is_refused(make: Callable[[StepGraph], fx.Node], expected: str) -> None:
    step = rewritten(1, backend="shm", precision="bf16")
    make(step).meta["algorithm"] = c10d.SHARED_ROWS
    with pytest.raises(VerifyError, match=f"rule 'collectives'.*{expected}"):
        verify(step, values=False)


def test_a_parameter_without_a_meeting_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight.requires_grad_(False)
    step = step_of(model, torch.optim.SGD([model[1].weight], lr=0.1), torch.randn(4, 8))
    next(node for node in gathers(step) if node.meta["param"] == "0.weight").meta["algorithm"] = c10d.SHARED_ROWS
    with pytest.raises(VerifyError, match="whose update follows from a collective of all ranks"):
        verify(step, values=False)
