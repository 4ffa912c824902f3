"""The state that an optimizer would make at its first step, made before it.

Optimizers create their state lazily, inside `step()`. A captured step needs it to exist, at its initial values. Each
parameter's state is made on a twin of the optimizer with a zero gradient, and every entry is kept as it was at the
moment when it was first stored.

[Note: constant state]
Most state starts full of one number, whatever the parameter holds. A step to find that out takes several times the
parameter's memory, which a model that only just fits does not have. So it is tried on tiny parameters of two values:
where state of the parameter's shape comes out constant, the same number each time, that is what the real one is filled
with. That the real one has this state, in these dtypes and shapes, is asked of the meta device.
"""

from __future__ import annotations

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


def initial_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: torch.Tensor) -> dict[str, Any]:
    """The state that `optimizer` would keep for a parameter with these values, before its first update.

    Args:
        optimizer: not changed.
        group: the parameter group that the parameter belongs to.
        tensor: its values (a shard will do, for state that follows the parameter's shape).
    """
    if not tensor.is_meta and tensor.dim() > 0:
        constants = _constant_state(optimizer, group, tensor)
        if constants is not None:
            return constants
    return _first_state(optimizer, group, tensor.detach())


def _constant_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: torch.Tensor
) -> dict[str, Any] | None:
    """The state of a parameter where it does not depend on the parameter's values; see [Note: constant state]."""
    meta = torch.empty_like(tensor, device="meta")
    tiny = torch.full((3,) * tensor.dim(), 0.5, dtype=tensor.dtype, device=tensor.device)
    try:
        expected = _first_state(optimizer, group, meta)
        one, other = (_first_state(optimizer, group, value) for value in (tiny, -2 * tiny))
    except Exception:  # an optimizer that reads values, or takes no parameter so small
        return None
    if not one.keys() == other.keys() == expected.keys():
        return None
    state: dict[str, Any] = {}
    for key, value in one.items():
        like = expected[key]
        if not isinstance(value, torch.Tensor):
            if value != other[key] or value != like:
                return None
            state[key] = value
        elif value.dim() == 0:
            if not torch.equal(value, other[key]) or (like.dtype, like.shape) != (value.dtype, value.shape):
                return None
            state[key] = value
        else:
            number = value.flatten()[0]
            same = bool((value == number).all()) and torch.equal(value, other[key])
            if not same or value.shape != tiny.shape or like.shape != tensor.shape or like.dtype != value.dtype:
                return None
            state[key] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=value.device)
            state[key].fill_(number.item())
    return state


def _first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: torch.Tensor) -> dict[str, Any]:
    table, _ = _one_step(optimizer, group, tensor.clone(), torch.zeros_like(tensor), None)
    return next(iter(table.values())).first if table else {}


def first_step_is_special(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether an optimizer's first step differs from a step on its initial state.

    SGD with dampening is one: its momentum starts as the undampened gradient. Tried on a tiny parameter.
    """
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 3, generator=generator)
    gradient = torch.randn(3, 3, generator=generator)
    state = initial_state(optimizer, group, value)
    _, plain = _one_step(optimizer, group, value.clone(), gradient.clone(), None)
    _, primed = _one_step(optimizer, group, value.clone(), gradient.clone(), state)
    return not torch.equal(plain, primed)


def check_state_can_be_sharded(optimizer: torch.optim.Optimizer, group: dict[str, Any], index: int) -> None:
    """State that is not shaped like its parameter stays whole, and is made without the parameter's whole values.

    Raises:
        CaptureError: if its initial value depends on those. Tried on a tiny parameter.
    """
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    one, other = (initial_state(optimizer, group, v) for v in (value, torch.zeros_like(value)))
    for key, item in one.items():
        if isinstance(item, torch.Tensor) and item.dim() and item.shape != value.shape:
            if not torch.equal(item, other[key]):
                raise CaptureError.of(
                    where=f"{type(optimizer).__name__}.param_groups[{index}], state {key!r}",
                    expected="state shaped like its parameter, or the same for all values of the parameter at first",
                    got=f"shape {tuple(item.shape)} for one of shape {tuple(value.shape)}, made from its values",
                    fix="use zero=0 for this optimizer",
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
