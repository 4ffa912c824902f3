"""What a call yields under fake mode depends on this alone: equal calls need be evaluated once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx


def call_signature(node: fx.Node, known: dict[fx.Node, Hashable]) -> Hashable:
    """Op, arguments, and dtype, shape, strides and device of tensors among them, or the value of a number.

    Args:
        node: a call, of whose inputs none has symbols (`has_symbols`).
        known: signatures of inputs, which grow with each call.
    """

    def freeze(arg: Any) -> Hashable:
        if isinstance(arg, fx.Node):
            if arg not in known:
                known[arg] = _value_signature(arg.meta["val"])
            return known[arg]
        if isinstance(arg, (list, tuple)):
            return tuple(freeze(item) for item in arg)
        if isinstance(arg, dict):
            return tuple((key, freeze(value)) for key, value in arg.items())
        if isinstance(arg, slice):
            return ("slice", freeze(arg.start), freeze(arg.stop), freeze(arg.step))
        return (type(arg), arg)  # 1, 1.0 and True are equal, yet they promote differently

    kwargs = tuple((name, freeze(arg)) for name, arg in node.kwargs.items())
    return (node.target, freeze(node.args), kwargs)


def has_symbols(val: Any) -> bool:
    """Whether sizes of a value are known only when the step runs."""
    if isinstance(val, torch.Tensor):
        return any(type(size) is not int for size in val.shape)
    return any(has_symbols(item) for item in val) if isinstance(val, (list, tuple)) else False


def _value_signature(val: Any) -> Hashable:
    if isinstance(val, torch.Tensor):
        # a lazily conjugated or negated tensor yields other strides in some ops
        return (val.dtype, tuple(val.shape), tuple(val.stride()), val.device, val.is_conj(), val.is_neg())
    if isinstance(val, (list, tuple)):
        return tuple(_value_signature(item) for item in val)
    return (type(val), val)
