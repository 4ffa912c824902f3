"""Updates block by block: bit-equal to whole ones for every optimizer, in less memory; what must not be cut is not."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fxzero
import fxzero.graph.blocked_runs as module
import fxzero.runtime.emitter as emitter_module
from fxzero.cost.hardware import Hardware
from fxzero.cost.memory import memory_timeline
from fxzero.cost.tasks import step_tasks
from fxzero.graph.blocked_runs import blocked_runs
from fxzero.graph.storage import InPlace
from tests.numerics.side_by_side import Values, first_difference, parameters

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adagrad": {},
    "Adadelta": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Rprop": {},
    "ASGD": {},
}
ROWS = 37  # 37 * 64 elements are 9 blocks and a part


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, ROWS)
        self.down = nn.Linear(ROWS, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.down(torch.tanh(self.up(x))) - x).square().mean()


def train(name: str, *, steps: int = 5, plan: dict[str, Any] | None = None) -> tuple[Values, fxzero.TrainStep]:
    torch.manual_seed(0)
    model = Net()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2, foreach=False, **OPTIMIZERS[name])
    step = fxzero.compile(model, optimizer, plan or {})
    losses = {f"loss {i}": step(torch.randn(4, 64, generator=torch.Generator().manual_seed(i))) for i in range(steps)}
    state = {f"{i} {k}": torch.as_tensor(v) for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    return losses | parameters(model) | state, step


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def runs(step: fxzero.TrainStep, device: str = "cpu") -> list[module.BlockedRun]:
    return blocked_runs(step.graph, InPlace(step.graph), device=device)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_change_no_bit(name: str, small: None) -> None:
    values, step = train(name)
    with mock.patch.object(module, "_FEWEST_BLOCKS", 10**9):
        whole, plain = train(name)
    assert first_difference(values, whole) == ""
    assert not runs(step) or "in in_blocks(" in step._last[-1].program.source
    assert "in_blocks(" not in plain._last[-1].program.source
    assert bool(runs(step)) is (name not in ("Rprop", "ASGD")), "these read what they make under several names"


def test_a_run_that_forgets_a_block_is_seen(small: None) -> None:
    with mock.patch.object(module, "_FEWEST_BLOCKS", 10**9):
        whole, _ = train("AdamW")
    real = emitter_module.in_blocks
    with mock.patch.object(emitter_module, "in_blocks", lambda *tensors: list(real(*tensors))[:-1]):
        assert first_difference(train("AdamW")[0], whole)


def test_what_is_in_between_takes_a_block(small: None) -> None:
    step = train("AdamW", steps=1)[1]
    (up, down) = runs(step)
    assert up.num_elements == down.num_elements == 64 * ROWS and up.num_blocks == 10
    taken = {node.meta["entry"].kind for node in up.taken if node.op == "placeholder"}
    assert taken == {"parameter", "optimizer"} and len(up.taken) == 4  # and the gradient
    at = step.graph.positions()[up.calls[-1]]
    blocked = memory_timeline(step.graph).total[at]
    with mock.patch.object(module, "_FEWEST_BLOCKS", 10**9):
        assert memory_timeline(step.graph).total[at] >= blocked + 4 * 64 * ROWS - 4 * 256


def test_many_calls_are_priced_as_many(small: None) -> None:
    step = train("AdamW", steps=1)[1].graph
    hardware = Hardware.load("cpu")
    run = blocked_runs(step, InPlace(step), device="cpu")[0]
    overhead_s = min(rate.overhead_s for rate in hardware.ops.values())
    assert all(step_tasks(step, hardware)[node].seconds >= run.num_blocks * overhead_s for node in run.calls)


def test_a_gpu_makes_its_own_calls_whole(small: None) -> None:
    assert not runs(train("AdamW", steps=1)[1], device="cuda")
    plan = {"offload_optimizer": "host", "update_on_host": 1.0, "offload_below": 0}
    values, there = train("AdamW", plan=plan)
    assert len(runs(there, device="cuda")) == 2  # what its host computes is blocked there
    assert first_difference(values, train("AdamW")[0]) == ""


def test_small_tensors_are_left_whole() -> None:
    assert not runs(train("AdamW", steps=1)[1])
