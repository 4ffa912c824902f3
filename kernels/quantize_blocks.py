"""Blockwise quantization of a message, and the sum of several such messages: the kernels of fxzero's compression ops.

    quantize_blockwise(x, form, block, parts) -> packed                       one byte an element, four a block
    dequantize_blockwise(packed, shape, form, block, parts, dtype) -> x       the rows of all parts
    dequantize_reduce(packed, shape, form, block, parts, op, dtype) -> rows   sum ("sum") or mean ("avg") of the parts

x is cut along dim 0 into `parts` of n elements, a part into s blocks of `block` elements, the last of which may be
shorter. With a the largest finite absolute value of a block and the scale c = max(a / 127, 2^-126) (448 for "fp8"),

    "int8"    q = round(x / c), halves to even; -128 where x is not finite
    "fp8"     q = float8_e4m3fn(x / c), halves to even; NaN where x is not finite

and x is read again as c q. A part is its s scales in fp32, then its n bytes q. Bit for bit the ops of
fxzero/graph/compression_ops.py on the CPU, where [Note: packed blocks] says more; so no product is fused with a sum,
and divisions are divisions (torch's on a GPU, by a number, are products with its reciprocal). Scales of a part need not
be aligned to four bytes and are therefore moved byte by byte. Blocks of more than 65536 elements, and fp64, are left to
the plain reference.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), section 2.1; for the bits of
float8_e4m3fn: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), table 1.

Shapes: x of any, contiguous or copied; packed uint8 [parts (n + 4 s)]; x again and rows of `shape`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fxzero.kernels import launch

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

FORMS = ("int8", "fp8")
_GREATEST = {"int8": 127.0, "fp8": 448.0}
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_NOT_A_NUMBER = -128
_SMALLEST_SCALE = 2.0**-126

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define("quantize_blockwise(Tensor x, str form, int block, int parts) -> Tensor")
_LIBRARY.define(
    "dequantize_blockwise(Tensor packed, int[] shape, str form, int block, int parts, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "dequantize_reduce(Tensor packed, int[] shape, str form, int block, int parts, str op, ScalarType dtype) -> Tensor"
)


def quantize_reference(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    """The message by plain torch ops."""
    elements = x.numel() // parts
    if elements == 0:
        return x.new_empty(0, dtype=torch.uint8)
    flat = x.reshape(parts, elements)
    blocks = F.pad(flat, (0, -elements % block)).reshape(parts, -1, block)
    blocks = blocks if blocks.dtype is torch.float64 else blocks.float()
    finite = blocks.isfinite()
    largest = torch.where(finite, blocks, 0.0).abs().amax(-1, keepdim=True)
    scale = (largest / _GREATEST[form]).float().clamp(min=_SMALLEST_SCALE)
    scaled = (blocks / scale).clamp(-_GREATEST[form], _GREATEST[form])
    scaled = torch.where(
        finite, scaled.round() if form == "int8" else scaled, _NOT_A_NUMBER if form == "int8" else math.nan
    )
    payload = scaled.to(_DTYPES[form]).view(torch.uint8).flatten(1)[:, :elements]
    return torch.cat((scale[..., 0].contiguous().view(torch.uint8), payload), dim=1).flatten()


def dequantize_reference(packed: torch.Tensor, elements: int, form: str, block: int, parts: int) -> torch.Tensor:
    """The parts [parts, elements] of a message by plain torch ops, in fp32."""
    count = launch.ceil_div(elements, block)
    if count == 0:
        return packed.new_empty((parts, 0), dtype=torch.float32)
    rows = packed.view(parts, -1)
    scales = rows[:, : 4 * count].clone(memory_format=torch.contiguous_format).view(torch.float32)
    raw = rows[:, 4 * count :].contiguous().view(_DTYPES[form])
    values = raw.float() * scales.repeat_interleave(block, dim=1)[:, :elements]
    return values.masked_fill(raw == _NOT_A_NUMBER, math.nan) if form == "int8" else values


def e4m3_of(value):
    """The bits of float8_e4m3fn nearest to a value of at most 448, halves to even, in an int32."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = ((tl.abs(value) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)  # multiples of 2^-9, below 2^-6
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


def value_of(raw, FORM: tl.constexpr):
    """The value of quantized bytes, before it is scaled."""
    code = raw.to(tl.int32)
    if FORM == "int8":
        value = tl.where(code == 128, float("nan"), (code - ((code & 128) << 1)).to(tl.float32))
    else:
        size = code & 127
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        value = tl.where((code & 128) != 0, -value, value)
        value = tl.where(size == 127, float("nan"), value)
    return value


def read_block(packed, base, index, element, count, present, inside, FORM: tl.constexpr):
    """What the blocks `index` of the part at `base` hold at `element`."""
    at = packed + (base + 4 * index)
    bits = tl.load(at, mask=present, other=0).to(tl.int32)
    bits |= tl.load(at + tl.full((1, 1), 1, tl.int64), mask=present, other=0).to(tl.int32) << 8
    bits |= tl.load(at + tl.full((1, 1), 2, tl.int64), mask=present, other=0).to(tl.int32) << 16
    bits |= tl.load(at + tl.full((1, 1), 3, tl.int64), mask=present, other=0).to(tl.int32) << 24
    scale = bits.to(tl.float32, bitcast=True)
    raw = tl.load(packed + (base + 4 * count + element), mask=inside, other=0)
    return value_of(raw, FORM) * scale


def quantize_kernel(
    x, packed, elements, block, count, blocks,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program packs ROWS blocks, of all `blocks` of all parts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part, index = row // count, row % count
    column = tl.arange(0, COLUMNS)[None, :]
    element = index * block + column
    present = row < blocks
    inside = present & (column < block) & (element < elements)
    value = tl.load(x + (part * elements + element), mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(value) < float("inf")
    if FORM == "int8":
        greatest = 127.0
    else:
        greatest = 448.0
    largest = tl.max(tl.where(finite, tl.abs(value), 0.0), axis=1)[:, None]
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, greatest, tl.float32)), 1.1754943508222875e-38)
    scaled = tl.div_rn(tl.where(finite, value, 0.0), tl.broadcast_to(scale, value.shape))
    scaled = tl.minimum(tl.maximum(scaled, -greatest), greatest)
    if FORM == "int8":
        code = tl.where(finite, ((scaled + 12582912.0) - 12582912.0).to(tl.int32), -128)
    else:
        code = tl.where(finite, e4m3_of(scaled), 127)
    base = part * (elements + 4 * count)
    tl.store(packed + (base + 4 * count + element), (code & 255).to(tl.uint8), mask=inside)
    bits = scale.to(tl.int32, bitcast=True)
    byte = tl.arange(0, 4)[None, :]
    tl.store(packed + (base + 4 * index + byte), ((bits >> (8 * byte)) & 255).to(tl.uint8), mask=present)


def dequantize_kernel(
    packed, out, elements, block, count, blocks,
    FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program reads ROWS blocks, of all `blocks` of all parts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part, index = row // count, row % count
    column = tl.arange(0, COLUMNS)[None, :]
    element = index * block + column
    present = row < blocks
    inside = present & (column < block) & (element < elements)
    value = read_block(packed, part * (elements + 4 * count), index, element, count, present, inside, FORM)
    tl.store(out + (part * elements + element), value.to(out.dtype.element_ty), mask=inside)


def reduce_kernel(
    packed, out, elements, block, count, parts,
    FORM: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program sums ROWS blocks over the parts, in their order."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    element = index * block + column
    present = index < count
    inside = present & (column < block) & (element < elements)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(parts):
        base = tl.cast(part, tl.int64) * (elements + 4 * count)
        total += read_block(packed, base, index, element, count, present, inside, FORM)
    if MEAN:
        total = tl.div_rn(total, tl.full(total.shape, 1.0, tl.float32) * parts)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


@torch.library.impl(_LIBRARY, "quantize_blockwise", "CompositeExplicitAutograd")
def launch_quantize(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    """The message of each part of `x` has been packed.

    Args:
        x: cut along dim 0; copied first where it is not contiguous.
        form: "int8" or "fp8".
        block: elements of a block.
        parts: into how many messages; divides dim 0.

    Returns:
        uint8, the messages one after the other.

    Raises:
        ValueError: a form, a block or a number of parts is not as it should be.
    """
    _check("quantize_blockwise", x.shape, form, block, parts)
    if not launch.runs_kernel(x) or block > launch.MAX_COLUMNS or x.dtype not in launch.FLOATS:
        return quantize_reference(x, form, block, parts)
    elements = x.numel() // parts
    count = launch.ceil_div(elements, block)
    packed = x.new_empty(parts * (elements + 4 * count), dtype=torch.uint8)
    if count == 0:
        return packed
    rows, columns, warps = launch.tile_of(block)
    kernel = launch.jit(quantize_kernel, e4m3_of)[(launch.ceil_div(parts * count, rows),)]
    sizes = {"FORM": form, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    with torch.cuda.device_of(x):
        kernel(x.contiguous(), packed, elements, block, count, parts * count, **sizes)
    return packed


@torch.library.impl(_LIBRARY, "dequantize_blockwise", "CompositeExplicitAutograd")
def launch_dequantize(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, dtype: torch.dtype
) -> torch.Tensor:
    """The parts of a message have been read again.

    Args:
        packed: as `quantize_blockwise` returns it.
        shape: of all parts together; `parts` divides its first entry.
        form: as given to `quantize_blockwise`.
        block: likewise.
        parts: likewise.
        dtype: of what is returned.

    Raises:
        ValueError: `packed` has not the bytes of such a message.
    """
    out = _fake_dequantize(packed, shape, form, block, parts, dtype)
    elements = out.numel() // parts
    if not launch.runs_kernel(packed) or block > launch.MAX_COLUMNS or dtype not in launch.FLOATS:
        return dequantize_reference(packed, elements, form, block, parts).to(dtype).view(shape)
    count = launch.ceil_div(elements, block)
    if count:
        rows, columns, warps = launch.tile_of(block)
        kernel = launch.jit(dequantize_kernel, value_of, read_block)[(launch.ceil_div(parts * count, rows),)]
        sizes = {"FORM": form, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
        with torch.cuda.device_of(packed):
            kernel(packed, out, elements, block, count, parts * count, **sizes)
    return out


@torch.library.impl(_LIBRARY, "dequantize_reduce", "CompositeExplicitAutograd")
def launch_reduce(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, op: str, dtype: torch.dtype
) -> torch.Tensor:
    """The parts of a message have been read and summed, in fp32 and in their order.

    Args:
        packed: the messages of `parts` ranks, one after the other.
        shape: of one part.
        form: as given to `quantize_blockwise`.
        block: likewise.
        parts: of how many ranks.
        op: "sum", or "avg" for the mean.
        dtype: of what is returned.

    Raises:
        ValueError: `packed` has not the bytes of such messages, or `op` is another.
    """
    out = _fake_reduce(packed, shape, form, block, parts, op, dtype)
    if not launch.runs_kernel(packed) or block > launch.MAX_COLUMNS or dtype not in launch.FLOATS:
        values = dequantize_reference(packed, out.numel(), form, block, parts)
        total = torch.zeros_like(values[0])
        for part in values:
            total += part
        return (total / parts if op == "avg" else total).to(dtype).view(shape)
    count = launch.ceil_div(out.numel(), block)
    if count:
        rows, columns, warps = launch.tile_of(block)
        kernel = launch.jit(reduce_kernel, value_of, read_block)[(launch.ceil_div(count, rows),)]
        sizes = {"FORM": form, "MEAN": op == "avg", "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
        with torch.cuda.device_of(packed):
            kernel(packed, out, out.numel(), block, count, parts, **sizes, enable_fp_fusion=False)
    return out


def _check(op: str, shape: torch.Size | list[int], form: str, block: int, parts: int) -> None:
    if form not in FORMS or block < 1 or parts < 1 or len(shape) == 0 or shape[0] % parts:
        expected, got = f"a form of {FORMS}, and parts that divide dim 0", f"{form!r}, block {block}, {parts} parts"
        raise launch.refused(op, expected=expected, got=f"{got} of {list(shape)}", fix="change them")


def _check_length(op: str, packed: torch.Tensor, elements: int, block: int, parts: int) -> None:
    expected = parts * (elements + 4 * launch.ceil_div(elements, block))
    if packed.dtype is not torch.uint8 or tuple(packed.shape) != (expected,) or not packed.is_contiguous():
        got = f"packed = {launch.described(packed)}"
        raise launch.refused(op, expected=f"{expected} packed bytes", got=got, fix="pass what was packed so")


@torch.library.register_fake("fxzero_kernels::quantize_blockwise", lib=_LIBRARY)
def _fake_quantize(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    _check("quantize_blockwise", x.shape, form, block, parts)
    elements = x.numel() // parts
    return x.new_empty(parts * (elements + 4 * launch.ceil_div(elements, block)), dtype=torch.uint8)


@torch.library.register_fake("fxzero_kernels::dequantize_blockwise", lib=_LIBRARY)
def _fake_dequantize(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, dtype: torch.dtype
) -> torch.Tensor:
    _check("dequantize_blockwise", shape, form, block, parts)
    _check_length("dequantize_blockwise", packed, math.prod(shape) // parts, block, parts)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("fxzero_kernels::dequantize_reduce", lib=_LIBRARY)
def _fake_reduce(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, op: str, dtype: torch.dtype
) -> torch.Tensor:
    _check("dequantize_reduce", shape, form, block, 1)
    _check_length("dequantize_reduce", packed, math.prod(shape), block, parts)
    if op not in ("sum", "avg"):
        raise launch.refused("dequantize_reduce", expected="'sum' or 'avg'", got=repr(op), fix="choose one of these")
    return packed.new_empty(shape, dtype=dtype)


quantize_blockwise = torch.ops.fxzero_kernels.quantize_blockwise.default
dequantize_blockwise = torch.ops.fxzero_kernels.dequantize_blockwise.default
dequantize_reduce = torch.ops.fxzero_kernels.dequantize_reduce.default
