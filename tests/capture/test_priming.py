"""The state that an optimizer starts with: constant state is made without a step on the parameter, and is the same."""

from typing import Any

import pytest
import torch
from torch import nn

from fxzero.capture import priming
from tests.numerics.models import OPTIMIZERS, all_cases


def entries(state: dict[str, Any]) -> dict[str, Any]:
    """What must agree of each entry."""
    return {
        key: (value.dtype, value.shape, value.stride(), value.tolist()) if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_a_step_stores_first(name: str) -> None:
    optimizer = all_cases()[name].optimizer(all_cases()[name].model())
    for group in optimizer.param_groups:
        for parameter in (p.detach() for p in group["params"] if p.requires_grad):
            stored = priming._first_state(optimizer, group, parameter)
            assert entries(priming.initial_state(optimizer, group, parameter)) == entries(stored)


def test_constant_state_takes_no_step_on_the_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = priming._first_state, []
    monkeypatch.setattr(priming, "_first_state", lambda o, g, tensor: seen.append(tensor) or real(o, g, tensor))
    parameter = nn.Parameter(torch.randn(40, 50).t())
    optimizer = torch.optim.AdamW([parameter])
    state = priming.initial_state(optimizer, optimizer.param_groups[0], parameter.detach())
    assert state["exp_avg"].stride() == parameter.stride() and not state["exp_avg"].any()
    assert all(tensor.is_meta or tensor.numel() < 10 for tensor in seen)


class Remembers(torch.optim.SGD):
    """Keeps what the parameter held at first."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("first", parameter.detach().clone())
        super().step(closure)


class ByteSized(torch.optim.SGD):
    """Keeps its state in a dtype that depends on the parameter's size, as 8-bit optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                dtype = torch.uint8 if parameter.numel() >= 100 else torch.float32
                self.state[parameter].setdefault("moment", torch.zeros_like(parameter, dtype=dtype))
        super().step(closure)


@pytest.mark.parametrize("kind", [Remembers, ByteSized])
def test_state_that_follows_values_or_size_is_made_by_a_step(kind: Any) -> None:
    parameter = nn.Parameter(torch.randn(20, 30))
    optimizer = kind([parameter], lr=0.1)
    state = priming.initial_state(optimizer, optimizer.param_groups[0], parameter.detach())
    assert entries(state) == entries(priming._first_state(optimizer, optimizer.param_groups[0], parameter.detach()))
    if kind is Remembers:
        assert torch.equal(state["first"], parameter)
    else:
        assert state["moment"].dtype == torch.uint8
