"""Calls of each op that a generated kernel may hold, with arguments that reach each of its forms."""

from __future__ import annotations

import operator

import torch

from tests.kernels.drawn import drawn
from tests.lower.row_regions import Handmade

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
X, Y, P, U, B, N = "x", "y", "p", "u", "b", "i"  # normal, another, positive, in (-1, 1), boolean, integer
CURVES = ("sin", "cos", "tanh", "sigmoid", "erf", "silu", "relu")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
SAMPLES: dict[str, list[tuple[tuple, dict]]] = {
    "add.Tensor": [((X, Y), {}), ((X, Y), {"alpha": 0.5}), ((N, N), {"alpha": 3}), ((X, N), {})],
    "add.Scalar": [((X, 0.25), {}), ((N, 3), {})],
    "sub.Tensor": [((X, Y), {"alpha": 2})],
    "sub.Scalar": [((X, 0.25), {})],
    "rsub.Scalar": [((X, 1), {}), ((X, 1, 2.0), {})],
    "mul.Tensor": [((X, Y), {}), ((X, B), {}), ((N, N), {})],
    "mul.Scalar": [((X, 0.3), {}), ((X, -2), {})],
    "div.Tensor": [((X, P), {}), ((N, P), {})],
    "div.Scalar": [((X, 24), {}), ((N, 7), {})],
    "neg.default": [((X,), {}), ((N,), {})],
    "abs.default": [((X,), {}), ((N,), {})],
    "sign.default": [((X,), {}), ((N,), {})],
    "clamp.default": [((X, -0.5, 0.5), {}), ((X, None, 0.5), {}), ((X, -0.5), {}), ((N, -1, 2), {})],
    "clamp_min.default": [((X, 0.1), {})],
    "clamp_max.default": [((X, 0.1), {})],
    "logical_not.default": [((B,), {}), ((X,), {})],
    "bitwise_not.default": [((B,), {})],
    "where.self": [((B, X, Y), {}), ((B, N, N), {}), ((B, X, N), {})],
    "masked_fill.Scalar": [((X, B, float("-inf")), {}), ((N, B, 3), {}), ((X, B, -3.4028234663852886e38), {})],
    "masked_fill.Tensor": [((X, B, "0"), {})],
    "gelu.default": [((X,), {}), ((X,), {"approximate": "tanh"})],
    "gelu_backward.default": [((X, Y), {}), ((X, Y), {"approximate": "tanh"})],
    "leaky_relu.default": [((X, 0.1), {})],
    "leaky_relu_backward.default": [((X, Y, 0.1, False), {})],
    "threshold_backward.default": [((X, Y, 0), {}), ((X, Y, 0.25), {})],
    "lerp.Scalar": [((X, Y, 0.1), {}), ((X, Y, 0.9), {})],
    "lerp.Tensor": [((X, Y, U), {})],
    "addcmul.default": [((X, Y, P), {}), ((X, Y, P), {"value": -0.1})],
    "addcdiv.default": [((X, Y, P), {}), ((X, Y, P), {"value": -0.1})],
    "pow.Tensor_Scalar": [((P, e), {}) for e in (0, 1, 2, 3.0, 4, 0.5, -0.5, -1, -2, 1.7, -3)],
    "_to_copy.default": [((X,), {"dtype": d}) for d in (*FLOATS, torch.int64, torch.bool)]
    + [((N,), {"dtype": torch.bfloat16}), ((B,), {"dtype": torch.float32})],
    "full_like.default": [((X, 0.3), {}), ((N, 3), {}), ((X, 1), {"dtype": torch.bool})],
    "sum.dim_IntList": [((X, [1, 2], True), {}), ((X, [2]), {})],
    "sum.default": [((X,), {})],
    "mean.dim": [((X, [-1], True), {})],
    "mean.default": [((X,), {})],
    "amax.default": [((X, [-1]), {})],
    "amin.default": [((X, [-1], True), {})],
    "var.correction": [((X, [2]), {"correction": 0}), ((X, [2]), {"keepdim": True})],
    "var_mean.correction": [((X, [2]), {"correction": 1.0, "keepdim": True})],
    "_softmax.default": [((X, -1, False), {})],
    "_softmax_backward_data.default": [((X, U, 2, torch.float32), {})],
    "_log_softmax.default": [((X, 2, False), {})],
    "_log_softmax_backward_data.default": [((X, Y, -1, torch.float32), {})],
    "native_layer_norm.default": [((X, [37], "c", "d", 1e-5), {}), ((X, [5, 37], None, None, 1e-5), {})],
    "native_layer_norm_backward.default": [((X, Y, [37], "r", "s", "c", "d", [True, False, False]), {})],
    "_fused_rms_norm.default": [((X, [37], "c", 1e-6), {}), ((X, [37], None, 1e-6), {})],
    "_fused_rms_norm_backward.default": [((X, Y, [37], "s", "c", [True, False]), {})],
}
SAMPLES |= {
    f"{n}.Scalar": [((X, 0.25), {}), ((N, 1), {}), ((N, 0.5), {})] for n in ("eq", "ne", "lt", "le", "gt", "ge")
}
SAMPLES |= {f"{n}.Tensor": [((X, Y), {}), ((X, X), {}), ((N, X), {})] for n in COMPARISONS}
SAMPLES |= {f"{n}.default": [((P,), {})] for n in ("log", "log2", "sqrt", "rsqrt", "reciprocal")}
SAMPLES |= {f"{n}.default": [((X, Y), {})] for n in ("maximum", "minimum", "silu_backward")}
SAMPLES |= {f"{n}.default": [((X, U), {})] for n in ("tanh_backward", "sigmoid_backward")}
SAMPLES |= {f"logical_{n}.default": [((B, B), {}), ((B, X), {})] for n in ("and", "or")}
SAMPLES |= {f"bitwise_{n}.Tensor": [((B, B), {})] for n in ("and", "or")}
SAMPLES |= {
    f"{n}.default": [((X,), {})] for n in ("exp", "exp2", "sin", "cos", "tanh", "sigmoid", "erf", "silu", "relu")
}
SAMPLES |= {f"{n}.default": [((X,), {})] for n in ("isnan", "isinf", "clone")}
SAMPLES |= {f"{n}_like.default": [((X,), {}), ((N,), {"dtype": torch.float32})] for n in ("zeros", "ones")}


def sample(code: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The tensor of a code in SAMPLES."""
    x = drawn(3, 5, 37, dtype=dtype, seed=seed)
    small = {"c": x[0, 0], "d": x[1, 0], "r": x[..., :1] * 0.1, "s": x[..., :1].abs() + 0.5, "0": x[0, 0, 0]}
    known = {"p": x.abs() + 0.25, "u": x.tanh(), "b": x > 0.3, "i": (3 * x).long(), **small}
    return known.get(code, x).contiguous()


def add_sample(region: Handmade, name: str, index: int, dtype: torch.dtype) -> None:
    """The region computes a sample of an op too; inputs that are the same are shared.

    Args:
        region: to add to.
        name: of the op, as in a region's text.
        index: of the sample.
        dtype: of its floating inputs.
    """
    short = name.removeprefix("aten::")
    packet, _, overload = short.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload)
    inputs = {node.meta["code"]: node for node in region.values if "code" in node.meta}
    args, kwargs = SAMPLES[short][index]
    for code in (arg for arg in args if isinstance(arg, str)):
        if code not in inputs:
            inputs[code] = region.input(sample(code, dtype, len(region.values)))
            inputs[code].meta["code"] = code
    given = [inputs[arg] if isinstance(arg, str) else dtype if arg is torch.float32 else arg for arg in args]
    out = region.call(op, *given, **kwargs)
    parts = out.meta["val"] if isinstance(out.meta["val"], tuple) else ()
    for place, part in enumerate(parts):
        if part is not None and part.numel() and (place == 0 or "backward" not in short):
            region.call(operator.getitem, out, place)


def num_samples(name: str) -> int:
    """How many samples an op has."""
    return len(SAMPLES[name.removeprefix("aten::")])
