"""Gated activations, SwiGLU and GeGLU without their matrix products, and their gradients in one pass.

    gated_activation(a, b, form) -> y                        y = f(a) b
    gated_activation_backward(dy, a, b, form) -> (da, db)    da = dy b f'(a),  db = dy f(a)

    form "silu"         f(a) = a s(a)
    form "gelu_tanh"    f(a) = a (1 + tanh(k (a + 0.044715 a^3))) / 2 = a s(2 k (a + 0.044715 a^3)),  k = sqrt(2 / pi)
    form "gelu_erf"     f(a) = a (1 + erf(a / sqrt(2))) / 2

with s(z) = 1 / (1 + exp(-z)). All of it in fp32, whatever the dtypes, and rounded once: f(a) is not rounded before it
is multiplied by b. s(z) in place of 1 + tanh, and s(-z) in place of 1 - s(z), do not cancel. y has the dtype of a; da
and db have those of a and b.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).

Shapes: a, b, y, dy, da, db [..., columns]. a and b may be the two halves of one tensor: rows of any one stride.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import launch

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

FORMS = ("silu", "gelu_tanh", "gelu_erf")
_MOST_COLUMNS = 1024  # of a tile: longer rows take several

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define("gated_activation(Tensor a, Tensor b, str form) -> Tensor")
_LIBRARY.define("gated_activation_backward(Tensor dy, Tensor a, Tensor b, str form) -> (Tensor, Tensor)")


def gated_activation_reference(a: torch.Tensor, b: torch.Tensor, form: str) -> torch.Tensor:
    """y by plain torch ops, in fp32; in fp64 where `a` is."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return (wide * _share(wide, form)[0] * b).to(a.dtype).contiguous()


def _share(a: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f(a) / a, and its derivative."""
    if form == "gelu_erf":
        slope = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
        return (1 + torch.erf(a / math.sqrt(2))) / 2, slope
    if form == "silu":
        return torch.sigmoid(a), torch.sigmoid(a) * torch.sigmoid(-a)
    z = 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    inner = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a.square())
    return torch.sigmoid(z), torch.sigmoid(z) * torch.sigmoid(-z) * inner


def gated_activation_backward_reference(
    dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """da and db by plain torch ops, in fp32; in fp64 where `a` is."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    share, slope = _share(wide, form)
    da = dy * b * (share + wide * slope)
    return da.to(a.dtype).contiguous(), (dy * (wide * share)).to(b.dtype).contiguous()


def sigmoid(z):
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


def share_of(a, FORM: tl.constexpr):
    """f(a) / a."""
    if FORM == "silu":
        share = sigmoid(a)
    elif FORM == "gelu_tanh":
        share = sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    else:
        share = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    return share


def slope_of(a, share, FORM: tl.constexpr):
    """The derivative of f(a) / a, which is `share`."""
    if FORM == "silu":
        slope = share * sigmoid(-a)
    elif FORM == "gelu_tanh":
        z = 1.5957691216057308 * (a + 0.044715 * a * a * a)
        slope = share * sigmoid(-z) * (1.5957691216057308 * (1.0 + 0.134145 * a * a))
    else:
        slope = 0.3989422804014327 * tl.exp(-0.5 * a * a)
    return slope


def gated_activation_kernel(
    a, b, y, rows, columns, a_stride, b_stride,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program has one tile [ROWS, COLUMNS]. `y` is contiguous, `a` and `b` have any stride between rows."""
    across = (columns + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    gate = tl.load(a + (row * a_stride + column), mask=inside, other=0.0).to(tl.float32)
    value = tl.load(b + (row * b_stride + column), mask=inside, other=0.0).to(tl.float32)
    result = gate * share_of(gate, FORM) * value
    tl.store(y + (row * columns + column), result.to(y.dtype.element_ty), mask=inside)


def gated_activation_backward_kernel(
    dy, a, b, da, db, rows, columns, dy_stride, a_stride, b_stride,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program has one tile [ROWS, COLUMNS]. `da` and `db` are contiguous, the others' rows have any stride."""
    across = (columns + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    grad = tl.load(dy + (row * dy_stride + column), mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(a + (row * a_stride + column), mask=inside, other=0.0).to(tl.float32)
    value = tl.load(b + (row * b_stride + column), mask=inside, other=0.0).to(tl.float32)
    share = share_of(gate, FORM)
    gate_grad = grad * value * (share + gate * slope_of(gate, share, FORM))
    tl.store(da + (row * columns + column), gate_grad.to(da.dtype.element_ty), mask=inside)
    tl.store(db + (row * columns + column), (grad * (gate * share)).to(db.dtype.element_ty), mask=inside)


@torch.library.impl(_LIBRARY, "gated_activation", "CompositeExplicitAutograd")
def launch_gated_activation(a: torch.Tensor, b: torch.Tensor, form: str) -> torch.Tensor:
    """`b` has been multiplied by the activation of `a`.

    Args:
        a: goes through the activation; copied first where no view has rows of one stride (`launch.rows_of`), like `b`.
        b: of the same shape.
        form: "silu", "gelu_tanh" or "gelu_erf".

    Returns:
        y, contiguous, in the dtype of `a`.

    Raises:
        ValueError: a form, shape, dtype or device is not as it should be; names it.
    """
    _check("gated_activation", form, a, b=b)
    if not launch.runs_kernel(a):
        return gated_activation_reference(a, b, form)
    y = a.new_empty(a.shape)
    if y.numel():
        gate, value = launch.rows_of(a), launch.rows_of(b)
        _launch(gated_activation_kernel, form, (gate, value), (y,))
    return y


@torch.library.impl(_LIBRARY, "gated_activation_backward", "CompositeExplicitAutograd")
def launch_gated_activation_backward(
    dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `a` and `b` have been computed from that of y, in one pass.

    Args:
        dy: the gradient of y; like the others, copied first where no view has rows of one stride.
        a: as given to `gated_activation`.
        b: as given to `gated_activation`.
        form: as given to `gated_activation`.

    Returns:
        da and db, contiguous, in the dtypes of `a` and `b`.

    Raises:
        ValueError: a form, shape, dtype or device is not as it should be; names it.
    """
    _check("gated_activation_backward", form, a, b=b, dy=dy)
    if not launch.runs_kernel(a):
        return gated_activation_backward_reference(dy, a, b, form)
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    if da.numel():
        given = tuple(launch.rows_of(x) for x in (dy, a, b))
        _launch(gated_activation_backward_kernel, form, given, (da, db))
    return da, db


def _launch(kernel: Any, form: str, given: tuple[torch.Tensor, ...], made: tuple[torch.Tensor, ...]) -> None:
    rows, columns = given[0].shape
    height, width, warps = launch.tile_of(columns, most=_MOST_COLUMNS)
    programs = launch.ceil_div(rows, height) * launch.ceil_div(columns, width)
    helpers = (sigmoid, share_of) if kernel is gated_activation_kernel else (sigmoid, share_of, slope_of)
    strides = (x.stride(0) for x in given)
    with torch.cuda.device_of(given[0]):
        launched = launch.jit(kernel, *helpers)[(programs,)]
        launched(*given, *made, rows, columns, *strides, FORM=form, ROWS=height, COLUMNS=width, num_warps=warps)


def _check(op: str, form: str, a: torch.Tensor, **others: torch.Tensor) -> None:
    if form not in FORMS:
        raise launch.refused(op, expected=f"a form of {FORMS}", got=repr(form), fix="choose one of these")
    if a.dim() == 0:
        got = f"a = {launch.described(a)}"
        raise launch.refused(op, expected="at least one dimension", got=got, fix="use the plain ops")
    launch.check_floats(op, a=a, **others)
    for name, other in others.items():
        launch.check_shape(op, name, other, a.shape)


@torch.library.register_fake("fxzero_kernels::gated_activation", lib=_LIBRARY)
def _fake(a: torch.Tensor, b: torch.Tensor, form: str) -> torch.Tensor:
    _check("gated_activation", form, a, b=b)
    return a.new_empty(a.shape)


@torch.library.register_fake("fxzero_kernels::gated_activation_backward", lib=_LIBRARY)
def _fake_backward(dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check("gated_activation_backward", form, a, b=b, dy=dy)
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.form = inputs[2]


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *gated_activation_backward(dy, *ctx.saved_tensors, ctx.form), None


torch.library.register_autograd("fxzero_kernels::gated_activation", _differentiate, setup_context=_save, lib=_LIBRARY)

gated_activation = torch.ops.fxzero_kernels.gated_activation.default
gated_activation_backward = torch.ops.fxzero_kernels.gated_activation_backward.default
