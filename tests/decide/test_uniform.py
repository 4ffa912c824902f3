"""One answer for all copies of a block: the decision at a depth follows from those at two others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.decide.decision import Decision
from fxzero.decide.uniform import UniformAnswers, decision_at
from fxzero.plan import Plan


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(16, 16), nn.Sequential(*(Block() for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.first(x))


def answers(depth: int, *, nested: bool = False) -> UniformAnswers:
    model: nn.Module = nn.Sequential(nn.Tanh(), Tower(depth)) if nested else Tower(depth)
    inventory, fresh = rehearse(Inventory.of(model, torch.optim.SGD(model.parameters(), lr=0.1)))

    def loss(model: nn.Module, x: torch.Tensor) -> Any:
        return model(x).square().mean()

    step = capture_step(inventory, loss, (torch.randn(8, 16),), {}, fresh=fresh).step
    plan = Plan(recompute="auto", memory_budget=1).resolve(1)
    step.mesh = dict(plan.axes)
    return UniformAnswers(step, plan)


def compare(found: Decision, direct: Decision) -> None:
    assert [(g.where, g.blocks, g.copies, g.saved_bytes) for g in found.groups] == [
        (g.where, g.blocks, g.copies, g.saved_bytes) for g in direct.groups
    ]
    assert found.seconds == pytest.approx(direct.seconds) and found.step_seconds == pytest.approx(direct.step_seconds)


def test_a_decision_is_on_the_line_through_two_others() -> None:
    two, four, seven = answers(2), answers(4), answers(7)
    assert two.count == four.count == seven.count > 1 and two.frontiers == four.frontiers == seven.frontiers
    last = two.count - 1
    direct = seven.decision(last, budget_bytes=1)
    assert direct.groups and direct.groups[0].blocks == 7 and len(seven.names(last)) > len(four.names(last))
    compare(decision_at(7, {d: a.decision(last, budget_bytes=1) for d, a in ((2, two), (4, four))}), direct)
    with pytest.raises(AssertionError):  # of another depth
        compare(decision_at(6, {d: a.decision(last, budget_bytes=1) for d, a in ((2, two), (4, four))}), direct)


def test_where_the_block_is_the_whole_tower_answers_are_not_those_of_another_depth() -> None:
    assert answers(2, nested=True).frontiers != answers(3, nested=True).frontiers


def test_the_first_answer_changes_nothing() -> None:
    found = answers(2)
    assert found.names(0) == () and found.decision(0, budget_bytes=1).groups == ()
