"""RMS norm of rows, and its gradients.

    rms_norm(x, weight, eps) -> (y, rstd)                           y = x rstd w,  rstd = 1 / sqrt(mean(x^2) + eps)
    rms_norm_backward(dy, x, weight, rstd) -> (dx, dweight)         dx = rstd (g - x^ mean(g x^)),  dweight = sum(dy x^)

with x^ = x rstd, g = dy w, means over the columns of a row and the sum over all rows. All of it in fp32, whatever the
dtypes, and rounded once: models that round x^ to the dtype of x before they multiply by w differ in the last bit. y and
dx have the dtype of x, dweight that of weight. `weight` may be None; dweight is then a tensor of no elements.

dweight is deterministic: each program sums rows of its own, one after the other, and the partial sums [programs,
columns] are then summed. Which rows a program has depends on their number and on the device only.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

Shapes: x, dy, y, dx [..., columns]; weight, dweight [columns]; rstd [...], fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import launch

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)")


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y and rstd by plain torch ops, in fp32; in fp64 where `x` is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    y = wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    return y.to(x.dtype).contiguous(), rstd


def rms_norm_backward_reference(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dweight by plain torch ops, in fp32; in fp64 where `x` is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, inverse = dy.to(wide), rstd.unsqueeze(-1)
    normal = x * inverse
    scaled = dy if weight is None else dy * weight
    dx = inverse * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    if weight is None:
        return dx.to(x.dtype).contiguous(), x.new_empty(0)
    return dx.to(x.dtype).contiguous(), launch.rows_of(dy * normal).sum(0).to(weight.dtype)


def rms_norm_kernel(
    x, weight, y, rstd, rows, columns, x_stride, eps,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program normalises ROWS rows. `y` is contiguous, `x` has any stride between rows."""
    eps = tl.cast(eps, tl.float32)  # [Note: scalars in fp32]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + (row[:, None] * x_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=1) / columns + eps))
    tl.store(rstd + row, inverse, mask=row < rows)
    result = value * inverse[:, None]
    if HAS_WEIGHT:
        result *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (row[:, None] * columns + column[None, :]), result.to(y.dtype.element_ty), mask=inside)


def rms_norm_backward_kernel(
    dy, x, weight, rstd, dx, partial, rows, columns, dy_stride, x_stride, tiles,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program has `tiles` tiles of ROWS rows, one after the other, and one row of `partial`."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    present = column < columns
    if HAS_WEIGHT:
        factor = tl.load(weight + column, mask=present, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & present[None, :]
        grad = tl.load(dy + (row[:, None] * dy_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + (row[:, None] * x_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normal = value * inverse
        if HAS_WEIGHT:
            total += tl.sum(grad * normal, axis=0)
            grad *= factor
        mean = tl.sum(grad * normal, axis=1)[:, None] / columns
        result = inverse * (grad - normal * mean)
        tl.store(dx + (row[:, None] * columns + column[None, :]), result.to(dx.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(partial + (program * columns + column), total, mask=present)


@torch.library.impl(_LIBRARY, "rms_norm", "CompositeExplicitAutograd")
def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row of `x` has been divided by its root mean square and multiplied by `weight`.

    Args:
        x: of 1 to 65536 columns; copied first where no view has rows of one stride (`launch.rows_of`).
        weight: or None.
        eps: added to the mean of squares.

    Returns:
        y, contiguous, in the dtype of `x`; rstd in fp32. Both empty where there is no row.

    Raises:
        ValueError: a shape, dtype or device is not as it should be; names the tensor.
    """
    _check("rms_norm", x, weight)
    if not launch.runs_kernel(x):
        return rms_norm_reference(x, weight, eps)
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    flat = launch.rows_of(x)
    rows, columns = flat.shape
    if rows == 0:
        return y, rstd
    height, width, warps = launch.tile_of(columns)
    weight = None if weight is None else weight.contiguous()
    kernel = launch.jit(rms_norm_kernel)[(launch.ceil_div(rows, height),)]
    sizes = {"HAS_WEIGHT": weight is not None, "ROWS": height, "COLUMNS": width, "num_warps": warps}
    with torch.cuda.device_of(x):
        kernel(flat, flat if weight is None else weight, y, rstd, rows, columns, flat.stride(0), eps, **sizes)
    return y, rstd


@torch.library.impl(_LIBRARY, "rms_norm_backward", "CompositeExplicitAutograd")
def launch_rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `x` and `weight` have been computed from that of y, in one pass over `dy` and `x`.

    Args:
        dy: the gradient of y; like `x`, copied first where no view has rows of one stride.
        x: as given to `rms_norm`.
        weight: as given to `rms_norm`.
        rstd: as returned by it.

    Returns:
        dx, contiguous, in the dtype of `x`; dweight in that of `weight`, of no elements where that is None.

    Raises:
        ValueError: a shape, dtype or device is not as it should be; names the tensor.
    """
    _check("rms_norm_backward", x, weight, dy, rstd)
    if not launch.runs_kernel(x):
        return rms_norm_backward_reference(dy, x, weight, rstd)
    dx = x.new_empty(x.shape)
    flat, grad = launch.rows_of(x), launch.rows_of(dy)
    rows, columns = flat.shape
    height, width, warps = launch.tile_of(columns)
    programs = launch.num_programs(launch.ceil_div(rows, height), x.device)
    tiles = launch.ceil_div(launch.ceil_div(rows, height), programs)
    partial = x.new_empty((programs if rows and weight is not None else 0, columns), dtype=torch.float32)
    if rows:
        factor = flat if weight is None else weight.contiguous()
        kernel = launch.jit(rms_norm_backward_kernel)[(programs,)]
        strides = (grad.stride(0), flat.stride(0))
        sizes = {"HAS_WEIGHT": weight is not None, "ROWS": height, "COLUMNS": width, "num_warps": warps}
        with torch.cuda.device_of(x):
            kernel(grad, flat, factor, rstd.contiguous(), dx, partial, rows, columns, *strides, tiles, **sizes)
    return dx, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    dy: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
) -> None:
    launch.check_rows(op, x)
    launch.check_floats(op, x=x, weight=weight, dy=dy, rstd=rstd)
    if weight is not None:
        launch.check_shape(op, "weight", weight, x.shape[-1:])
    if dy is not None and rstd is not None:
        launch.check_shape(op, "dy", dy, x.shape)
        launch.check_shape(op, "rstd", rstd, x.shape[:-1])


@torch.library.register_fake("fxzero_kernels::rms_norm", lib=_LIBRARY)
def _fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    _check("rms_norm", x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("fxzero_kernels::rms_norm_backward", lib=_LIBRARY)
def _fake_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("rms_norm_backward", x, weight, dy, rstd)
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: torch.Tensor, _drstd: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = rms_norm_backward(dy, x, weight, rstd)
    return dx, None if weight is None else dweight, None


torch.library.register_autograd("fxzero_kernels::rms_norm", _differentiate, setup_context=_save, lib=_LIBRARY)

rms_norm = torch.ops.fxzero_kernels.rms_norm.default
rms_norm_backward = torch.ops.fxzero_kernels.rms_norm_backward.default
