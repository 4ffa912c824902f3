"""The ops of compressions that keep back what they do not send, and add it to the next gradient (error feedback).

power_basis(factor) -> factor             the matrix that a power iteration starts from: columns that are zero, as all
                                          are before the first step, become fixed pseudo-random ones
pack_top_k(x, k) -> packed                the k largest elements by magnitude and where they stand
drop_top_k(x, packed) -> x                x less what was packed of it
sum_top_k(packed, shape, .., op) -> rows  the sum ("sum") or mean ("avg") of what `parts` ranks packed, in the rows
                                          (dim 0) that shard `index` of `num_shards` owns, padded as by local_shard

[Note: packed elements]
A message is 2 k integers of 32 bits: the bits of k values in fp32, then their positions in the flattened tensor. Values
of one rank never collide, and ranks are added in order, so that all ranks that form the same rows form the same bits.

Source: power iteration with a warm start, PowerSGD (Vogels et al., 2019), section 3; the choice of elements by
magnitude, Deep Gradient Compression (Lin et al., 2018), section 3.
"""

from __future__ import annotations

import math

import torch

from fxzero.graph.ops import shard_rows

MAX_ELEMENTS = 2**31 - 1  # that a position of 32 bits can name

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("power_basis(Tensor factor) -> Tensor")
_LIBRARY.define("pack_top_k(Tensor x, int k) -> Tensor")
_LIBRARY.define("drop_top_k(Tensor x, Tensor packed) -> Tensor")
_LIBRARY.define(
    "sum_top_k(Tensor packed, int[] shape, int parts, str op, int num_shards, SymInt index, ScalarType dtype) -> Tensor"
)


@torch.library.impl(_LIBRARY, "power_basis", "CompositeExplicitAutograd")
def _power_basis(factor: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(1, factor.numel() + 1, device=factor.device)
    # integers, multiplied and mixed: the same on every device and rank, and no generator is touched
    mixed = (numbers * 2654435761) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    basis = ((mixed ^ (mixed >> 13)).to(torch.float64) / 2**31 - 1).to(factor.dtype).view(factor.shape)
    started = (factor != 0).any(dim=0, keepdim=True)
    return torch.where(started, factor, basis)


@torch.library.register_fake("fxzero::power_basis", lib=_LIBRARY)
def _power_basis_fake(factor: torch.Tensor) -> torch.Tensor:
    return factor.new_empty(factor.shape)


@torch.library.impl(_LIBRARY, "pack_top_k", "CompositeExplicitAutograd")
def _pack(x: torch.Tensor, k: int) -> torch.Tensor:
    flat = x.flatten()
    positions = flat.abs().topk(k, sorted=False).indices
    return torch.cat((flat[positions].float().view(torch.int32), positions.int()))


@torch.library.register_fake("fxzero::pack_top_k", lib=_LIBRARY)
def _pack_fake(x: torch.Tensor, k: int) -> torch.Tensor:
    if not 1 <= k <= x.numel() <= MAX_ELEMENTS:
        raise ValueError(f"expected k from 1 to {x.numel()}, of at most {MAX_ELEMENTS} elements, got {k}")
    return x.new_empty((2 * k,), dtype=torch.int32)


@torch.library.impl(_LIBRARY, "drop_top_k", "CompositeExplicitAutograd")
def _drop(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    values, positions = packed.chunk(2)
    out = x.clone(memory_format=torch.contiguous_format)
    # not zero: of a wider dtype, the digits that fp32 does not hold stay behind
    out.view(-1)[positions] -= values.view(torch.float32).to(x.dtype)
    return out


@torch.library.register_fake("fxzero::drop_top_k", lib=_LIBRARY)
def _drop_fake(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.impl(_LIBRARY, "sum_top_k", "CompositeExplicitAutograd")
def _sum(
    packed: torch.Tensor, shape: list[int], parts: int, op: str, num_shards: int, index: int, dtype: torch.dtype
) -> torch.Tensor:
    rows = [shard_rows(shape[0], num_shards), *shape[1:]]
    elements = math.prod(rows)
    first = index * elements
    total = packed.new_zeros((elements + 1,), dtype=torch.float32)  # the last one takes what other shards own
    for part in packed.view(parts, -1):
        values, positions = part.chunk(2)
        mine = positions.long() - first
        mine = torch.where((mine >= 0) & (mine < elements), mine, elements)
        total.index_add_(0, mine, values.view(torch.float32))
    total = total[:elements].view(rows)
    return (total / parts if op == "avg" else total.clone()).to(dtype)


@torch.library.register_fake("fxzero::sum_top_k", lib=_LIBRARY)
def _sum_fake(
    packed: torch.Tensor, shape: list[int], parts: int, op: str, num_shards: int, index: int, dtype: torch.dtype
) -> torch.Tensor:
    if op not in ("sum", "avg") or packed.dtype is not torch.int32 or packed.numel() % (2 * parts):
        raise ValueError(f"expected {parts} packed parts and 'sum' or 'avg', got {list(packed.shape)} and {op!r}")
    return packed.new_empty((shard_rows(shape[0], num_shards), *shape[1:]), dtype=dtype)


power_basis = torch.ops.fxzero.power_basis.default
pack_top_k = torch.ops.fxzero.pack_top_k.default
drop_top_k = torch.ops.fxzero.drop_top_k.default
sum_top_k = torch.ops.fxzero.sum_top_k.default
OPS = (power_basis, pack_top_k, drop_top_k, sum_top_k)
