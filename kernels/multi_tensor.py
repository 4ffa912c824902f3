"""Lists of tensors in one launch: what the optimizers' kernels share, the launch too. No op is defined here.

[Note: tables]
A launch gets the addresses and sizes of all tensors in one int64 tensor [1 + roles, n]: the sizes, then for each role
(parameters, gradients, ...) the addresses. A second one, int32 [programs, 2], says for each program which tensor it has
and which chunk of BLOCK elements. Both are built on the host, copied to the device once, and used again by launches of
the same stream: the second while sizes stay the same, the first, which is small, while addresses do too. What they say
depends on these numbers alone, so a tensor that was freed and another one in its place do no harm. Shards of a step
rest where they are; gradients do where the step's memory is planned or recorded in a CUDA graph, and else cost one
copy of a few KiB a step, which the host does not wait for.

[Note: 64-bit offsets]
An element's offset is chunk * BLOCK + i. The chunk number fits into 32 bits up to 2^42 elements, the product does not:
it is formed in 64 bits. tests/kernels/test_compilation.py reads this off the compiled kernels.

[Note: whole chunks]
Nothing is known of a size that is read from memory, so a mask that depends on it keeps the compiler from loads of 16
bytes. All chunks of a tensor but the last are whole: a kernel asks that once, and has a path without a mask for them.

[Note: numbers or tensors]
A rate, a correction, a scale or a coefficient is a Python number, or a tensor of one element where the host must not
know it: a captured CUDA graph, a loss scale. In a graph each has two arguments, `x` and `x_tensor`, of which the tensor
counts where it is there. Numbers are combined on the host in doubles, as torch's optimizers do, and rounded to fp32
once; tensors in fp32 on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import launch

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

BLOCK = 2048
WARPS = 8
GRADIENT_SCHEMA = (  # the last arguments of every update
    "float inverse_scale, Tensor? inverse_scale_tensor, float clip, Tensor? clip_tensor,"
    " Tensor? overflow, bool maximize"
)
Number = float | torch.Tensor
_ALIGNMENT_BYTES = 16  # of the widest load
_TABLES = 64  # kept at a time


@dataclass(frozen=True)
class Table:
    """Where the tensors of one launch are ([Note: tables]).

    Attributes:
        places: int64 [1 + roles, n], sizes in elements and addresses.
        chunks: int32 [programs, 2], tensor and chunk of each program.
        aligned: whether every address is one of 16 bytes, so that loads can be wide.
    """

    places: torch.Tensor
    chunks: torch.Tensor
    aligned: bool


def table_of(lists: Sequence[Sequence[torch.Tensor]]) -> Table:
    """The table of these lists, one list for each role, of which nothing is built that was there before."""
    addresses = tuple(tuple(x.data_ptr() for x in tensors) for tensors in lists)
    sizes, device = tuple(x.numel() for x in lists[0]), lists[0][0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    aligned = all(address % _ALIGNMENT_BYTES == 0 for role in addresses for address in role)
    return Table(_places(addresses, sizes, device, stream), _chunks(sizes, device, stream), aligned)


@functools.lru_cache(maxsize=_TABLES)
def _places(
    addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device, _stream: int
) -> torch.Tensor:
    return _on_device(torch.tensor([sizes, *addresses]), device)


@functools.lru_cache(maxsize=_TABLES)
def _chunks(sizes: tuple[int, ...], device: torch.device, _stream: int) -> torch.Tensor:
    counts = torch.tensor([launch.ceil_div(size, BLOCK) for size in sizes])
    tensors = torch.repeat_interleave(counts)
    firsts = (counts.cumsum(0) - counts)[tensors]
    return _on_device(torch.stack((tensors, torch.arange(len(tensors)) - firsts), dim=1).to(torch.int32), device)


def _on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: later launches of the same stream do."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def check(
    op: str, params: Sequence[torch.Tensor], *, fp32: Sequence[str] = (), **roles: Sequence[torch.Tensor]
) -> None:
    """Every role has a tensor for each parameter, of its size, contiguous, on its device; a role has one dtype.

    Args:
        params: the parameters; nothing is asked of a role's list where `params` is empty too.
        fp32: roles whose tensors are fp32; others are floats that kernels take.
        roles: name -> tensors.

    Raises:
        ValueError: with the name and place of a tensor, and its shape.
    """
    for name, tensors in {"params": params, **roles}.items():
        if len(tensors) != len(params):
            expected = f"{len(params)} {name}, one for each parameter"
            raise launch.refused(op, expected=expected, got=str(len(tensors)), fix="pass lists that belong together")
        dtypes = (torch.float32,) if name in fp32 else launch.FLOATS
        for i, (x, param) in enumerate(zip(tensors, params, strict=True)):
            fault = _fault(x, param, tensors[0], dtypes)
            if fault:
                got = f"{name}[{i}] = {launch.described(x)}"
                raise launch.refused(op, expected=fault, got=got, fix="split the lists, or make it contiguous")


def _fault(x: torch.Tensor, param: torch.Tensor, first: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What is expected of a tensor of a role that it is not, or None."""
    if x.dtype not in dtypes:
        return "dtype " + " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if x.dtype != first.dtype or x.device != first.device:
        return f"one dtype and device, {str(first.dtype).removeprefix('torch.')} on {first.device}"
    if x.device != param.device:
        return f"device {param.device}"
    if x.numel() != param.numel():
        return f"{param.numel()} elements, as its parameter"
    return None if x.is_contiguous() else "a contiguous tensor"


def check_numbers(op: str, params: Sequence[torch.Tensor], arguments: dict[str, Any]) -> None:
    """What stands for a number is a tensor of one element, on the device of the parameters.

    Raises:
        ValueError: with its name and shape.
    """
    for name, x in arguments.items():
        if params and isinstance(x, torch.Tensor) and (x.numel() != 1 or x.device != params[0].device):
            expected, got = f"one element on {params[0].device}", f"{name} = {launch.described(x)}"
            raise launch.refused(op, expected=expected, got=got, fix="pass a number or such a tensor")


def split(name: str, value: Number, device: torch.device) -> dict[str, Any]:
    """The two arguments that stand for a number or a tensor of one element ([Note: numbers or tensors])."""
    if not isinstance(value, torch.Tensor):
        return {name: value, f"{name}_tensor": None}
    if value.device != device:
        return {name: value.item(), f"{name}_tensor": None}  # lies on the host: no device is waited for
    return {name: math.nan, f"{name}_tensor": value}


def gradient_arguments(
    device: torch.device, *, inverse_scale: Number, clip: Number, overflow: torch.Tensor | None, maximize: bool
) -> dict[str, Any]:
    """The arguments of an op that GRADIENT_SCHEMA declares."""
    numbers = split("inverse_scale", inverse_scale, device) | split("clip", clip, device)
    return numbers | {"overflow": overflow, "maximize": maximize}


def chosen(arguments: dict[str, Any], name: str) -> Any:
    """The tensor where there is one, else the number."""
    tensor = arguments[f"{name}_tensor"]
    return arguments[name] if tensor is None else tensor


def skipped(overflow: torch.Tensor | None) -> bool:
    """Whether a reference leaves everything as it was."""
    return overflow is not None and bool(overflow != 0)


def gradient_of(grad: torch.Tensor, param: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """A gradient unscaled, clipped and with its sign, in fp32; in fp64 where the parameter is."""
    grad = grad.to(torch.promote_types(param.dtype, torch.float32))
    grad = grad * chosen(arguments, "inverse_scale") * chosen(arguments, "clip")
    return -grad if arguments["maximize"] else grad


def gradient_flags(arguments: dict[str, Any]) -> dict[str, bool]:
    """The constants of a kernel that say how it gets at a gradient."""
    return {
        "SCALE_TENSOR": arguments["inverse_scale_tensor"] is not None,
        "CLIP_TENSOR": arguments["clip_tensor"] is not None,
        "OVERFLOW": arguments["overflow"] is not None,
        "MAXIMIZE": arguments["maximize"],
    }


def is_done(reference: Callable[..., None], lists: Sequence[Sequence[torch.Tensor]], arguments: dict[str, Any]) -> bool:
    """Whether no kernel is needed: there are no tensors, or they were on the CPU and the reference has updated them."""
    if not lists[0]:
        return True
    if launch.runs_kernel(lists[0][0]):
        return False
    reference(*lists, **arguments)
    return True


def run(
    kernel: Callable[..., None],
    chunk: Callable[..., None],
    lists: Sequence[Sequence[torch.Tensor]],
    figures: Sequence[Any],
    arguments: dict[str, Any],
    **flags: Any,
) -> None:
    """Launch the kernel of an update once for all tensors.

    Args:
        kernel: takes the tables, four tensors of the dtypes of parameters, gradients, state and copies, the overflow,
            the number of tensors, `figures` and the two factors of gradients, in this order.
        chunk: what it calls for each chunk.
        lists: parameters, gradients, lists of state, copies; an empty list is no role.
        figures: numbers, or tensors of one element.
        arguments: of the op, those of GRADIENT_SCHEMA among them.
        flags: further constants of the kernel.
    """
    params, grads, *states, copies = lists
    table = table_of([tensors for tensors in lists if tensors])
    if not len(table.chunks):
        return
    types = [tensors[0] if tensors else params[0] for tensors in (params, grads, states[0], copies)]
    overflow = params[0] if arguments["overflow"] is None else arguments["overflow"]
    factors = chosen(arguments, "inverse_scale"), chosen(arguments, "clip")
    launched = launch.jit(kernel, scalar, everywhere, place, address_of, unscaled, chunk)[(len(table.chunks),)]
    with torch.cuda.device_of(params[0]):
        launched(
            table.places, table.chunks, *types, overflow, len(params), *figures, *factors,
            **gradient_flags(arguments), **flags, ALIGNED=table.aligned, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def scalar(x, IS_TENSOR: tl.constexpr):
    """A number, or the one element of a tensor, in fp32 ([Note: scalars in fp32])."""
    if IS_TENSOR:
        value = tl.load(x).to(tl.float32)
    else:
        value = tl.cast(x, tl.float32)
    return value


def everywhere(BLOCK: tl.constexpr):
    """A mask that hides nothing, and which the compiler drops."""
    return tl.full((BLOCK,), True, tl.int1)


def place(places, chunks, overflow, OVERFLOW: tl.constexpr, BLOCK: tl.constexpr):
    """(tensor, first offset, size) of this program's chunk; a size of 0 where gradients have overflowed."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    first = tl.load(chunks + (2 * program + 1)).to(tl.int64) * BLOCK  # [Note: 64-bit offsets]
    size = tl.load(places + tensor)
    if OVERFLOW:
        size = tl.where(tl.load(overflow) == 0, size, 0)
    return tensor, first, size


def address_of(places, tensor, count, like, ROW: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer, of the type of `like`, to a tensor of the role that has this row of the table."""
    address = tl.load(places + (tensor + count * ROW)).to(like.dtype)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


def unscaled(raw, inverse_scale, clip, MAXIMIZE: tl.constexpr):
    """A gradient as the update has it: in fp32, unscaled, clipped, with its sign."""
    grad = raw.to(tl.float32) * inverse_scale * clip
    if MAXIMIZE:
        grad = -grad
    return grad
