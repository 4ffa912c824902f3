"""What DTensor's own rules say of a call; nothing runs, and there need be no process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxzero import compat_sharding
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.strategy import Call, Strategy, Tensor, fits


def by_dtensor(call: Call) -> Iterator[Strategy]:
    """The ways that DTensor knows, on equal parts; none where it has no rule."""
    if not compat_sharding.knows(call.target):
        return
    args, kwargs = _on_meta(call.args), _on_meta(call.kwargs)
    outputs = len(call.outputs)
    for row in sorted(compat_sharding.ways(call.target, args, kwargs, ranks=call.ranks), key=str):
        found = [None if lies is None else _placement(lies) for lies in row]
        if len(found) == 1 + len(call.tensors) and outputs > 1:  # one says for all outputs how they lie
            found = [found[0]] * outputs + found[1:]
        if len(found) != outputs + len(call.tensors):
            continue
        inputs = tuple(REPLICATED if placement is None else placement for placement in found[outputs:])
        yields = tuple(
            None if tensor is None else placement or REPLICATED
            for tensor, placement in zip(call.outputs, found[:outputs], strict=True)
        )
        strategy = Strategy(inputs, yields)
        if _counts_right(call, strategy) and fits(call, strategy):
            yield strategy


def _counts_right(call: Call, strategy: Strategy) -> bool:
    """Whether each split dim is there."""
    placed = [*zip(call.tensors, strategy.inputs, strict=True), *zip(call.outputs, strategy.outputs, strict=True)]
    return all(
        tensor is None or placement is None or not placement.is_shard or placement.dim < len(tensor.shape)
        for tensor, placement in placed
    )


def _placement(lies: tuple[str, Any]) -> Placement:
    kind, what = lies
    if kind == "S":
        return shard(what)
    return partial(what) if kind == "P" else REPLICATED


def _on_meta(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return torch.empty_strided(arg.shape, arg.strides, dtype=arg.dtype, device="meta")
    if isinstance(arg, (list, tuple)):
        return type(arg)(_on_meta(item) for item in arg)
    return {key: _on_meta(item) for key, item in arg.items()} if isinstance(arg, dict) else arg
