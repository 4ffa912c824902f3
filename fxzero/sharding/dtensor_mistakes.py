"""Ways that DTensor names and that are wrong: each was seen to give other numbers (tests/sharding), with torch 2.13."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fxzero.sharding.strategy import Call, Strategy

# whether a way is one of those
Mistake = Callable[[Call, Strategy], bool]


@functools.cache
def mistakes() -> dict[str, Mistake]:
    """Name of an op -> what is wrong about some of its ways."""
    return {
        "aten::cumsum": _begins_anew,
        "aten::cumprod": _begins_anew,
        "aten::logcumsumexp": _begins_anew,
        "aten::gather": _indexes_other_parts,
    }


def is_mistake(call: Call, strategy: Strategy) -> bool:
    """Whether a way is known to be wrong."""
    wrong = mistakes().get(call.target.name())
    return wrong is not None and wrong(call, strategy)


def _begins_anew(call: Call, strategy: Strategy) -> bool:
    """Each rank would begin its sums at zero: a dim that is counted from the end is not seen to be the split one."""
    (lies,) = strategy.inputs
    return lies.is_shard and lies.dim == call.argument("dim") % len(call.tensors[0].shape)


def _indexes_other_parts(call: Call, strategy: Strategy) -> bool:
    """The indices may be fewer than the rows: the i-th part of them is then not about the i-th part of the rows."""
    (source, at), (rows, _) = strategy.inputs, call.tensors
    return source.is_shard and at == source and rows.shape[source.dim] != call.tensors[1].shape[source.dim]
