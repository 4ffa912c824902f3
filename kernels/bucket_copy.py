"""Many tensors into one flat buffer, with a cast, and out of it again: one launch each way.

    bucket_pack(tensors, dtype) -> flat        flat = cat(x for x in tensors, each in memory order), rounded to dtype
    bucket_unpack_(flat, tensors)              the tensors hold what was packed, rounded to their dtype

A tensor's place in the buffer is the sum of the sizes before it, without padding. The buffer's parts are one more role
of a table ([Note: tables] in multi_tensor.py), so a kernel only copies from one role to the other.

Source: gradient buckets as in torch's DistributedDataParallel (Li et al., 2020, section 3.2.3).

Shapes: tensors any, of one dtype and device; flat [sum of their sizes].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fxzero.kernels import launch, multi_tensor
from fxzero.kernels.multi_tensor import address_of, everywhere, place

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define("bucket_pack(Tensor[] tensors, ScalarType dtype) -> Tensor")
_LIBRARY.define("bucket_unpack_(Tensor flat, Tensor(a!)[] tensors) -> ()")


def pack_reference(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The flat buffer by plain torch ops."""
    return torch.cat([x.reshape(-1).to(dtype) for x in tensors])


def unpack_reference(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """The tensors have been read from the flat buffer by plain torch ops."""
    for x, part in zip(tensors, _parts(flat, tensors), strict=True):
        x.copy_(part.view(x.shape))


def copy_chunk(source_at, target_at, inside):
    """What is at these addresses, where `inside`, has been copied."""
    value = tl.load(source_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_at, value.to(target_at.dtype.element_ty), mask=inside)


def bucket_copy_kernel(
    places, chunks, source_type, target_type, count, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Each program copies one chunk of a tensor of the first role to the second; `*_type` have their dtypes."""
    tensor, first, size = place(places, chunks, places, False, BLOCK)
    offset = first + tl.arange(0, BLOCK)
    source_at = address_of(places, tensor, count, source_type, 1, ALIGNED) + offset
    target_at = address_of(places, tensor, count, target_type, 2, ALIGNED) + offset
    if first + BLOCK <= size:  # [Note: whole chunks]
        copy_chunk(source_at, target_at, everywhere(BLOCK))
    else:
        copy_chunk(source_at, target_at, offset < size)


@torch.library.impl(_LIBRARY, "bucket_pack", "CompositeExplicitAutograd")
def launch_bucket_pack(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All tensors lie one after the other in a new buffer.

    Args:
        tensors: at least one; copied first where it is not contiguous.
        dtype: of the buffer.

    Raises:
        ValueError: no tensor, or several dtypes or devices; names a tensor and its shape.
    """
    flat = _fake_pack(tensors, dtype)
    if not launch.runs_kernel(flat):
        return pack_reference(tensors, dtype)
    _copy([x.contiguous() for x in tensors], _parts(flat, tensors))
    return flat


@torch.library.impl(_LIBRARY, "bucket_unpack_", "CompositeExplicitAutograd")
def launch_bucket_unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """The tensors hold what lies in the buffer, one after the other.

    Args:
        flat: as `bucket_pack` returns it, perhaps in another dtype.
        tensors: what is written; contiguous.

    Raises:
        ValueError: the buffer has another size than the tensors together, or a tensor cannot be written so.
    """
    _fake_unpack(flat, tensors)
    if not launch.runs_kernel(flat):
        unpack_reference(flat, tensors)
        return
    _copy(_parts(flat, tensors), tensors)


def _parts(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return flat.split([x.numel() for x in tensors])


def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    table = multi_tensor.table_of([sources, targets])
    if not len(table.chunks):
        return
    kernel = launch.jit(bucket_copy_kernel, everywhere, place, address_of, copy_chunk)[(len(table.chunks),)]
    sizes = {"ALIGNED": table.aligned, "BLOCK": multi_tensor.BLOCK, "num_warps": multi_tensor.WARPS}
    with torch.cuda.device_of(sources[0]):
        kernel(table.places, table.chunks, sources[0], targets[0], len(sources), **sizes)


def _check_dtypes(op: str, tensors: Sequence[torch.Tensor], flat_dtype: torch.dtype) -> None:
    if not tensors:
        raise launch.refused(op, expected="at least one tensor", got="none", fix="leave the call out")
    if flat_dtype not in launch.FLOATS:
        name = str(flat_dtype).removeprefix("torch.")
        raise launch.refused(
            op, expected="a buffer in float32, bfloat16 or float16", got=name, fix="choose one of these"
        )
    for i, x in enumerate(tensors):
        launch.check_floats(op, **{"tensors[0]": tensors[0], f"tensors[{i}]": x})
        if x.dtype != tensors[0].dtype:
            expected, got = (
                f"one dtype, that of tensors[0] = {tensors[0].dtype}",
                f"tensors[{i}] = {launch.described(x)}",
            )
            raise launch.refused(op, expected=expected, got=got, fix="use a bucket for each dtype")


@torch.library.register_fake("fxzero_kernels::bucket_pack", lib=_LIBRARY)
def _fake_pack(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    _check_dtypes("bucket_pack", tensors, dtype)
    return tensors[0].new_empty(sum(x.numel() for x in tensors), dtype=dtype)


@torch.library.register_fake("fxzero_kernels::bucket_unpack_", lib=_LIBRARY)
def _fake_unpack(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    op = "bucket_unpack_"
    _check_dtypes(op, tensors, flat.dtype)
    launch.check_shape(op, "flat", flat, (sum(x.numel() for x in tensors),))
    launch.check_floats(op, **{"tensors[0]": tensors[0], "flat": flat})
    for i, x in enumerate([flat, *tensors]):
        if not x.is_contiguous():
            got = f"{f'tensors[{i - 1}]' if i else 'flat'} = {launch.described(x)}"
            raise launch.refused(op, expected="contiguous tensors", got=got, fix="make it contiguous")


bucket_pack = torch.ops.fxzero_kernels.bucket_pack.default
bucket_unpack_ = torch.ops.fxzero_kernels.bucket_unpack_.default
