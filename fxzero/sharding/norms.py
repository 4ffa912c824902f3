"""Norms of what is split: each rank's own, which still have to be added up."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from fxzero.graph import ops
from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.reductions import reduced_dims
from fxzero.sharding.strategy import Call, Local, Strategy, fits, replicated

# order of a norm -> what ranks' norms have to be reduced by
_REDUCTIONS = {2.0: "norm2", math.inf: "max", 1.0: "sum"}


def vector_norm(call: Call) -> Iterator[Strategy]:
    """The ways of `linalg_vector_norm`: parts along its dims have norms whose norm it is.

    A whole norm may be one that is still to be made: that of rank 0, where others have 0. No conversion says so, since
    it would lose the sign of what is no norm.
    """
    yield replicated(call)
    tensor, order = call.tensors[0], float(call.argument("ord", 2.0))
    reduced, keeps = reduced_dims(call, tensor), call.argument("keepdim", False)
    still = partial(_REDUCTIONS.get(order, "sum"))
    if order == 2.0:
        yield Strategy((REPLICATED,), (still,), _on_first_rank)
    if order in (2.0, math.inf):  # partial sums are not of one sign
        yield Strategy((still,), (still,))
    for dim in range(len(tensor.shape)):
        kept = dim if keeps else dim - sum(other < dim for other in reduced)
        if dim in reduced and order not in _REDUCTIONS:
            continue
        strategy = Strategy((shard(dim),), (still if dim in reduced else shard(kept),), share=1 / call.ranks)
        if fits(call, strategy):
            yield strategy


def _on_first_rank(local: Local) -> tuple[fx.Node | None, ...]:
    norm = local.editor.call(local.call.target, *local.args, **local.kwargs)
    return (local.editor.call(ops.on_rank, norm, 0, local.coordinate()),)


def nonfinite(call: Call) -> Iterator[Strategy]:
    """The ways of `fxzero.nonfinite`: a tensor has overflowed where a part of it has."""
    yield replicated(call)
    for dim in range(len(call.tensors[0].shape)):
        strategy = Strategy((shard(dim),), (partial("max"),))
        if fits(call, strategy):
            yield strategy


def stack(call: Call) -> Iterator[Strategy]:
    """The ways of `stack`: by DTensor, and of norms that still have to be added up."""
    yield from by_dtensor(call)
    for reduction in ("norm2", "max"):
        yield Strategy((partial(reduction),) * len(call.tensors), (partial(reduction),))
