"""The ops that one kernel over rows can hold: the table that the pass asks, and that the generator of kernels supports.

[Note: row ops]
A kernel over rows [rows, columns] computes pointwise ops, reductions of the columns of a row, and what broadcasts into
a row. `fxzero.kernels.region_ops` has an expression for each op here; it may import nothing of this package, so a test
compares the two tables. An op that is in the table may still be refused for its arguments: the last dimensions only,
dtypes that a kernel computes in, exponents that are known. What may stand together is `row_structure`'s question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.step_graph import is_getitem, is_view, yields_scalar

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.bool)
MOST_COLUMNS = 2**16  # of a row that one program holds

# of one element each, in the shape that their arguments broadcast to
POINTWISE: frozenset[str] = frozenset(
    f"aten::{name}"
    for name in (
        *("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "mul.Tensor", "mul.Scalar"),
        *("div.Tensor", "div.Scalar", "neg.default", "abs.default", "reciprocal.default", "sign.default"),
        *(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
        *("logical_and.default", "logical_or.default", "logical_not.default"),
        *("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_not.default", "isnan.default", "isinf.default"),
        *("where.self", "masked_fill.Scalar", "masked_fill.Tensor"),
        *("exp.default", "exp2.default", "log.default", "log2.default", "sqrt.default", "rsqrt.default"),
        *("sin.default", "cos.default", "tanh.default", "sigmoid.default", "erf.default"),
        *("silu.default", "gelu.default", "relu.default", "leaky_relu.default"),
        *("silu_backward.default", "gelu_backward.default", "threshold_backward.default"),
        *("leaky_relu_backward.default", "tanh_backward.default", "sigmoid_backward.default"),
        *("maximum.default", "minimum.default", "clamp.default", "clamp_min.default", "clamp_max.default"),
        *("lerp.Scalar", "lerp.Tensor", "addcmul.default", "addcdiv.default", "pow.Tensor_Scalar"),
        *("_to_copy.default", "clone.default", "full_like.default", "zeros_like.default", "ones_like.default"),
    )
)
# of whole rows: their first argument (or the gradient of their result) has all columns
ROW_OPS: frozenset[str] = frozenset(
    f"aten::{name}"
    for name in (
        *("sum.dim_IntList", "sum.default", "mean.dim", "mean.default", "amax.default", "amin.default"),
        *("var.correction", "var_mean.correction"),
        *("_softmax.default", "_softmax_backward_data.default"),
        *("_log_softmax.default", "_log_softmax_backward_data.default"),
        *("native_layer_norm.default", "native_layer_norm_backward.default"),
        *("_fused_rms_norm.default", "_fused_rms_norm_backward.default"),
    )
)
# that keep the order of elements; of an input any view is read with its strides
REGROUPING: frozenset[str] = frozenset(
    f"aten::{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "unsqueeze.default", "alias.default", "detach.default"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims"),
    )
)
EXPAND = "aten::expand.default"
_WITHOUT_VALUES = ("aten::full_like.default", "aten::zeros_like.default", "aten::ones_like.default")
_MAY_YIELD_BOOLEANS = ("eq", "ne", "lt", "le", "gt", "ge", "logical", "bitwise", "isnan", "isinf")
_MAY_COPY_BOOLEANS = ("where", "masked_fill", "_to_copy", "clone", "full_like", "zeros_like", "ones_like")
_INTEGERS = (
    *("add", "sub", "rsub", "mul", "neg", "abs", "sign", "maximum", "minimum", "clamp", "clamp_min", "clamp_max"),
    *("relu", "bitwise_and", "bitwise_or", "bitwise_not"),
    *_MAY_COPY_BOOLEANS,
)


def op_name(target: Any) -> str:
    """The name of an op with its overload, as in a region's text."""
    name: str = target.name()
    return name if "." in name else f"{name}.default"


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of its op's schema, defaults filled in."""
    target: Any = node.target
    names = [a.name for a in target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in target._schema.arguments}


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a call's value, the first of several; None where it is no tensor."""
    val = node.meta["val"]
    first = next(iter(val), None) if isinstance(val, (list, tuple)) else val
    return first.dtype if isinstance(first, torch.Tensor) else None


def is_row_call(node: fx.Node) -> bool:
    """Whether a kernel over rows can hold a call, by its op, its dtypes and its arguments ([Note: row ops])."""
    if is_getitem(node):
        return True
    if not compat.is_op(node.target):
        return False
    if is_view(node):
        return all(_is_computable(val) for val in _tensors(node.meta["val"]))
    name = op_name(node.target)
    if name not in POINTWISE and name not in ROW_OPS:
        return False
    values = [val for source in (node, *node.all_input_nodes) for val in _tensors(source.meta["val"])]
    if not all(map(_is_computable, values)) or len({val.device.type for val in values}) != 1:
        return False
    return _takes_dtypes(node, name) and _CHECKS.get(name, _anything)(arguments(node))


def reads(node: fx.Node) -> list[fx.Node]:
    """The tensors whose values a call needs: not one that only says a shape."""
    if op_name(node.target) in _WITHOUT_VALUES:
        return []
    return [source for source in node.all_input_nodes if not yields_scalar(source)]


def reduced(node: fx.Node) -> fx.Node | None:
    """The argument of a row op that has all columns of a row; None for any other call."""
    if not compat.is_op(node.target) or op_name(node.target) not in ROW_OPS:
        return None
    given = arguments(node)
    return given.get("self", given.get("input", given.get("grad_output")))


def num_columns(node: fx.Node) -> int:
    """Elements of a row, as a row op sees them."""
    source = reduced(node)
    assert source is not None
    given, shape = arguments(node), source.meta["val"].shape
    if "normalized_shape" in given:
        return math.prod(given["normalized_shape"])
    dims = _dims(given, len(shape))
    return math.prod(shape[dim] for dim in dims)


def _tensors(val: Any) -> list[torch.Tensor]:
    values = val if isinstance(val, (list, tuple)) else [val]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _is_computable(val: torch.Tensor) -> bool:
    return val.dtype in DTYPES and val.layout == torch.strided


def _takes_dtypes(node: fx.Node, name: str) -> bool:
    """Whether a kernel computes a call's value in the dtypes that it has."""
    dtype, stem = dtype_of(node), name.removeprefix("aten::").split(".")[0]
    taken = [dtype_of(source) for source in reads(node)]
    if stem.startswith("bitwise"):
        return all(one == torch.bool for one in taken)
    if dtype == torch.bool:
        return stem.startswith(_MAY_YIELD_BOOLEANS) or stem in _MAY_COPY_BOOLEANS
    if name in ROW_OPS:
        return all(one in FLOATS for one in taken) and dtype in FLOATS
    return dtype in FLOATS or stem in _INTEGERS


def _anything(_given: Mapping[str, Any]) -> bool:
    return True


def _dims(given: Mapping[str, Any], num_dims: int) -> list[int]:
    """The dimensions that a row op goes over, from the first on."""
    dims = given.get("dim")
    if dims is None or dims == [] or num_dims == 0:
        return list(range(num_dims))
    return sorted(dim % num_dims for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _are_last(given: Mapping[str, Any]) -> bool:
    shape = (given["self"] if "self" in given else given["grad_output"]).meta["val"].shape
    dims = _dims(given, len(shape))
    return dims == list(range(len(shape) - len(dims), len(shape)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "aten::pow.Tensor_Scalar": lambda given: _is_number(given["exponent"]),
    "aten::sum.dim_IntList": _are_last,
    "aten::mean.dim": _are_last,
    "aten::amax.default": _are_last,
    "aten::amin.default": _are_last,
    "aten::var.correction": lambda given: _are_last(given) and not isinstance(given["correction"], fx.Node),
    "aten::var_mean.correction": lambda given: _are_last(given) and not isinstance(given["correction"], fx.Node),
    "aten::_softmax.default": _are_last,
    "aten::_softmax_backward_data.default": _are_last,
    "aten::_log_softmax.default": _are_last,
    "aten::_log_softmax_backward_data.default": _are_last,
    "aten::native_layer_norm_backward.default": lambda given: list(given["output_mask"]) == [True, False, False],
    "aten::_fused_rms_norm.default": lambda given: given["eps"] is not None,
    "aten::_fused_rms_norm_backward.default": lambda given: list(given["output_mask"]) == [True, False],
}
