"""What DTensor's own rules say of a call; nothing runs, and there need be no process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxzero import compat_sharding
from fxzero.graph.axis_placement import REPLICATED, Placement, local_shape, partial, shard
from fxzero.sharding.dtensor_mistakes import is_mistake
from fxzero.sharding.local_arguments import with_local_sizes
from fxzero.sharding.strategy import Call, Strategy, Tensor, fits


def by_dtensor(call: Call) -> Iterator[Strategy]:
    """The ways that DTensor knows, on equal parts; none where it has no rule.

    A way is left out where the op does not yield the parts that it names, or is known to yield others.
    """
    if not compat_sharding.knows(call.target):
        return
    whole = _on_meta(call, (REPLICATED,) * len(call.tensors))
    for row in sorted(compat_sharding.ways(call.target, *whole, ranks=call.ranks), key=str):
        strategy = _strategy(call, row)
        if strategy is None or not _splits_what_is_there(call, strategy) or not fits(call, strategy):
            continue
        if not is_mistake(call, strategy) and _yields_these_parts(call, strategy):
            yield strategy


def _strategy(call: Call, row: tuple[compat_sharding.Lies | None, ...]) -> Strategy | None:
    outputs = len(call.outputs)
    found = [None if lies is None else _placement(lies) for lies in row]
    if len(found) == 1 + len(call.tensors) and outputs > 1:  # one says for all outputs how they lie
        found = [found[0]] * outputs + found[1:]
    if len(found) != outputs + len(call.tensors):
        return None
    inputs = tuple(REPLICATED if placement is None else placement for placement in found[outputs:])
    yields = tuple(
        None if tensor is None else placement or REPLICATED
        for tensor, placement in zip(call.outputs, found[:outputs], strict=True)
    )
    return Strategy(inputs, yields)


def _splits_what_is_there(call: Call, strategy: Strategy) -> bool:
    """Whether each split dim is one of its tensor's."""
    placed = [*zip(call.tensors, strategy.inputs, strict=True), *zip(call.outputs, strategy.outputs, strict=True)]
    return all(
        tensor is None or placement is None or not placement.is_shard or 0 <= placement.dim < len(tensor.shape)
        for tensor, placement in placed
    )


def _yields_these_parts(call: Call, strategy: Strategy) -> bool:
    """Whether the op makes tensors of the shapes that parts have from parts: it is asked on the meta device."""
    if not any(p is not None and p.is_shard for p in (*strategy.inputs, *strategy.outputs)):
        return True
    args, kwargs = _on_meta(call, strategy.inputs)
    expected = [
        None if tensor is None or placement is None else local_shape(tensor.shape, placement, call.ranks)
        for tensor, placement in zip(call.outputs, strategy.outputs, strict=True)
    ]
    if expected[0] is not None:
        args = with_local_sizes(call.target, args, expected[0])
    try:
        found = call.target(*args, **kwargs)
    except Exception:  # it cannot take parts, whatever it says of them
        return False
    values = found if isinstance(found, (list, tuple)) else [found]
    shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in values]
    return shapes == expected


def _placement(lies: compat_sharding.Lies) -> Placement:
    kind, what = lies
    if kind == "S":
        return shard(what)
    return partial(what) if kind == "P" else REPLICATED


def _on_meta(call: Call, placements: tuple[Placement, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with tensors on the meta device for what a rank has; what is whole has its strides."""
    lie = iter(placements)

    def made(tensor: Tensor) -> torch.Tensor:
        placement = next(lie)
        if placement.is_shard:
            return torch.empty(local_shape(tensor.shape, placement, call.ranks), dtype=tensor.dtype, device="meta")
        return torch.empty_strided(tensor.shape, tensor.strides, dtype=tensor.dtype, device="meta")

    args, kwargs = tuple(_mapped(arg, made) for arg in call.args), _mapped(call.kwargs, made)
    if isinstance(kwargs.get("device"), torch.device):  # what has no data cannot be copied to a device that has
        kwargs["device"] = torch.device("meta")
    return args, kwargs


def _mapped(arg: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(arg, Tensor):
        return change(arg)
    if isinstance(arg, torch.device):
        return torch.device("meta")
    if isinstance(arg, (list, tuple)):
        return type(arg)(_mapped(item, change) for item in arg)
    return {name: _mapped(item, change) for name, item in arg.items()} if isinstance(arg, dict) else arg
