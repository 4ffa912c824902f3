"""Steps in one CUDA graph, where there is a GPU; tests/runtime/test_graphed_program.py has all but CUDA's own calls.

python -m pytest tests/gpu/test_cuda_graph.py
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.errors import LoweringError, PlanError
from fxzero.runtime.cuda_graph import CudaCalls
from tests.runtime.graph_stand_in import StandIn, StandInGraph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


class Net(nn.Module):
    """Two layers, a norm and dropout."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 8)
        self.drop = drop

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(F.gelu(self.norm(self.first(x))), self.drop, self.training)
        return F.cross_entropy(self.last(hidden), y)


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        x, y = torch.randn(32, 64, generator=generator), torch.randint(8, (32,), generator=generator)
        made.append((x.cuda(), y.cuda()))
    return made


def train(steps: int = 7, *, drop: float = 0.0, lr: float = 1e-2, **keys: Any) -> tuple[list[torch.Tensor], Any]:
    """Losses and parameters of some steps under a schedule, and the step."""
    torch.manual_seed(0)
    model = Net(drop).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    step = fxzero.compile(model, optimizer, fxzero.Plan(**keys))
    torch.manual_seed(1)
    losses = []
    for x, y in batches(steps):
        losses.append(step(x, y))
        scheduler.step()
    return [*losses, *(p.detach() for p in model.parameters())], step


class Launching(StandIn):
    """The device's part of each replay launched call by call, on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda")


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_replays_are_bit_equal_to_the_same_calls_one_by_one(lowering: str) -> None:
    graphed, step = train(cuda_graph=True, lowering=lowering)
    with mock.patch("fxzero.compile.graph_calls", lambda *_, **__: Launching()):
        one_by_one, other = train(cuda_graph=True, lowering=lowering)
    assert isinstance(other._last[-1].program._captured.graph, StandInGraph)
    assert all(map(torch.equal, graphed, one_by_one))
    assert "one CUDA graph, captured at call 2, 6 replays, pool " in step.report()


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_step_with_a_graph_is_near_the_one_without(lowering: str) -> None:
    """Products with numbers round once more ([Note: forms that round alike] in passes/hand_over_numbers.py)."""
    graphed, _ = train(cuda_graph=True, lowering=lowering)
    plain, _ = train(lowering=lowering)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(graphed, plain, strict=True))


def test_dropout_draws_anew_at_each_replay_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    model = Net(0.5).cuda()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), {"cuda_graph": True})
    ((x, y),) = batches(1)
    losses = [step(x, y).item() for _ in range(6)]
    assert len({*losses}) == 6
    torch.manual_seed(5)
    again = [step(x, y).item() for _ in range(2)]
    torch.manual_seed(5)
    assert again == [step(x, y).item() for _ in range(2)]


def test_the_host_never_waits_for_a_replay() -> None:
    _, step = train(3, cuda_graph=True)
    given = batches(4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in given:
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shapes_share_a_pool_and_moved_state_is_captured_again() -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = fxzero.compile(model, optimizer, {"cuda_graph": True})
    found = []
    for index, (x, y) in enumerate(batches(12)):
        rows = 32 if index % 2 else 16
        if index == 8:
            optimizer.load_state_dict(optimizer.state_dict())
        found.append(step(x[:rows].contiguous(), y[:rows]))
    torch.manual_seed(0)
    model = Net().cuda()
    plain = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2), {})
    for index, (x, y) in enumerate(batches(12)):
        rows = 32 if index % 2 else 16
        assert torch.allclose(plain(x[:rows].contiguous(), y[:rows]), found[index], rtol=1e-4)


def test_a_call_that_waits_for_the_device_is_named() -> None:
    class Waiting(torch.autograd.Function):
        """Looks at a value, behind what a trace can see."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.fxzero_tests.look(x)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    library = torch.library.Library("fxzero_tests", "FRAGMENT")
    library.define("look(Tensor x) -> Tensor")
    library.impl("look", lambda x: x * float(x.sum().item() > -1e9), "CUDA")
    torch.library.register_fake("fxzero_tests::look", lambda x: torch.empty_like(x), lib=library)

    class Looking(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(Waiting.apply(x), y)

    model = Looking().cuda()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), {"cuda_graph": True})
    ((x, y),) = batches(1)
    step(x, y)
    with pytest.raises(LoweringError, match=r"CUDA graph, %look.*expected calls that can be captured"):
        step(x, y)
    assert torch.ones(1).cuda().sum().item() == 1, "the device is usable still"


def test_a_batch_of_the_host_is_named() -> None:
    class Moving(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x.cuda(), y)

    model = Moving().cuda()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), {"cuda_graph": True})
    ((x, y),) = batches(1)
    with pytest.raises(PlanError, match=r"Plan.cuda_graph, %.*expected tensors on cuda, got %args_0 on cpu"):
        step(x.cpu(), y)


def test_graphs_of_a_pool_that_has_ended_begin_another() -> None:
    calls = CudaCalls(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    for number in range(3):
        captured = calls.capture(lambda: (x * 2,))
        captured.replay()
        assert captured.values[0].tolist() == [2.0] * 4 and calls.pool_bytes() > 0, number
        del captured
    assert calls.pool_bytes() == 0
