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
        "aten::histc": _has_a_range_of_its_own,
        "aten::linalg__powsum": _takes_partial,
        "aten::view.dtype": _takes_partial,
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


def _has_a_range_of_its_own(call: Call, strategy: Strategy) -> bool:
    """Without bounds each rank would count between its own least and greatest element."""
    return strategy.inputs[0].is_shard and call.argument("min", 0) == call.argument("max", 0)


def _takes_partial(call: Call, strategy: Strategy) -> bool:
    """Not what is made of a sum's parts adds up to what is made of the sum: powers, and bits under another name."""
    return any(lies.is_partial for lies in strategy.inputs)
