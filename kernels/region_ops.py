"""The expression in Triton's language for each op that a generated kernel may hold.

[Note: dtypes in a generated kernel]
A value of a floating dtype is fp32 from its load to its store, so that an op of bf16 tensors is computed as Inductor
computes it: what leaves the kernel is rounded once. Where eager code would round a value in between, the last bits
differ, by at most a rounding of the dtype for each op. One op rounds in between, since that is what it was written for:
a cast (`_to_copy`) to bf16 or fp16. Integers and booleans are what they are. A number that fp32 cannot hold is an
infinity.

`fxzero.graph.row_ops` has the same ops by name and says with which arguments a kernel takes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int64", "int32")

# values of which regroup dimensions or broadcast: a kernel has nothing to do for them
VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "unsqueeze.default", "alias.default", "detach.default"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims", "expand.default"),
    )
)

Texts = Mapping[str, str]
Given = Mapping[str, Any]
Expression = Callable[[Texts, Given], str]

_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_GREATEST = (2.0 - 2.0**-23) * 2.0**127  # that fp32 holds
_LEAST_NORMAL = 2.0**-126


def literal(value: Any, dtype: str) -> str:
    """A number of a call as text, of a dtype.

    Args:
        value: int, float or bool.
        dtype: that it is computed in; of a floating one fp32.
    """
    if dtype == "bool":
        return repr(bool(value))
    if dtype in INTEGERS:
        return repr(int(value))
    number = float(value)
    if math.isnan(number):
        return 'float("nan")'
    if abs(number) > _GREATEST:
        return 'float("inf")' if number > 0 else 'float("-inf")'
    if 0.0 < abs(number) < _LEAST_NORMAL:
        return f"tl.cast({number!r}, tl.float32)"  # Triton takes it for fp64
    return repr(number)


def cast(text: str, source: str, target: str) -> str:
    """A value of one dtype as one of another, both as kernels hold them.

    Args:
        text: names the value.
        source, target: dtypes.
    """
    if source == target or (source in FLOATS and target in FLOATS):
        return text
    if target == "bool":
        return f"({text} != 0)"
    return f"{text}.to(tl.{'float32' if target in FLOATS else target})"


def rounded(text: str, dtype: str) -> str:
    """A floating value rounded to a dtype, and fp32 again."""
    return text if dtype == "float32" else f"{text}.to(tl.{dtype}).to(tl.float32)"


def _scaled(sign: str) -> Expression:
    def expression(t: Texts, given: Given) -> str:
        if given["alpha"] == 1:
            return f"{t['self']} {sign} {t['other']}"
        return f"{t['self']} {sign} {t['alpha']} * {t['other']}"

    return expression


def _reversed(t: Texts, given: Given) -> str:
    return f"{t['other']} - {t['self']}" if given["alpha"] == 1 else f"{t['other']} - {t['alpha']} * {t['self']}"


def _by(template: str) -> Expression:
    return lambda t, _: template.format_map(t)


def _clamp(t: Texts, _given: Given) -> str:
    text = t["self"]
    text = f"maximum({text}, {t['min']})" if "min" in t else text
    return f"minimum({text}, {t['max']})" if "max" in t else text


def _power(t: Texts, given: Given) -> str:
    """Small whole exponents are products, as torch computes them; a root is one."""
    x, exponent = t["self"], float(given["exponent"])
    known = {
        0.0: f"{x} * 0.0 + 1.0",
        1.0: x,
        2.0: f"{x} * {x}",
        3.0: f"{x} * {x} * {x}",
        4.0: f"({x} * {x}) * ({x} * {x})",
        0.5: f"tl.sqrt_rn({x})",
        -0.5: f"tl.div_rn(1.0, tl.sqrt_rn({x}))",
        -1.0: f"tl.div_rn(1.0, {x})",
        -2.0: f"tl.div_rn(1.0, {x} * {x})",
    }
    return known.get(exponent, f"tl.exp2({exponent!r} * tl.log2({x}))")


def _gelu(name: str) -> Expression:
    def expression(t: Texts, given: Given) -> str:
        form = f"{name.replace('gelu', 'gelu_tanh')}" if given["approximate"] == "tanh" else name
        return f"{form}({t['grad_output']}, {t['self']})" if name == "gelu_backward" else f"{form}({t['self']})"

    return expression


def _scaled_product(operator: str) -> Expression:
    def expression(t: Texts, given: Given) -> str:
        a, b = t["tensor1"], t["tensor2"]
        product = f"{a} * {b}" if operator == "*" else f"tl.div_rn({a}, {b})"
        if given["value"] == 1:
            return f"{t['self']} + {product}"
        scaled = f"{t['value']} * {a}"
        return f"{t['self']} + {f'{scaled} * {b}' if operator == '*' else f'tl.div_rn({scaled}, {b})'}"

    return expression


def _lerp(t: Texts, given: Given) -> str:
    """A number that is known says from which end."""
    if isinstance(given["weight"], dict):
        return f"lerp({t['self']}, {t['end']}, {t['weight']})"
    difference, weight = f"({t['end']} - {t['self']})", float(given["weight"])
    if abs(weight) < 0.5:
        return f"{t['self']} + {t['weight']} * {difference}"
    return f"{t['end']} - {difference} * {literal(1.0 - weight, 'float32')}"


def _filled(value: str) -> Expression:
    return lambda t, given: f"tl.full((1, 1), {t.get('fill_value', value)}, tl.{given['kept']})"


POINTWISE: dict[str, Expression] = {
    f"aten::{name}": expression
    for name, expression in (
        *((f"add.{kind}", _scaled("+")) for kind in ("Tensor", "Scalar")),
        *((f"sub.{kind}", _scaled("-")) for kind in ("Tensor", "Scalar")),
        ("rsub.Scalar", _reversed),
        *((f"mul.{kind}", _by("{self} * {other}")) for kind in ("Tensor", "Scalar")),
        *((f"div.{kind}", _by("tl.div_rn({self}, {other})")) for kind in ("Tensor", "Scalar")),
        ("neg.default", _by("-{self}")),
        ("abs.default", _by("tl.abs({self})")),
        ("reciprocal.default", _by("tl.div_rn(1.0, {self})")),
        ("sign.default", _by("tl.where({self} > 0, {one}, tl.where({self} < 0, -{one}, {self}))")),
        *(
            (f"{name}.{kind}", _by(f"{{self}} {sign} {{other}}"))
            for name, sign in _COMPARED.items()
            for kind in ("Tensor", "Scalar")
        ),
        ("logical_and.default", _by("{self} & {other}")),
        ("logical_or.default", _by("{self} | {other}")),
        ("logical_not.default", _by("{self} == 0")),
        ("bitwise_and.Tensor", _by("{self} & {other}")),
        ("bitwise_or.Tensor", _by("{self} | {other}")),
        ("bitwise_not.default", _by("{self} == 0")),
        ("isnan.default", _by("{self} != {self}")),
        ("isinf.default", _by('tl.abs({self}) == float("inf")')),
        ("where.self", _by("tl.where({condition}, {self}, {other})")),
        *((f"masked_fill.{kind}", _by("tl.where({mask}, {value}, {self})")) for kind in ("Scalar", "Tensor")),
        *((f"{name}.default", _by(f"tl.{name}({{self}})")) for name in ("exp", "exp2", "log", "log2", "sin", "cos")),
        ("sqrt.default", _by("tl.sqrt_rn({self})")),
        ("rsqrt.default", _by("tl.div_rn(1.0, tl.sqrt_rn({self}))")),
        ("erf.default", _by("tl.erf({self})")),
        *((f"{name}.default", _by(f"{name}({{self}})")) for name in ("tanh", "sigmoid", "silu")),
        ("gelu.default", _gelu("gelu")),
        ("relu.default", _by("maximum({self}, {zero})")),
        ("leaky_relu.default", _by("tl.where({self} > 0, {self}, {negative_slope} * {self})")),
        ("silu_backward.default", _by("silu_backward({grad_output}, {self})")),
        ("gelu_backward.default", _gelu("gelu_backward")),
        ("threshold_backward.default", _by("tl.where({self} <= {threshold}, 0.0, {grad_output})")),
        ("leaky_relu_backward.default", _by("tl.where({self} > 0, {grad_output}, {negative_slope} * {grad_output})")),
        ("tanh_backward.default", _by("{grad_output} * (1.0 - {output} * {output})")),
        ("sigmoid_backward.default", _by("{grad_output} * (1.0 - {output}) * {output}")),
        ("maximum.default", _by("maximum({self}, {other})")),
        ("minimum.default", _by("minimum({self}, {other})")),
        *((f"{name}.default", _clamp) for name in ("clamp", "clamp_min", "clamp_max")),
        *((f"lerp.{kind}", _lerp) for kind in ("Scalar", "Tensor")),
        ("addcmul.default", _scaled_product("*")),
        ("addcdiv.default", _scaled_product("/")),
        ("pow.Tensor_Scalar", _power),
        ("_to_copy.default", _by("{self}")),
        ("clone.default", _by("{self}")),
        ("full_like.default", _filled("0")),
        ("zeros_like.default", _filled("0")),
        ("ones_like.default", _filled("1")),
    )
}


def is_select(op: str) -> bool:
    """Whether an op picks one of two values by a condition, which keeps its dtype."""
    return op.startswith(("aten::where", "aten::masked_fill"))


def computes_in(op: str, dtype: str, taken: list[str]) -> str:
    """The dtype that a pointwise op's operands have as a kernel computes it.

    Args:
        op: by name.
        dtype: of its value.
        taken: dtypes of its tensors and numbers.
    """
    stem = op.removeprefix("aten::").split(".")[0]
    if stem.startswith("logical") or stem.startswith("bitwise"):
        return "bool"
    if stem not in _COMPARED and stem not in ("isnan", "isinf"):
        return dtype
    if any(one in FLOATS for one in taken):
        return "float32"
    return "int64" if "int64" in taken else "int32"


# ---- row ops: lines of (name of a value, expression)

Lines = list[tuple[str, str]]


def _mean(t: Texts, name: str) -> Lines:
    return [(name, f"row_sum({t['self']}, present) / {t['columns']}")]


def _one(template: str) -> Callable[[Texts, Given, str], Lines]:
    return lambda t, _, name: [(name, template.format_map(t))]


def _divisor(t: Texts, given: Given) -> str:
    """Columns less the correction, but not less than none; torch's default correction is 1."""
    correction = float(given.get("correction", 1.0))
    count = max(float(t["columns"]) - correction, 0.0)
    return repr(count) if count else "tl.cast(0.0, tl.float32)"


def _var(t: Texts, given: Given, name: str) -> Lines:
    around = f"{name}_mean"
    return [*_mean(t, around), (name, f"row_var({t['self']}, present, {around}, {_divisor(t, given)})")]


def _var_mean(t: Texts, given: Given, name: str) -> Lines:
    around = f"{name}_1"
    return [*_mean(t, around), (f"{name}_0", f"row_var({t['self']}, present, {around}, {_divisor(t, given)})")]


def _affine(text: str, t: Texts) -> str:
    text = f"{text} * {t['weight']}" if "weight" in t else text
    return f"{text} + {t['bias']}" if "bias" in t else text


def _layer_norm(t: Texts, _given: Given, name: str) -> Lines:
    x, mean, rstd = t["input"], f"{name}_1", f"{name}_2"
    var = f"row_var({x}, present, {mean}, {t['columns']})"
    return [
        (mean, f"row_sum({x}, present) / {t['columns']}"),
        (rstd, f"tl.div_rn(1.0, tl.sqrt_rn({var} + {t['eps']}))"),
        (f"{name}_0", _affine(f"({x} - {mean}) * {rstd}", t)),
    ]


def _layer_norm_backward(t: Texts, _given: Given, name: str) -> Lines:
    normal, scaled = f"{name}_normal", f"{name}_scaled"
    return [
        (normal, f"({t['input']} - {t['mean']}) * {t['rstd']}"),
        (scaled, f"{t['grad_out']} * {t['weight']}" if "weight" in t else t["grad_out"]),
        (f"{name}_0", f"norm_backward({scaled}, {normal}, {t['rstd']}, present, {t['columns']})"),
    ]


def _rms_norm(t: Texts, _given: Given, name: str) -> Lines:
    x, rstd = t["input"], f"{name}_1"
    return [
        (rstd, f"tl.div_rn(1.0, tl.sqrt_rn(row_sum({x} * {x}, present) / {t['columns']} + {t['eps']}))"),
        (f"{name}_0", _affine(f"{x} * {rstd}", t)),
    ]


def _rms_norm_backward(t: Texts, _given: Given, name: str) -> Lines:
    normal, scaled = f"{name}_normal", f"{name}_scaled"
    return [
        (normal, f"{t['input']} * {t['rstd']}"),
        (scaled, f"{t['grad_out']} * {t['weight']}" if "weight" in t else t["grad_out"]),
        (f"{name}_0", f"rms_norm_backward({scaled}, {normal}, {t['rstd']}, present, {t['columns']})"),
    ]


ROW_OPS: dict[str, Callable[[Texts, Given, str], Lines]] = {
    f"aten::{name}": lines
    for name, lines in (
        *((f"sum.{kind}", _one("row_sum({self}, present)")) for kind in ("dim_IntList", "default")),
        *((f"mean.{kind}", lambda t, _, name: _mean(t, name)) for kind in ("dim", "default")),
        ("amax.default", _one("row_max({self}, present)")),
        ("amin.default", _one("row_min({self}, present)")),
        ("var.correction", _var),
        ("var_mean.correction", _var_mean),
        ("_softmax.default", _one("softmax({self}, present)")),
        ("_softmax_backward_data.default", _one("softmax_backward({grad_output}, {output}, present)")),
        ("_log_softmax.default", _one("log_softmax({self}, present)")),
        ("_log_softmax_backward_data.default", _one("log_softmax_backward({grad_output}, {output}, present)")),
        ("native_layer_norm.default", _layer_norm),
        ("native_layer_norm_backward.default", _layer_norm_backward),
        ("_fused_rms_norm.default", _rms_norm),
        ("_fused_rms_norm_backward.default", _rms_norm_backward),
    )
}
