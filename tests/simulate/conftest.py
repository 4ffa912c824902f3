"""Programs of a rank of four, to be simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxzero.graph import StepGraph
from fxzero.plan import Plan
from fxzero.recipe import recipe

Rewritten = Callable[..., StepGraph]


_programs: dict[str, StepGraph] = {}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Blocks(nn.Module):
    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture
def rewritten(capture: Any) -> Rewritten:
    """`rewritten(depth, **plan)` is the program of a rank of four."""

    def run(depth: int, **keys: Any) -> StepGraph:
        name = f"{depth} {sorted(keys.items())}"
        if name not in _programs:
            _programs[name] = made(depth, keys)
        return _programs[name].copy()

    def made(depth: int, keys: dict[str, Any]) -> StepGraph:
        plan = Plan(**keys).resolve(4)
        model = Blocks(depth)
        step = capture(model, torch.optim.AdamW(model.parameters()), torch.randn(8, 32))
        step.mesh = dict(plan.axes)
        return recipe(plan, backend="nccl").run(step, check=False)

    return run
