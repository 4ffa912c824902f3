"""The ops that fxzero adds to ATen: what a step graph needs and torch has no word for.

release(tensors)                            the end of an unsharded parameter's life; returns nothing
local_shard(x, num_shards, index) -> shard  rows of `x` (dim 0) that rank `index` of an axis owns, padded with
                                            zeros to ceil(rows / num_shards) so that all ranks agree on shapes
local_part(x, dim, num_parts, index, blocks=1) -> part
                                            the part of dim `dim` that rank `index` of an axis has, contiguous; the
                                            parts are equal, and a part has its share of each of the dim's blocks
put_part(x, dim, num_parts, index, blocks=1) -> whole
                                            zeros, but for that part, which is `x`
on_rank(x, rank, index) -> part             `x` where `index` is `rank`, zeros elsewhere: summed over ranks it is `x`
nonfinite(x) -> flag                        1.0 where `x` holds an infinity or a NaN, else 0.0; float32, 0-dim
on_device(number, *, device) -> tensor      a number of the host as a 0-dim tensor: float64, or int64 of an integer
"""

from __future__ import annotations

import math

import torch

_LIBRARY = torch.library.Library("fxzero", "DEF")
_LIBRARY.define("release(Tensor[] tensors) -> ()")
_LIBRARY.define("local_shard(Tensor x, int num_shards, SymInt index) -> Tensor")
_LIBRARY.define("local_part(Tensor x, int dim, int num_parts, SymInt index, int blocks=1) -> Tensor")
_LIBRARY.define("put_part(Tensor x, int dim, int num_parts, SymInt index, int blocks=1) -> Tensor")
_LIBRARY.define("on_rank(Tensor x, int rank, SymInt index) -> Tensor")
_LIBRARY.define("nonfinite(Tensor x) -> Tensor")
_LIBRARY.define("on_device(Scalar number, *, Device device) -> Tensor")


def shard_rows(rows: int, num_shards: int) -> int:
    """Rows of every padded shard when `rows` are split over `num_shards` ranks."""
    return -(-rows // num_shards)


@torch.library.impl(_LIBRARY, "release", "CompositeExplicitAutograd")
def _release(tensors: list[torch.Tensor]) -> None:
    return None


@torch.library.impl(_LIBRARY, "local_shard", "CompositeExplicitAutograd")
def _local_shard(x: torch.Tensor, num_shards: int, index: int) -> torch.Tensor:
    rows = shard_rows(x.shape[0], num_shards)
    own = x[min(index * rows, x.shape[0]) : min((index + 1) * rows, x.shape[0])]
    if own.shape[0] == rows:
        return own.clone(memory_format=torch.contiguous_format)
    out = x.new_zeros((rows, *x.shape[1:]))
    out[: own.shape[0]].copy_(own)
    return out


@torch.library.register_fake("fxzero::local_shard", lib=_LIBRARY)
def _local_shard_fake(x: torch.Tensor, num_shards: int, index: int) -> torch.Tensor:
    return x.new_empty((shard_rows(x.shape[0], num_shards), *x.shape[1:]))


@torch.library.impl(_LIBRARY, "local_part", "CompositeExplicitAutograd")
def _local_part(x: torch.Tensor, dim: int, num_parts: int, index: int, blocks: int = 1) -> torch.Tensor:
    size = x.shape[dim] // (num_parts * blocks)
    part = x.unflatten(dim, (blocks, num_parts * size)).narrow(dim + 1, index * size, size)
    return part.clone(memory_format=torch.contiguous_format).flatten(dim, dim + 1)


@torch.library.register_fake("fxzero::local_part", lib=_LIBRARY)
def _local_part_fake(x: torch.Tensor, dim: int, num_parts: int, index: int, blocks: int = 1) -> torch.Tensor:
    sizes = list(x.shape)
    sizes[dim] //= num_parts
    return x.new_empty(sizes)


@torch.library.impl(_LIBRARY, "put_part", "CompositeExplicitAutograd")
def _put_part(x: torch.Tensor, dim: int, num_parts: int, index: int, blocks: int = 1) -> torch.Tensor:
    whole, size = _put_part_fake(x, dim, num_parts, index).zero_(), x.shape[dim] // blocks
    place = whole.unflatten(dim, (blocks, num_parts * size)).narrow(dim + 1, index * size, size)
    place.copy_(x.unflatten(dim, (blocks, size)))
    return whole


@torch.library.register_fake("fxzero::put_part", lib=_LIBRARY)
def _put_part_fake(x: torch.Tensor, dim: int, num_parts: int, index: int, blocks: int = 1) -> torch.Tensor:
    sizes = list(x.shape)
    sizes[dim] *= num_parts
    return x.new_empty(sizes)


@torch.library.impl(_LIBRARY, "on_rank", "CompositeExplicitAutograd")
def _on_rank(x: torch.Tensor, rank: int, index: int) -> torch.Tensor:
    make = torch.clone if index == rank else torch.zeros_like
    return make(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("fxzero::on_rank", lib=_LIBRARY)
def _on_rank_fake(x: torch.Tensor, rank: int, index: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("fxzero::release", lib=_LIBRARY)
def _release_fake(tensors: list[torch.Tensor]) -> None:
    return None


@torch.library.impl(_LIBRARY, "nonfinite", "CompositeExplicitAutograd")
def _nonfinite(x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    # One reading of x: its greatest element is as finite as x is. A sum of squares could overflow by itself.
    greatest = torch.linalg.vector_norm(x, math.inf)
    return torch.isfinite(greatest).logical_not().float()


@torch.library.register_fake("fxzero::nonfinite", lib=_LIBRARY)
def _nonfinite_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((), dtype=torch.float32)


@torch.library.impl(_LIBRARY, "on_device", "CompositeExplicitAutograd")
def _on_device(number: float, *, device: torch.device) -> torch.Tensor:
    return torch.tensor(number, dtype=number_dtype(number), device=device)


@torch.library.register_fake("fxzero::on_device", lib=_LIBRARY)
def _on_device_fake(number: float, *, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=number_dtype(number), device=device)


def number_dtype(number: float) -> torch.dtype:
    """In which dtype a number of the host stands on the device."""
    return torch.int64 if isinstance(number, (int, torch.SymInt)) else torch.float64


release = torch.ops.fxzero.release.default
local_shard = torch.ops.fxzero.local_shard.default
local_part = torch.ops.fxzero.local_part.default
put_part = torch.ops.fxzero.put_part.default
on_rank = torch.ops.fxzero.on_rank.default
nonfinite = torch.ops.fxzero.nonfinite.default
on_device = torch.ops.fxzero.on_device.default


def padded_rows(local: torch.Tensor, rows: int, ranks: int) -> torch.Tensor:
    """Rows of a shard in memory that holds as many as every rank has: `local` itself where it does."""
    each = shard_rows(rows, ranks)
    if local.shape[0] == each and local.is_contiguous():
        return local
    memory = local.new_zeros((each, *local.shape[1:]))
    memory[: local.shape[0]].copy_(local)
    return memory
