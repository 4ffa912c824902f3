"""Small steps that schedules are tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.options import CaptureOptions
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import Hardware
from fxzero.cost.tasks import Task, step_tasks
from fxzero.recipe import captured_as, recipe
from fxzero.schedule.problem import Problem


class Blocks(nn.Module):
    """Dropout in each block, so that random calls must keep their order; a tied pair of parameters."""

    def __init__(self, depth: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + F.dropout(layer(x), 0.1)
        return F.cross_entropy(self.head(x), targets)


def job(depth: int = 3) -> tuple[nn.Module, torch.optim.Optimizer, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Blocks(depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, (torch.randint(16, (6,)), torch.randint(16, (6,)))


def captured(depth: int = 3, *, world: int = 4) -> StepGraph:
    model, optimizer, batch = job(depth)
    step = capture_step(rehearse(Inventory.of(model, optimizer))[0], None, batch, {}).step
    step.mesh = {"dp": world}
    return step


def rewritten(depth: int = 3, **keys: Any) -> StepGraph:
    """A copy of a program, verified after each pass when it was first asked for; keys as of `rewritten_anew`."""
    name = f"{depth} {sorted(keys.items())}"
    if name not in _rewritten:
        _rewritten[name] = _rewritten_from(_captured_once, depth, **keys)
    return _rewritten[name].copy()


_rewritten: dict[str, StepGraph] = {}
_captured: dict[str, StepGraph] = {}


def rewritten_anew(depth: int = 3, *, world: int = 4, backend: str = "nccl", **keys: Any) -> StepGraph:
    return _rewritten_from(_captured_anew, depth, world=world, backend=backend, **keys)


def _rewritten_from(
    capture: Callable[[int, CaptureOptions], StepGraph],
    depth: int,
    *,
    world: int = 4,
    backend: str = "nccl",
    **keys: Any,
) -> StepGraph:
    plan = Plan(**{"bucket_bytes": 1024, **keys}).resolve(world)
    step = capture(depth, captured_as(plan))
    step.mesh = dict(plan.axes)
    return recipe(plan, backend=backend).run(step)


def _captured_once(depth: int, options: CaptureOptions) -> StepGraph:
    name = f"{depth} {options}"
    if name not in _captured:
        _captured[name] = _captured_anew(depth, options)
    return _captured[name].copy()


def _captured_anew(depth: int, options: CaptureOptions) -> StepGraph:
    model, optimizer, batch = job(depth)
    return capture_step(rehearse(Inventory.of(model, optimizer))[0], None, batch, {}, options=options).step


def tasks_of(step: StepGraph, hardware: str = "h100") -> dict[fx.Node, Task]:
    return step_tasks(step, Hardware.load(hardware))


def problem_of(step: StepGraph, hardware: str = "h100") -> Problem:
    machine = Hardware.load(hardware)
    return Problem.of(step, tasks_of(step, hardware), slowdown=machine.slowdown, hindrance=machine.hindrance)
