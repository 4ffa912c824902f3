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
    states = priming.InitialStates(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for parameter in (p.detach() for p in group["params"] if p.requires_grad):
            stored = priming._first_state(optimizer, group, parameter)
            assert entries(states.of(index, parameter)) == entries(stored)


def test_constant_state_takes_no_step_on_the_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = priming._first_state, []
    monkeypatch.setattr(priming, "_first_state", lambda o, g, tensor: seen.append(tensor) or real(o, g, tensor))
    parameter = nn.Parameter(torch.randn(40, 50).t())
    optimizer = torch.optim.AdamW([parameter])
    state = priming.InitialStates(optimizer).of(0, parameter.detach())
    assert state["exp_avg"].stride() == parameter.stride() and not state["exp_avg"].any()
    assert all(tensor.is_meta or tensor.numel() < 10 for tensor in seen)


def test_parameters_that_are_alike_are_tried_once_and_share_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = priming._first_state, []
    monkeypatch.setattr(priming, "_first_state", lambda o, g, tensor: seen.append(tensor) or real(o, g, tensor))
    alike = [nn.Parameter(torch.randn(4, 5)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": alike}, {"params": [nn.Parameter(torch.randn(4, 5).bfloat16())]}])
    states = priming.InitialStates(optimizer)
    made = [states.of(0, parameter.detach()) for parameter in alike]
    assert len(seen) == 3  # on the meta device, and tiny ones of two values
    states.of(1, optimizer.param_groups[1]["params"][0].detach())
    states.of(0, torch.randn(5, 4))
    assert len(seen) == 3 + 3 + 1  # another dtype, in another group; a shape of as many dims is asked of meta alone
    memory = [value.data_ptr() for state in made for value in state.values()]
    assert len(set(memory)) == len(memory) == 9
    on_meta = [states.of(0, parameter.detach().to("meta")) for parameter in alike]
    assert len({id(value) for state in on_meta for value in state.values()}) == 9


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_groups_with_other_state_are_told_apart(device: str) -> None:
    one, other = (nn.Parameter(torch.randn(4, 5)) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [one]}, {"params": [other], "amsgrad": True}])
    states = priming.InitialStates(optimizer)
    keys = [set(states.of(index, torch.randn(4, 5).to(device))) for index in (0, 1)]
    assert keys[1] - keys[0] == {"max_exp_avg_sq"}


class KeepsLists(torch.optim.SGD):
    """Keeps a Python object that its steps change."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("losses", [])
        super().step(closure)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_objects_in_the_state_belong_to_one_parameter(device: str) -> None:
    optimizer = KeepsLists([nn.Parameter(torch.randn(4, 5))], lr=0.1)
    states = priming.InitialStates(optimizer)
    one, other = (states.of(0, torch.randn(4, 5).to(device))["losses"] for _ in range(2))
    assert one == other == [] and one is not other


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
    state = priming.InitialStates(optimizer).of(0, parameter.detach())
    assert entries(state) == entries(priming._first_state(optimizer, optimizer.param_groups[0], parameter.detach()))
    if kind is Remembers:
        assert torch.equal(state["first"], parameter)
    else:
        assert state["moment"].dtype == torch.uint8
