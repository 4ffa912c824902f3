"""A tensor as bytes, and bytes as a tensor.

What is moved is always dense: each byte of the tensor once, with no holes. A dense tensor keeps its strides
(transposed or channels-last ones too). One that has holes or overlaps, such as `x[::2]` or `x.expand(...)`, is first
made dense as `clone()` makes it, so its strides are those that torch's `empty_like` gives, on fake tensors too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxzero.errors import OffloadError

Size = tuple[int, ...]


def contiguous_stride(shape: Sequence[int]) -> Size:
    """The strides of a contiguous tensor."""
    return tuple(torch.empty(tuple(shape), device="meta").stride())


def dense_stride(tensor: torch.Tensor) -> Size:
    """The strides that `clone()` gives: the tensor's own where it is dense."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides put each element in a place of its own and leave no holes."""
    meta = torch.empty_strided(tuple(shape), tuple(stride), device="meta")
    return same_order(shape, stride, dense_stride(meta))


def same_order(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two strides lay a shape out alike; the stride of a dim of one element says nothing."""
    if 0 in shape:
        return True
    return all(a == b for size, a, b in zip(shape, one, other, strict=True) if size != 1)


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of a dense tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def make_dense(tensor: torch.Tensor, stride: Sequence[int] | None = None) -> torch.Tensor:
    """The tensor itself, detached, where it lies in memory as `stride` says; else a copy that does.

    Args:
        tensor: with strides, on any device.
        stride: dense strides of the same shape; by default those that `clone()` gives.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    stride = dense_stride(tensor) if stride is None else tuple(stride)
    if same_order(tensor.shape, tensor.stride(), stride):
        return tensor
    return torch.empty_strided(tuple(tensor.shape), stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8[nbytes] over the memory of a dense tensor, in the order in which it lies there."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def from_bytes(memory: torch.Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor over uint8 memory that holds at least its bytes."""
    flat = memory[: num_bytes(shape, dtype)].view(dtype)
    return flat.as_strided(tuple(shape), tuple(stride))


def check_can_be_moved(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    """Raise unless a tensor is a plain one with strides, on the device whose tensors are moved.

    Raises:
        OffloadError: names the tensor.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if plain and tensor.device == device and not tensor.is_quantized:
        return
    raise OffloadError.of(
        f"tensor {name!r}",
        expected=f"a plain strided tensor on {device}",
        got=f"{type(tensor).__name__} with layout {tensor.layout} on {tensor.device}",
        fix="give its local tensor, or keep it on the device",
    )
