"""Which parameters are those of experts: by who reads them, not by name."""

import pytest
import torch
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED, shard
from fxzero.sharding.expert_parameters import experts_over
from fxzero.sharding.hints import pin
from tests.hf.models import CASES
from tests.sharding.capacity_model import CapacityModel, batch


class Images(nn.Module):
    """Parameters of many dims that are no experts', and a stack that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.place = nn.Conv2d(3, 4, 2), nn.Parameter(torch.zeros(4, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x) + self.place).square().mean()


def captured(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> StepGraph:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = capture_step(rehearse(Inventory.of(model, optimizer))[0], None, args, kwargs).step
    step.mesh = {"dp": 1, "ep": 2}
    return step


def test_stacks_that_batched_and_grouped_products_take() -> None:
    capacity = captured(CapacityModel(), **batch(torch.Generator().manual_seed(0)))
    names = [f"layers.{layer}.{name}" for layer in range(2) for name in ("up", "down")]
    assert experts_over(capacity, "ep") == dict.fromkeys(names, shard(0))
    pytest.importorskip("transformers")
    case = CASES["mixtral"]
    mixtral = captured(case.model(), **case.batch(torch.Generator().manual_seed(0)))
    names = [f"model.layers.{layer}.mlp.experts.{name}_proj" for layer in range(2) for name in ("gate_up", "down")]
    assert experts_over(mixtral, "ep") == dict.fromkeys(names, shard(0))


def test_what_is_pinned_stays_so() -> None:
    step = captured(CapacityModel(), **batch(torch.Generator().manual_seed(0)))
    pin(step, {"layers.0.up": REPLICATED}, axis="ep")
    assert experts_over(step, "ep")["layers.0.up"] == REPLICATED


def test_a_model_without_experts_is_sent_to_sp() -> None:
    step = captured(Images(), torch.randn(2, 3, 4, 4))
    with pytest.raises(PlanError, match=r"a model with experts: .*, got none among 3 parameters; .*mesh=\{'sp': 2\}"):
        experts_over(step, "ep")
