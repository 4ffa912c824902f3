"""The state that an optimizer would make at its first step, made before it.

Optimizers create their state lazily, inside `step()`. A captured step needs it to exist, at its initial values. Each
parameter's state is made on a twin of the optimizer with a zero gradient, and every entry is kept as it was at the
moment when it was first stored.

[Note: constant state]
Most state starts full of one number, whatever the parameter holds. A step to find that out takes several times the
parameter's memory, which a model that only just fits does not have. So it is tried on tiny parameters of two values:
where state of the parameter's shape comes out constant, the same number each time, that is what the real one is filled
with. That the real one has this state, in these dtypes and shapes, is asked of the meta device. Both questions are
about a group, a dtype and a shape (or only its number of dims): they are asked once for all parameters alike in these,
unless the state holds objects, which may change and which no two parameters may share.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from fxzero import compat
from fxzero.capture.twin import clone_optimizer, for_loop_form, is_capturable
from fxzero.errors import CaptureError


class _Recording(dict[str, Any]):
    """A state dict that remembers the first value of every key."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.first.setdefault(key, value.detach().clone() if isinstance(value, torch.Tensor) else value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class _Table(dict[Any, _Recording]):
    """`optimizer.state` of a twin."""

    def __missing__(self, key: Any) -> _Recording:
        self[key] = _Recording()
        return self[key]


class InitialStates:
    """The states that an optimizer would start with, each kind of parameter tried once.

    Args:
        optimizer: not changed; its hyperparameters must stay as they are while this is in use.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._tried: dict[Hashable, dict[str, Any] | None] = {}

    def of(self, group: int, tensor: torch.Tensor) -> dict[str, Any]:
        """The state that the optimizer would keep for a parameter with these values, before its first update.

        Args:
            group: index of the parameter group that the parameter belongs to.
            tensor: its values (a shard will do, for state that follows the parameter's shape).

        Returns:
            Key -> value, which belongs to this parameter alone.
        """
        if tensor.is_meta:
            return {key: _own(value) for key, value in self._on_meta(group, tensor).items()}
        if tensor.dim() > 0:
            constants = self._constant(group, tensor)
            if constants is not None:
                return constants
        return self._first(group, tensor.detach())

    def _first(self, group: int, tensor: torch.Tensor) -> dict[str, Any]:
        return _first_state(self.optimizer, self.optimizer.param_groups[group], tensor)

    def _constant(self, group: int, tensor: torch.Tensor) -> dict[str, Any] | None:
        """The state of a parameter where it does not depend on the parameter's values; see [Note: constant state]."""
        try:
            expected, tiny = self._on_meta(group, tensor), self._on_tiny(group, tensor)
        except Exception:  # an optimizer that reads values, or takes no parameter so small
            return None
        if tiny is None or tiny.keys() != expected.keys():
            return None
        state: dict[str, Any] = {}
        for key, value in tiny.items():
            like = expected[key]
            if not isinstance(value, torch.Tensor):
                if value != like:
                    return None
                state[key] = value
                continue
            if (like.dtype, like.shape) != (value.dtype, tensor.shape if value.dim() else value.shape):
                return None
            if not value.dim():
                state[key] = value.clone()
                continue
            state[key] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=value.device)
            state[key].fill_(value.flatten()[0].item())
        return state

    def _on_meta(self, group: int, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter like this one on the meta device."""
        kind = (group, "meta", tensor.dtype, tensor.shape, tensor.stride())
        found = self._tried.get(kind)
        if found is None:
            found = self._first(group, torch.empty_like(tensor, device="meta"))
            if not _holds_objects(found):
                self._tried[kind] = found
        return found

    def _on_tiny(self, group: int, tensor: torch.Tensor) -> dict[str, Any] | None:
        """The state of tiny parameters of two values; None where it is not the same, or an entry not of one number."""
        kind = (group, "tiny", tensor.dtype, tensor.dim(), tensor.device)
        if kind in self._tried:
            return self._tried[kind]
        tiny = torch.full((3,) * tensor.dim(), 0.5, dtype=tensor.dtype, device=tensor.device)
        one, other = (self._first(group, value) for value in (tiny, -2 * tiny))
        constant = one.keys() == other.keys() and all(_is_constant(v, other[k], tiny.shape) for k, v in one.items())
        found = one if constant else None
        if not _holds_objects(one):
            self._tried[kind] = found
        return found


def _holds_objects(state: dict[str, Any]) -> bool:
    """Whether a state holds what is neither a tensor nor a number, nor a text, nor None."""
    return not all(
        value is None or isinstance(value, (torch.Tensor, bool, int, float, str)) for value in state.values()
    )


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_constant(one: Any, other: Any, shape: torch.Size) -> bool:
    """Whether entries made from two values of a parameter are the same scalar, or full of the same number.

    Args:
        one, other: the entries.
        shape: of the parameter, which an entry that is no scalar must have.
    """
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if one.dim() == 0:
        return torch.equal(one, other)
    return one.shape == shape and bool((one == one.flatten()[0]).all()) and torch.equal(one, other)


def _first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: torch.Tensor) -> dict[str, Any]:
    table, _ = _one_step(optimizer, group, tensor.clone(), torch.zeros_like(tensor), None)
    return next(iter(table.values())).first if table else {}


def first_step_is_special(states: InitialStates, index: int) -> bool:
    """Whether an optimizer's first step differs from a step on its initial state.

    SGD with dampening is one: its momentum starts as the undampened gradient. Tried on a tiny parameter.

    Args:
        states: of the optimizer.
        index: of the parameter group.
    """
    optimizer = states.optimizer
    group = optimizer.param_groups[index]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 3, generator=generator)
    gradient = torch.randn(3, 3, generator=generator)
    state = states.of(index, value)
    _, plain = _one_step(optimizer, group, value.clone(), gradient.clone(), None)
    _, primed = _one_step(optimizer, group, value.clone(), gradient.clone(), state)
    return not torch.equal(plain, primed)


def check_state_can_be_sharded(states: InitialStates, index: int) -> None:
    """State that is not shaped like its parameter stays whole, and is made without the parameter's whole values.

    Args:
        states: of the optimizer.
        index: of the parameter group.

    Raises:
        CaptureError: if its initial value depends on those. Tried on a tiny parameter.
    """
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    one, other = (states.of(index, v) for v in (value, torch.zeros_like(value)))
    for key, item in one.items():
        if isinstance(item, torch.Tensor) and item.dim() and item.shape != value.shape:
            if not torch.equal(item, other[key]):
                raise CaptureError.of(
                    where=f"{type(states.optimizer).__name__}.param_groups[{index}], state {key!r}",
                    expected="state shaped like its parameter, or the same for all values of the parameter at first",
                    got=f"shape {tuple(item.shape)} for one of shape {tuple(value.shape)}, made from its values",
                    fix="use zero=0 and no tp for this optimizer",
                )


def _one_step(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    value: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, Any] | None,
) -> tuple[_Table, torch.Tensor]:
    twin = clone_optimizer(optimizer)
    parameter = torch.nn.Parameter(value)
    parameter.grad = gradient
    twin.param_groups = [{**group, "params": [parameter]}]
    for_loop_form(twin)
    table = _Table()
    if state is not None:
        for key, item in state.items():
            table[parameter][key] = item.clone() if isinstance(item, torch.Tensor) else item
    twin.state = table  # type: ignore[assignment]
    with torch.random.fork_rng(enabled=True), compat.compiling(is_capturable(group)):
        type(twin).step(twin)  # type: ignore[call-arg]
    return table, parameter.detach()
