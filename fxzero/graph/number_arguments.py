"""Ops that take a number of the host as a 0-dim tensor too, so that one compiled kernel serves all its values.

A learning rate or a bias correction is another number at each step. An op that takes it as a Python number would be
compiled with the value of the first; each here has a form that takes a tensor, of the same arithmetic: torch turns a
number and a 0-dim tensor of doubles alike into the dtype that it computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero.graph.step_graph import yields_scalar

aten = torch.ops.aten

# op -> the op that takes a tensor where this takes its number
_OVERLOADS: dict[Any, Any] = {
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.lerp.Scalar: aten.lerp.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
}


def _addcmul(self: Any, a: Any, b: Any, *, value: Any) -> Any:
    return aten.add.Tensor(self, aten.mul.Tensor(aten.mul.Tensor(a, value), b))


def _addcdiv(self: Any, a: Any, b: Any, *, value: Any) -> Any:
    return aten.add.Tensor(self, aten.div.Tensor(aten.mul.Tensor(a, value), b))


def _add_scaled(self: Any, other: Any, *, alpha: Any) -> Any:
    return aten.add.Tensor(self, aten.mul.Tensor(other, alpha))


def _sub_scaled(self: Any, other: Any, *, alpha: Any) -> Any:
    return aten.sub.Tensor(self, aten.mul.Tensor(other, alpha))


# (op, its keyword that is the number) -> the same in ops that take tensors
_SPELLED_OUT: dict[tuple[Any, str], Callable[..., Any]] = {
    (aten.addcmul.default, "value"): _addcmul,
    (aten.addcdiv.default, "value"): _addcdiv,
    (aten.add.Tensor, "alpha"): _add_scaled,
    (aten.sub.Tensor, "alpha"): _sub_scaled,
}


def with_tensors(node: fx.Node) -> Callable[..., Any] | None:
    """The function that does what a call does, its numbers given as 0-dim tensors; None where there is none.

    A call without numbers of the host among its arguments keeps its op.
    """
    in_kwargs = [key for key, value in node.kwargs.items() if _is_number(value)]
    if any(_holds_number(arg) for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, (list, tuple))):
        return None
    if not in_kwargs and not any(map(_is_number, node.args)):
        return node.target  # type: ignore[return-value]
    if in_kwargs:
        only = len(in_kwargs) == 1 and len(node.kwargs) == 1 and not any(map(_is_number, node.args))
        return _SPELLED_OUT.get((node.target, in_kwargs[0])) if only else None
    first, *rest = node.args
    if _is_number(first) or node.kwargs or not rest or not _is_number(rest[-1]) or any(map(_is_number, rest[:-1])):
        return None
    return _OVERLOADS.get(node.target)


def _is_number(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and yields_scalar(arg)


def _holds_number(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(map(_holds_number, arg))
    return _is_number(arg)
