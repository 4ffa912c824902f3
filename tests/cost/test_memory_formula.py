"""The peak as formulas: equal to direct predictions at sizes that they were not recovered from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from fxzero import Plan
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.symbolic import SymbolicStep
from fxzero.cost.memory import memory_profile
from fxzero.cost.memory_course import Course, Place, memory_course
from fxzero.cost.memory_formula import B, FormulaError, S, W, peak_formula
from fxzero.recipe import recipe


class Attention(nn.Module):
    """One head whose scores are a tensor of B x S x S."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(64, 8), nn.Linear(8, 24), nn.Linear(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.embed(x)).chunk(3, -1)
        return F.cross_entropy(self.head((q @ k.mT).softmax(-1) @ v).flatten(0, 1), x.flatten())


def setting() -> tuple[Inventory, bool]:
    model = Attention()
    return rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters())))


def rewritten(step: Any, world: int) -> Any:
    plan = Plan(zero=3).resolve(world)
    step.mesh = dict(plan.axes)
    return recipe(plan, backend="nccl").run(step)


def test_the_formula_is_the_peak_at_other_sizes() -> None:
    inventory, fresh = setting()
    symbolic = SymbolicStep(inventory, None, (torch.zeros(2, 128, dtype=torch.int64),), {}, fresh=fresh)

    def course_at(batch: int, sequence: int, world: int) -> Course:
        return memory_course([rewritten(symbolic.at(batch=batch, sequence=sequence), world)])

    formula = peak_formula(course_at, sequences=(128, 160, 200), check=(4, 300, 8))
    for batch, sequence, world in ((6, 256, 4), (2, 1000, 8)):
        tokens = torch.zeros(batch, sequence, dtype=torch.int64)
        direct = capture_step(inventory, None, (tokens,), {}, fresh=fresh).step
        assert formula.at(batch, sequence, world) == memory_profile(rewritten(direct, world)).peak_bytes
    (state,) = (formula.kinds[kind] for kind in formula.kinds if kind.startswith("optimizer"))
    assert state.coeff(W, -1) > 0 and state.coeff(B) == 0
    assert sympy.Poly(formula.peak * W, B, S, W).coeff_monomial(B * S**2 * W) % 4 == 0


def course(batch: int, sequence: int, world: int, *, moves_at: int = 10**9, bend: int = 0) -> Course:
    total = 100 + 4 * batch * sequence + 64 // world + bend * sequence**3
    place = Place(0, "forward", "", "mm" if sequence < moves_at else "add", 0)
    return Course(100, (place,), {"all": np.array([total])}, {}, {})


def test_a_formula_that_does_not_hold_is_refused() -> None:
    given: Any = {"sequences": (8, 16), "check": (5, 32, 8)}
    assert peak_formula(course, **given).peak == 100 + 4 * B * S + 64 / W
    with pytest.raises(FormulaError, match=r"expected the peak at mm .*, got one at add"):
        peak_formula(lambda *sizes: course(*sizes, moves_at=30), **given)
    with pytest.raises(FormulaError, match="all at batch=5, sequence=32, world=8: expected"):
        peak_formula(lambda *sizes: course(*sizes, bend=1), **given)
    with pytest.raises(FormulaError, match="expected two numbers of ranks"):
        peak_formula(course, sequences=(8, 16), check=(2, 8, 2))
