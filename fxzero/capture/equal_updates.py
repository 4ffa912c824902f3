"""Updates that no parameter shares with another are traced once for all parameters alike ([Note: equal calls])."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import optim

from fxzero import compat
from fxzero.capture.equal_calls import EqualCalls
from fxzero.capture.inventory import hyperparameters


@dataclass(frozen=True)
class Alone:
    """Why an optimizer may step its parameters one by one: its trace is then the same, node for node.

    Args:
        reason: what its source says.
        makes_state: it makes its state where it updates a parameter. Others make that of all parameters first, so that
            they are taken apart only where all have state.
        asks_groups: it asks something once for a group, not for each parameter. That leaves nothing in a graph but the
            number in the next name of its kind, so that it is taken apart only where no node follows the update.
    """

    reason: str
    makes_state: bool = False
    asks_groups: bool = False


_ONE_LOOP = "one loop over parameters, which reads of others nothing; hyperparameters are read as they are"
# Of torch's own ones not: LBFGS and SparseAdam, which are refused; Adafactor, which takes the first parameter's eps
# for all of a group, and asks for values of norms, so that it cannot be captured.
ALONE: dict[type[optim.Optimizer], Alone] = {
    optim.SGD: Alone("one loop, which makes the momentum too", makes_state=True, asks_groups=True),
    optim.Adam: Alone(_ONE_LOOP + "; only betas that are tensors are moved once for all"),
    optim.AdamW: Alone("Adam's step"),
    optim.NAdam: Alone(_ONE_LOOP),
    optim.RAdam: Alone(_ONE_LOOP),
    optim.Adamax: Alone(_ONE_LOOP),
    optim.Adagrad: Alone(_ONE_LOOP),
    optim.Adadelta: Alone(_ONE_LOOP),
    optim.RMSprop: Alone(_ONE_LOOP),
    optim.ASGD: Alone(_ONE_LOOP + "; eta and mu are state of each parameter"),
    optim.Rprop: Alone(_ONE_LOOP),
    optim.Muon: Alone("one loop; the matrix iteration has one gradient, the rate follows from its shape"),
}


def can_step_alone(optimizer: optim.Optimizer, original: optim.Optimizer, *, last: bool) -> bool:
    """Whether a traced optimizer may step its parameters one by one; see `Alone`.

    Args:
        optimizer: the stand-in, with traced parameters, gradients and state.
        original: the user's, in which methods may have been replaced.
        last: nothing is traced after the update.
    """
    known = ALONE.get(type(original))
    if known is None or not _is_as_torch_made_it(original) or compat.has_global_step_hooks():
        return False
    if known.asks_groups and not last:
        return False
    for group in optimizer.param_groups:
        if any(isinstance(value, torch.Tensor) for _, value in hyperparameters(group)):
            return False
        states = [optimizer.state.get(p, {}) for p in group["params"] if p.grad is not None]
        if not all(isinstance(value, torch.Tensor) for state in states for value in state.values()):
            return False
        if not known.makes_state and not all(states):
            return False
    return True


def step_alone(optimizer: optim.Optimizer, calls: EqualCalls) -> dict[torch.Tensor, torch.Tensor]:
    """Each parameter with a gradient is stepped; those alike after the first by copies of its nodes.

    Returns:
        Parameter -> its next value, which is the parameter itself where it was written in place. State is replaced
        in `optimizer.state`.
    """
    groups = optimizer.param_groups
    stepped: dict[torch.Tensor, torch.Tensor] = {}
    for index, group in enumerate(groups):
        common = [value for _, value in hyperparameters(group) if isinstance(value, (torch.SymFloat, torch.SymInt))]
        for parameter in (p for p in group["params"] if p.grad is not None):
            state = optimizer.state[parameter]
            optimizer.param_groups = [{**group, "params": [parameter]}]
            after = calls.call(
                functools.partial(_step, optimizer, parameter),
                [parameter, parameter.grad, *state.values()],
                kind=(index, *state),
                common=common,
            )
            stepped[parameter] = after.pop(None)
            state.update(after)
    optimizer.param_groups = groups
    return stepped


def _step(optimizer: optim.Optimizer, parameter: torch.Tensor) -> dict[Any, torch.Tensor]:
    type(optimizer).step(optimizer)  # type: ignore[call-arg]
    return {None: parameter, **optimizer.state[parameter]}


def _is_as_torch_made_it(optimizer: optim.Optimizer) -> bool:
    """Whether no method has been replaced, but for the wrapper that a scheduler puts around `step`."""
    kind = type(optimizer)
    shadowed = [name for name in vars(optimizer) if name != "step" and callable(getattr(kind, name, None))]
    steps = (kind.step, getattr(optimizer.step, "__func__", optimizer.step))
    return not shadowed and all(_module_of(f).startswith("torch.") for step in steps for f in _wrapped_by(step))


def _wrapped_by(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """A function and those that it wraps."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _module_of(function: Callable[..., Any]) -> str:
    """Where a function was written: `__module__` says where the one was that it wraps."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))
