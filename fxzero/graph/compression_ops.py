"""The ops that make a collective's message smaller: what is sent, how it is packed, how it is read again.

quantize_blockwise(x, form, block, parts) -> packed     what each of `parts` ranks is to have, one byte an element
dequantize_blockwise(packed, shape, ..) -> x            the rows of all parts, one part after the other
dequantize_reduce(packed, shape, .., op) -> rows        the sum ("sum") or mean ("avg") of the parts, element by element

[Note: packed blocks]
A tensor is cut along dim 0 into `parts` of equal size, a part (in memory order) into blocks of `block` elements, the
last of which may be shorter. An element x of a block whose largest finite absolute value is a becomes

    int8    q = round(127 x / a), an integer from -127 to 127;         |x' - x| <= a / 254
    fp8     q = (448 x / a) rounded to float8_e4m3fn;                  |x' - x| <= max(|x| / 16, a / 458752)

and is read again as x' = s q with the scale s = a / 127 (a / 448), of which a block sends one in fp32. A part's message
is its scales, then its q: one uint8 tensor, so one collective carries both. With a block as long as a row ("one scale
a row") and with blocks of a few hundred elements this is one op. What is not finite is read again as NaN, and no
neighbour of it is touched: the padding rows of a shard may hold anything.

Rounding is to the nearest and draws no random numbers, so that all ranks read the same values out of the same bytes.
Source: blockwise quantization as in 8-bit optimizers (Dettmers et al., 2022, section 2.1), for collectives ZeRO++ (Wang
et al., 2023, sections 3.1 and 3.3).

Shapes: p parts, n elements of a part, s scales of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

FORMS = ("int8", "fp8")
_GREATEST = {"int8": 127.0, "fp8": 448.0}
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_NOT_A_NUMBER = -128  # the one int8 that no finite element becomes; fp8 has a NaN of its own
_SMALLEST_SCALE = 2.0**-126  # of blocks that are zero: 1 / s must be finite
_TILE = 2**20  # elements worked on at a time: bounds the workspace, of a few tensors in fp32

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("quantize_blockwise(Tensor x, str form, int block, int parts) -> Tensor")
_LIBRARY.define(
    "dequantize_blockwise(Tensor packed, int[] shape, str form, int block, int parts, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "dequantize_reduce(Tensor packed, int[] shape, str form, int block, int parts, str op, ScalarType dtype) -> Tensor"
)


def num_scales(elements: int, block: int) -> int:
    """Blocks, and so scales, of a part with so many elements."""
    return -(-elements // block)


def packed_bytes(elements: int, block: int) -> int:
    """Bytes of the message of one part with so many elements: one each, and four a block."""
    return elements + 4 * num_scales(elements, block)


def wire_ratio(elements: int, block: int, element_size: int) -> float:
    """Bytes that a part takes packed, as a factor of those that it takes as it is."""
    return packed_bytes(elements, block) / (elements * element_size)


def _tiles(parts: int, elements: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Slices of [parts, elements], cut between blocks, of about _TILE elements each."""
    width = max(block, _TILE // block * block)
    height = max(1, _TILE // max(elements, 1))
    for part in range(0, parts, height):
        for first in range(0, elements, width):
            yield slice(part, min(part + height, parts)), slice(first, min(first + width, elements))


def _blocks_of(tile: torch.Tensor, block: int) -> torch.Tensor:
    """A tile [p, n] as blocks [p, s, block], zeros behind the last element."""
    missing = -tile.shape[1] % block
    padded = F.pad(tile, (0, missing)) if missing else tile
    return padded.reshape(tile.shape[0], -1, block)


@torch.library.impl(_LIBRARY, "quantize_blockwise", "CompositeExplicitAutograd")
def _quantize(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    flat = x.reshape(parts, -1)
    elements = flat.shape[1]
    scales = x.new_empty((parts, num_scales(elements, block)), dtype=torch.float32)
    packed = x.new_empty((parts, packed_bytes(elements, block)), dtype=torch.uint8)
    payload = packed[:, 4 * scales.shape[1] :]
    for part, tile in _tiles(parts, elements, block):
        blocks = _blocks_of(flat[part, tile], block)
        if blocks.dtype is not torch.float64:
            blocks = blocks.float()
        finite = blocks.isfinite()
        largest = torch.where(finite, blocks, 0.0).abs_().amax(-1, keepdim=True)
        scale = (largest / _GREATEST[form]).float().clamp_(min=_SMALLEST_SCALE)
        scales[part, tile.start // block : num_scales(tile.stop, block)] = scale[..., 0]
        scaled = (blocks / scale).clamp_(-_GREATEST[form], _GREATEST[form])
        if form == "int8":
            scaled = torch.where(finite, scaled.round_(), _NOT_A_NUMBER)
        else:
            scaled = torch.where(finite, scaled, math.nan)
        values = scaled.to(_DTYPES[form]).view(torch.uint8)
        payload[part, tile] = values.flatten(1)[:, : tile.stop - tile.start]
    packed[:, : 4 * scales.shape[1]] = scales.view(torch.uint8)
    return packed.flatten()


@torch.library.register_fake("fxzero::quantize_blockwise", lib=_LIBRARY)
def _quantize_fake(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    _check(x.shape, form, block, parts)
    return x.new_empty((parts * packed_bytes(x.numel() // parts, block),), dtype=torch.uint8)


def _check(shape: torch.Size | list[int], form: str, block: int, parts: int) -> None:
    if form not in FORMS or block < 1 or parts < 1 or len(shape) == 0 or shape[0] % parts:
        got = f"{form!r}, block {block}, {parts} parts of {list(shape)}"
        raise ValueError(f"expected a form of {FORMS}, and parts that divide dim 0, got {got}")


def _read(
    packed: torch.Tensor, elements: int, form: str, block: int, wide: torch.dtype
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(parts, elements, their values in the dtype `wide`) of packed parts, tile by tile."""
    parts = packed.numel() // packed_bytes(elements, block)
    rows = packed.view(parts, -1)
    count = num_scales(elements, block)
    scales = rows[:, : 4 * count].clone(memory_format=torch.contiguous_format).view(torch.float32)  # aligned
    payload = rows[:, 4 * count :]
    for part, tile in _tiles(parts, elements, block):
        raw = _blocks_of(payload[part, tile], block).view(_DTYPES[form])
        values = raw.to(wide)
        values *= scales[part, tile.start // block : num_scales(tile.stop, block)].unsqueeze(-1)
        if form == "int8":
            values.masked_fill_(raw == _NOT_A_NUMBER, math.nan)
        yield part, tile, values.flatten(1)[:, : tile.stop - tile.start]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@torch.library.impl(_LIBRARY, "dequantize_blockwise", "CompositeExplicitAutograd")
def _dequantize(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, dtype: torch.dtype
) -> torch.Tensor:
    out = packed.new_empty((parts, math.prod(shape) // parts), dtype=dtype)
    for part, tile, values in _read(packed, out.shape[1], form, block, _wide(dtype)):
        out[part, tile] = values
    return out.view(shape)


@torch.library.register_fake("fxzero::dequantize_blockwise", lib=_LIBRARY)
def _dequantize_fake(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, dtype: torch.dtype
) -> torch.Tensor:
    _check(shape, form, block, parts)
    _check_length(packed, math.prod(shape) // parts, block, parts)
    return packed.new_empty(shape, dtype=dtype)


def _check_length(packed: torch.Tensor, elements: int, block: int, parts: int) -> None:
    expected = parts * packed_bytes(elements, block)
    if packed.dtype is not torch.uint8 or tuple(packed.shape) != (expected,):
        raise ValueError(f"expected {expected} packed bytes, got {packed.dtype} {list(packed.shape)}")


@torch.library.impl(_LIBRARY, "dequantize_reduce", "CompositeExplicitAutograd")
def _reduce(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, op: str, dtype: torch.dtype
) -> torch.Tensor:
    wide = _wide(dtype)
    out = packed.new_zeros((math.prod(shape),), dtype=wide)
    for _, tile, values in _read(packed, out.shape[0], form, block, wide):
        for part in values:  # in the order of ranks
            out[tile] += part
    if op == "avg":
        out /= parts
    return out.to(dtype).view(shape)


@torch.library.register_fake("fxzero::dequantize_reduce", lib=_LIBRARY)
def _reduce_fake(
    packed: torch.Tensor, shape: list[int], form: str, block: int, parts: int, op: str, dtype: torch.dtype
) -> torch.Tensor:
    _check(shape, form, block, 1)
    _check_length(packed, math.prod(shape), block, parts)
    if op not in ("sum", "avg"):
        raise ValueError(f"expected 'sum' or 'avg', got {op!r}")
    return packed.new_empty(shape, dtype=dtype)


quantize_blockwise = torch.ops.fxzero.quantize_blockwise.default
dequantize_blockwise = torch.ops.fxzero.dequantize_blockwise.default
dequantize_reduce = torch.ops.fxzero.dequantize_reduce.default
OPS = (quantize_blockwise, dequantize_blockwise, dequantize_reduce)
