"""Layer norm of rows, and its gradients.

    layer_norm(x, weight, bias, eps) -> (y, mean, rstd)                       y = x^ w + b,  x^ = (x - mean) rstd
    layer_norm_backward(dy, x, weight, mean, rstd, has_bias) -> (dx, dweight, dbias)
        dx = rstd (g - mean(g) - x^ mean(g x^)),  dweight = sum(dy x^),  dbias = sum(dy)

with rstd = 1 / sqrt(mean((x - mean)^2) + eps), g = dy w, means over the columns of a row and sums over all rows. All of
it in fp32, whatever the dtypes, and rounded once. The variance is that of x - mean, which is held in registers: E[x^2]
- mean^2 would cancel. y and dx have the dtype of x, dweight and dbias that of weight (of x, where only a bias is
there). `weight` and `bias` may be None; dweight and dbias are then tensors of no elements.

dweight and dbias are deterministic, by partial sums as in `rms_norm`.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.

Shapes: x, dy, y, dx [..., columns]; weight, bias, dweight, dbias [columns]; mean, rstd [...], fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import launch

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool has_bias)"
    " -> (Tensor, Tensor, Tensor)"
)

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Three:
    """y, mean and rstd by plain torch ops, in fp32; in fp64 where `x` is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1)
    centred = wide - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), mean, rstd


def layer_norm_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    has_bias: bool,
) -> Three:
    """dx, dweight and dbias by plain torch ops, in fp32; in fp64 where `x` is."""
    dy, inverse = dy.to(torch.promote_types(x.dtype, torch.float32)), rstd.unsqueeze(-1)
    normal = (x - mean.unsqueeze(-1)) * inverse
    scaled = dy if weight is None else dy * weight
    means = scaled.mean(-1, keepdim=True), (scaled * normal).mean(-1, keepdim=True)
    dx = inverse * (scaled - means[0] - normal * means[1])
    dtype, none = (x if weight is None else weight).dtype, x.new_empty(0)
    dweight = none if weight is None else launch.rows_of(dy * normal).sum(0).to(dtype)
    dbias = launch.rows_of(dy).sum(0).to(dtype) if has_bias else x.new_empty(0, dtype=dtype)
    return dx.to(x.dtype).contiguous(), dweight, dbias


def layer_norm_kernel(
    x, weight, bias, y, mean, rstd, rows, columns, x_stride, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program normalises ROWS rows. `y` is contiguous, `x` has any stride between rows."""
    eps = tl.cast(eps, tl.float32)  # [Note: scalars in fp32]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = column < columns
    inside = (row < rows)[:, None] & present[None, :]
    value = tl.load(x + (row[:, None] * x_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(value, axis=1) / columns
    value = tl.where(present[None, :], value - centre[:, None], 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=1) / columns + eps))
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)
    result = value * inverse[:, None]
    if HAS_WEIGHT:
        result *= tl.load(weight + column, mask=present, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + column, mask=present, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (row[:, None] * columns + column[None, :]), result.to(y.dtype.element_ty), mask=inside)


def layer_norm_backward_kernel(
    dy, x, weight, mean, rstd, dx, weight_sums, bias_sums, rows, columns, dy_stride, x_stride, tiles,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program has `tiles` tiles of ROWS rows, one after the other, and one row of each of the two sums."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    present = column < columns
    if HAS_WEIGHT:
        factor = tl.load(weight + column, mask=present, other=0.0).to(tl.float32)[None, :]
        weight_total = tl.zeros((COLUMNS,), tl.float32)
    if HAS_BIAS:
        bias_total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & present[None, :]
        grad = tl.load(dy + (row[:, None] * dy_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + (row[:, None] * x_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normal = (value - centre) * inverse  # what lies behind the last column meets a gradient of zero
        if HAS_BIAS:
            bias_total += tl.sum(grad, axis=0)
        if HAS_WEIGHT:
            weight_total += tl.sum(grad * normal, axis=0)
            grad *= factor
        shift = tl.sum(grad, axis=1)[:, None] / columns
        slope = tl.sum(grad * normal, axis=1)[:, None] / columns
        result = inverse * (grad - shift - normal * slope)
        tl.store(dx + (row[:, None] * columns + column[None, :]), result.to(dx.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(weight_sums + (program * columns + column), weight_total, mask=present)
    if HAS_BIAS:
        tl.store(bias_sums + (program * columns + column), bias_total, mask=present)


@torch.library.impl(_LIBRARY, "layer_norm", "CompositeExplicitAutograd")
def launch_layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Three:
    """Every row of `x` has mean 0 and variance 1, and then been multiplied by `weight` and moved by `bias`.

    Args:
        x: of 1 to 65536 columns; copied first where no view has rows of one stride (`launch.rows_of`).
        weight: or None.
        bias: or None.
        eps: added to the variance.

    Returns:
        y, contiguous, in the dtype of `x`; mean and rstd in fp32. All empty where there is no row.

    Raises:
        ValueError: a shape, dtype or device is not as it should be; names the tensor.
    """
    _check("layer_norm", x, weight=weight, bias=bias)
    if not launch.runs_kernel(x):
        return layer_norm_reference(x, weight, bias, eps)
    y, mean, rstd = _outputs(x)
    flat = launch.rows_of(x)
    rows, columns = flat.shape
    if rows == 0:
        return y, mean, rstd
    height, width, warps = launch.tile_of(columns)
    factor, shift = (flat if t is None else t.contiguous() for t in (weight, bias))
    kernel = launch.jit(layer_norm_kernel)[(launch.ceil_div(rows, height),)]
    sizes = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "ROWS": height, "COLUMNS": width}
    with torch.cuda.device_of(x):
        kernel(flat, factor, shift, y, mean, rstd, rows, columns, flat.stride(0), eps, **sizes, num_warps=warps)
    return y, mean, rstd


@torch.library.impl(_LIBRARY, "layer_norm_backward", "CompositeExplicitAutograd")
def launch_layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    has_bias: bool,
) -> Three:
    """The gradients of `x`, `weight` and bias have been computed from that of y, in one pass over `dy` and `x`.

    Args:
        dy: the gradient of y; like `x`, copied first where no view has rows of one stride.
        x: as given to `layer_norm`.
        weight: as given to `layer_norm`.
        mean: as returned by it.
        rstd: as returned by it.
        has_bias: whether there was a bias; its values are not needed.

    Returns:
        dx, contiguous, in the dtype of `x`; dweight and dbias in that of `weight` (of `x` without one), of no elements
        where they belong to nothing.

    Raises:
        ValueError: a shape, dtype or device is not as it should be; names the tensor.
    """
    _check("layer_norm_backward", x, weight=weight, dy=dy, mean=mean, rstd=rstd)
    if not launch.runs_kernel(x):
        return layer_norm_backward_reference(dy, x, weight, mean, rstd, has_bias)
    dx = x.new_empty(x.shape)
    flat, grad = launch.rows_of(x), launch.rows_of(dy)
    rows, columns = flat.shape
    height, width, warps = launch.tile_of(columns)
    programs = launch.num_programs(launch.ceil_div(rows, height), x.device)
    tiles = launch.ceil_div(launch.ceil_div(rows, height), programs)
    sums = [
        x.new_empty((programs if rows and wanted else 0, columns), dtype=torch.float32)
        for wanted in (weight is not None, has_bias)
    ]
    if rows:
        factor = flat if weight is None else weight.contiguous()
        kernel = launch.jit(layer_norm_backward_kernel)[(programs,)]
        figures = (rows, columns, grad.stride(0), flat.stride(0), tiles)
        sizes = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": has_bias, "ROWS": height, "COLUMNS": width}
        with torch.cuda.device_of(x):
            arguments = (grad, flat, factor, mean.contiguous(), rstd.contiguous(), dx, *sums, *figures)
            kernel(*arguments, **sizes, num_warps=warps)
    dtype = (x if weight is None else weight).dtype
    dweight = x.new_empty(0) if weight is None else sums[0].sum(0).to(dtype)
    return dx, dweight, sums[1].sum(0).to(dtype) if has_bias else x.new_empty(0, dtype=dtype)


def _outputs(x: torch.Tensor) -> Three:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _check(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    launch.check_rows(op, x)
    launch.check_floats(op, x=x, **others)
    shapes = {"weight": x.shape[-1:], "bias": x.shape[-1:], "dy": x.shape, "mean": x.shape[:-1], "rstd": x.shape[:-1]}
    for name, other in others.items():
        if other is not None:
            launch.check_shape(op, name, other, shapes[name])


@torch.library.register_fake("fxzero_kernels::layer_norm", lib=_LIBRARY)
def _fake(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Three:
    _check("layer_norm", x, weight=weight, bias=bias)
    return _outputs(x)


@torch.library.register_fake("fxzero_kernels::layer_norm_backward", lib=_LIBRARY)
def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    has_bias: bool,
) -> Three:
    _check("layer_norm_backward", x, weight=weight, dy=dy, mean=mean, rstd=rstd)
    dtype = (x if weight is None else weight).dtype
    dweight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dweight, x.new_empty(x.shape[-1] if has_bias else 0, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(
    ctx: Any, dy: torch.Tensor, _dmean: torch.Tensor, _drstd: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = layer_norm_backward(dy, x, weight, mean, rstd, ctx.bias_dtype is not None)
    return dx, None if weight is None else dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


torch.library.register_autograd("fxzero_kernels::layer_norm", _differentiate, setup_context=_save, lib=_LIBRARY)

layer_norm = torch.ops.fxzero_kernels.layer_norm.default
layer_norm_backward = torch.ops.fxzero_kernels.layer_norm_backward.default
