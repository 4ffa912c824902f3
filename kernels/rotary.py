"""Rotary position embedding of queries or keys, and its gradient.

    rotary(x, cos, sin, interleaved) -> y                    y = x cos + R(x) sin
    rotary_backward(dy, cos, sin, interleaved) -> dx         dx = dy cos - R(dy sin)

R rotates each pair of elements, (u, v) -> (-v, u). A pair is elements i and i + D/2 ("rotate half", as Llama in
transformers), or 2 i and 2 i + 1 where `interleaved` (the paper). cos and sin have a value for each element, not for
each pair. The gradient is the adjoint, for any cos and sin: the same kernel with sin negated, and exchanged within each
pair, which changes nothing where a pair shares its angle. In fp32, whatever the dtypes, and rounded once to the dtype
of x.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.

Shapes: x, y, dy, dx [B, H, S, D] with any strides, such as the transpose of [B, S, H, D]; cos, sin [S, D] or [B, S, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import launch

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

_MOST_ROWS = 32  # positions of a tile

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
_LIBRARY.define("rotary_backward(Tensor dy, Tensor cos, Tensor sin, bool interleaved) -> Tensor")


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """y by plain torch ops, in fp32; in fp64 where `x` is. It has the strides of `x`, where `x` is dense."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    result = wide * cos.unsqueeze(-3) + _rotated(wide, interleaved) * sin.unsqueeze(-3)
    return torch.empty_like(x).copy_(result)


def rotary_backward_reference(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """dx by plain torch ops, in fp32; in fp64 where `dy` is. It has the strides of `dy`, where `dy` is dense."""
    wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
    result = wide * cos.unsqueeze(-3) - _rotated(wide * sin.unsqueeze(-3), interleaved)
    return torch.empty_like(dy).copy_(result)


def _rotated(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary_kernel(
    x, cos, sin, y, heads, positions, half, x_batch, x_head, x_position, x_element,
    y_batch, y_head, y_position, y_element, cos_batch, cos_position, sin_batch, sin_position,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program rotates ROWS positions of one head. cos and sin lie contiguous along their last dimension."""
    along = (positions + ROWS - 1) // ROWS
    sequence = (tl.program_id(0) // along).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    row = (tl.program_id(0) % along).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, COLUMNS)[None, :]
    inside = (row < positions) & (pair < half)
    if INTERLEAVED:
        one = (2 * pair).to(tl.int64)
        two = one + 1
    else:
        one = pair.to(tl.int64)
        two = one + half
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    cos += batch * cos_batch
    sin += batch * sin_batch
    u = tl.load(x + (row * x_position + one * x_element), mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + (row * x_position + two * x_element), mask=inside, other=0.0).to(tl.float32)
    u_cos = tl.load(cos + (row * cos_position + one), mask=inside, other=0.0).to(tl.float32)
    v_cos = tl.load(cos + (row * cos_position + two), mask=inside, other=0.0).to(tl.float32)
    u_sin = tl.load(sin + (row * sin_position + one), mask=inside, other=0.0).to(tl.float32)
    v_sin = tl.load(sin + (row * sin_position + two), mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        u_result = u * u_cos + v * v_sin
        v_result = v * v_cos - u * u_sin
    else:
        u_result = u * u_cos - v * u_sin
        v_result = v * v_cos + u * v_sin
    tl.store(y + (row * y_position + one * y_element), u_result.to(y.dtype.element_ty), mask=inside)
    tl.store(y + (row * y_position + two * y_element), v_result.to(y.dtype.element_ty), mask=inside)


@torch.library.impl(_LIBRARY, "rotary", "CompositeExplicitAutograd")
def launch_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Every pair of elements of `x` has been rotated by the angle of its position.

    Args:
        x: queries or keys, read in place whatever their strides.
        cos: of the angles, for each position and element.
        sin: likewise.
        interleaved: pairs are neighbours; else an element of the first half and its twin of the second.

    Returns:
        y, in the dtype of `x`, with its strides where these are dense.

    Raises:
        ValueError: a shape, dtype or device is not as it should be; names the tensor.
    """
    _check("rotary", "x", x, cos, sin)
    if not launch.runs_kernel(x):
        return rotary_reference(x, cos, sin, interleaved)
    return _launch(x, cos, sin, interleaved, backward=False)


@torch.library.impl(_LIBRARY, "rotary_backward", "CompositeExplicitAutograd")
def launch_rotary_backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The gradient of x has been computed from that of y; cos and sin have none.

    Args:
        dy: the gradient of y, read in place whatever its strides.
        cos: as given to `rotary`.
        sin: as given to `rotary`.
        interleaved: as given to `rotary`.

    Returns:
        dx, in the dtype of `dy`, with its strides where these are dense.

    Raises:
        ValueError: a shape, dtype or device is not as it should be; names the tensor.
    """
    _check("rotary_backward", "dy", dy, cos, sin)
    if not launch.runs_kernel(dy):
        return rotary_backward_reference(dy, cos, sin, interleaved)
    return _launch(dy, cos, sin, interleaved, backward=True)


def _launch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, *, backward: bool
) -> torch.Tensor:
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    batches, heads, positions, elements = x.shape
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    strides = (*x.stride(), *y.stride(), *_table_strides(cos), *_table_strides(sin))
    columns = launch.power_of_2(elements // 2)
    rows = min(_MOST_ROWS, launch.power_of_2(positions), max(1, launch.TILE // columns))
    warps = 4 if rows * columns <= launch.TILE else 8
    kernel = launch.jit(rotary_kernel)[(batches * heads * launch.ceil_div(positions, rows),)]
    sizes = {"INTERLEAVED": interleaved, "BACKWARD": backward, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    with torch.cuda.device_of(x):
        kernel(x, cos, sin, y, heads, positions, elements // 2, *strides, **sizes)
    return y


def _table_strides(table: torch.Tensor) -> tuple[int, int]:
    """Between batches, none where they share the table, and between positions."""
    return table.stride(0) if table.dim() == 3 else 0, table.stride(-2)


def _check(op: str, name: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if x.dim() != 4 or x.shape[3] % 2:
        expected, got = "shape [batch, heads, positions, an even number]", f"{name} = {launch.described(x)}"
        raise launch.refused(op, expected=expected, got=got, fix="view it so")
    launch.check_floats(op, **{name: x, "cos": cos, "sin": sin})
    batched = (x.shape[0], *x.shape[2:])
    for table_name, table in (("cos", cos), ("sin", sin)):
        launch.check_shape(op, table_name, table, batched if table.dim() == 3 else batched[1:])


@torch.library.register_fake("fxzero_kernels::rotary", lib=_LIBRARY)
def _fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    _check("rotary", "x", x, cos, sin)
    return torch.empty_like(x)


@torch.library.register_fake("fxzero_kernels::rotary_backward", lib=_LIBRARY)
def _fake_backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    _check("rotary_backward", "dy", dy, cos, sin)
    return torch.empty_like(dy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.interleaved = inputs[3]


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:3]):
        raise NotImplementedError("fxzero_kernels::rotary: expected cos and sin without gradient; detach them")
    return rotary_backward(dy, *ctx.saved_tensors, ctx.interleaved), None, None, None


torch.library.register_autograd("fxzero_kernels::rotary", _differentiate, setup_context=_save, lib=_LIBRARY)

rotary = torch.ops.fxzero_kernels.rotary.default
rotary_backward = torch.ops.fxzero_kernels.rotary_backward.default
