"""Private names of DTensor: what its own rules say of one op on one mesh axis.

Tried with torch 2.13; the registries that are asked are there since 2.10.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

# (name of a placement's kind, its dim or reduction)
Lies = tuple[str, Any]


def knows(op: Any) -> bool:
    """Whether DTensor has a rule for an op."""
    asked = _propagator()
    return op in asked.op_single_dim_strategy_funcs or op in asked.op_strategy_funcs


def ways(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, ranks: int) -> set[tuple[Lies | None, ...]]:
    """How DTensor would let an op run on parts: outputs, then inputs, each ("R", 0), ("S", dim) or ("P", "sum").

    Args:
        op: an overload.
        args, kwargs: of a call; meta tensors where it takes tensors.
        ranks: of the axis.

    Returns:
        Nothing where its rule fails on the call, or says what cannot be read.
    """
    asked = _propagator()
    if op in asked.op_single_dim_strategy_funcs:
        return set(_by_single_dim(asked.op_single_dim_strategy_funcs[op], op, args, kwargs))
    return set(_by_strategy(asked.op_strategy_funcs[op], op, args, kwargs, ranks))


def _propagator() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor._op_dispatcher.sharding_propagator


@functools.cache
def _mesh(ranks: int) -> DeviceMesh:
    """An axis of so many ranks, without any process group."""
    return DeviceMesh("cpu", torch.arange(ranks), _init_backend=False, _rank=0)


def _meta(tensor: torch.Tensor) -> Any:
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    return TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)


def _by_single_dim(info: Any, op: Any, args: Any, kwargs: Any) -> list[tuple[Lies | None, ...]]:
    func = getattr(info, "func", info)
    try:
        rows = [tuple(map(_lies, row)) for row in func(op, _mapped(args, _meta), _mapped(kwargs, _meta))]
    except Exception:  # a rule that cannot answer for this call: every rank does all of it
        return []
    return [row for row in rows if _is_of_use(row)]


def _by_strategy(func: Any, op: Any, args: Any, kwargs: Any, ranks: int) -> Iterator[tuple[Lies | None, ...]]:
    """Ask once for each way in which one input, or all of them alike, could lie; others are whole on each rank."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors = list(_leaves((*args, *kwargs.values())))
    most = max((tensor.dim() for tensor in tensors), default=0)
    rows: list[tuple[Any, ...]] = [tuple(Replicate() for _ in tensors)]
    for placement in (*(Shard(dim) for dim in range(most)), Partial()):
        alike = tuple(placement if _may(placement, tensor, ranks) else Replicate() for tensor in tensors)
        rows.append(alike)
        for index, tensor in enumerate(tensors):
            if _may(placement, tensor, ranks):
                rows.append(tuple(placement if i == index else Replicate() for i in range(len(tensors))))
    for row in dict.fromkeys(rows):
        yield from _asked(func, op, args, kwargs, ranks, row)


def _may(placement: Any, tensor: torch.Tensor, ranks: int) -> bool:
    if not placement.is_shard():
        return tensor.is_floating_point()
    return placement.dim < tensor.dim() and tensor.shape[placement.dim] % ranks == 0


def _asked(
    func: Any, op: Any, args: Any, kwargs: Any, ranks: int, row: tuple[Any, ...]
) -> list[tuple[Lies | None, ...]]:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, TupleStrategy

    lie, mesh = iter(row), _mesh(ranks)

    def strategy(tensor: torch.Tensor) -> Any:
        return OpStrategy([OpSpec(DTensorSpec(mesh, (next(lie),), tensor_meta=_meta(tensor)))])

    def wrapped(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in arg):
            return TupleStrategy([strategy(item) if isinstance(item, torch.Tensor) else item for item in arg])
        return strategy(arg) if isinstance(arg, torch.Tensor) else arg

    asked = _propagator()
    schema_args = tuple(wrapped(arg) for arg in args)
    schema_kwargs = {name: wrapped(arg) for name, arg in kwargs.items()}
    try:
        schema = OpSchema(op, schema_args, schema_kwargs, asked.op_to_schema_info.get(op))
        rows = list(_told(func(schema), sum(1 for _ in _leaves((*args, *kwargs.values())))))
    except Exception:  # a rule that cannot answer for this row may for others; what none answers is replicated
        return []
    return [row for row in rows if _is_of_use(row)]


def _told(found: Any, num: int) -> Iterator[tuple[Lies | None, ...]]:
    """What a rule has said for a call that takes so many tensors."""
    from torch.distributed.tensor._op_schema import OpStrategy

    for spec in found.strategies if isinstance(found, OpStrategy) else ():
        outputs = spec.output_specs if isinstance(spec.output_specs, (tuple, list)) else (spec.output_specs,)
        inputs = spec.input_specs if spec.input_specs is not None else itertools.repeat(outputs[0], num)
        yield tuple(None if one is None else _lies(one.placements[0]) for one in (*outputs, *inputs))


def _is_of_use(row: tuple[Lies | None, ...]) -> bool:
    return "?" not in [lies[0] for lies in row if lies is not None]


def _lies(placement: Any) -> Lies | None:
    """A placement of DTensor by name; "?" for what is of no use here."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if placement is None:
        return None
    if type(placement) is Shard or type(placement).__name__ == "_ShardingPlaceholder":
        return ("S", placement.dim)
    if type(placement) is Replicate:
        return ("R", 0)
    if type(placement) is Partial and placement.reduce_op == "sum":
        return ("P", "sum")
    return ("?", 0)


def _mapped(arg: Any, change: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return change(arg)
    if isinstance(arg, (list, tuple)):
        return type(arg)(_mapped(item, change) for item in arg)
    return {key: _mapped(item, change) for key, item in arg.items()} if isinstance(arg, dict) else arg


def _leaves(arg: Iterable[Any]) -> Iterator[torch.Tensor]:
    for item in arg:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _leaves(item)
