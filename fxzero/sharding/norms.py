"""Norms of what is split: each rank's own, which still have to be added up."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxzero.graph.axis_placement import partial, shard
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.strategy import Call, Strategy, fits, replicated

# order of a norm -> what ranks' norms have to be reduced by
_REDUCTIONS = {2.0: "norm2", math.inf: "max", 1.0: "sum"}


def vector_norm(call: Call) -> Iterator[Strategy]:
    """The ways of `linalg_vector_norm` over all dims: parts have norms whose norm it is."""
    yield replicated(call)
    order = float(call.argument("ord", 2.0))
    if order not in _REDUCTIONS or call.argument("dim") is not None:
        return
    still = partial(_REDUCTIONS[order])
    for dim in range(len(call.tensors[0].shape)):
        strategy = Strategy((shard(dim),), (still,), share=1 / call.ranks)
        if fits(call, strategy):
            yield strategy
    if order != 1.0:  # partial sums are not of one sign
        yield Strategy((still,), (still,))


def stack(call: Call) -> Iterator[Strategy]:
    """The ways of `stack`: by DTensor, and of norms that still have to be added up."""
    yield from by_dtensor(call)
    for reduction in ("norm2", "max"):
        yield Strategy((partial(reduction),) * len(call.tensors), (partial(reduction),))
