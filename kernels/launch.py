"""What all launchers ask: is there Triton, does a kernel run on this tensor, how do rows lie in memory.

[Note: Triton at the first launch]
A kernel is a plain function that names the language `tl`, which no module imports when it is imported: CPU builds of
torch bring no Triton. `jit` binds `tl`, and the helpers that a kernel calls, into a copy of the kernel's globals and
hands that to Triton, once for each kernel. So the namespace of a kernel file never changes, and tracing a graph of
these ops needs no Triton either.

[Note: where a kernel runs]
An op launches its kernel on tensors of a GPU, and on those of the CPU while the environment asks for Triton's
interpreter (TRITON_INTERPRET=1). Otherwise it runs the plain reference. The three agree up to the rounding of sums.

[Note: scalars in fp32]
A float reaches a kernel as fp32 from a launcher here, but as fp64 from Inductor. Each kernel casts its floats to fp32
first, or its arithmetic would silently become fp64, at a small fraction of the speed.
"""

from __future__ import annotations

import functools
import math
import os
import types
from collections.abc import Callable
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 2**16  # one program holds a row in registers
TILE = 2048  # elements that a program works on at a time, at least
_PROGRAMS_PER_PROCESSOR = 2
_PROGRAMS_INTERPRETED = 4  # more than one, so that partial sums are summed in the interpreter too


def interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether an op launches its kernel on `x`, and not the reference ([Note: where a kernel runs])."""
    return x.is_cuda or interpreted()


def jit(kernel: Callable[..., None], *helpers: Callable[..., Any]) -> Any:
    """The kernel can be launched: `jit(kernel)[grid](...)` ([Note: Triton at the first launch]).

    Args:
        kernel: a function in Triton's language, of which it knows the name `tl`.
        helpers: functions in that language which the kernel calls by name, each after those that it calls itself.

    Raises:
        ImportError: Triton is not installed.
    """
    return _jitted(kernel, helpers, interpreted())


@functools.cache
def _jitted(kernel: Callable[..., Any], helpers: tuple[Callable[..., Any], ...], _interpreted: bool) -> Any:
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        where = f"fxzero.kernels: {kernel.__name__}"
        message = f"{where}: expected the package triton, got none that can be imported; pip install triton"
        raise ImportError(message) from error
    known = {helper.__name__: _jitted(helper, helpers[:i], _interpreted) for i, helper in enumerate(helpers)}
    bound = types.FunctionType(kernel.__code__, {**kernel.__globals__, "tl": tl, **known}, kernel.__name__)
    bound.__annotations__ = kernel.__annotations__
    bound.__module__ = kernel.__module__
    return triton.jit(bound)


def refused(op: str, *, expected: str, got: str, fix: str) -> ValueError:
    """The error of a launcher that was given what no kernel takes, in one line."""
    return ValueError(f"fxzero_kernels::{op}: expected {expected}, got {got}; {fix}")


def described(x: torch.Tensor) -> str:
    """A tensor for an error message: dtype, shape, strides, device."""
    name = str(x.dtype).removeprefix("torch.")
    return f"{name} {list(x.shape)} with strides {list(x.stride())} on {x.device}"


def check_floats(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor that is there has a dtype that kernels take, and all are on one device.

    Raises:
        ValueError: with the tensor's name, shape and strides.
    """
    first = next(x for x in tensors.values() if x is not None)
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in FLOATS:
            got = f"{name} = {described(x)}"
            raise refused(op, expected="float32, bfloat16 or float16", got=got, fix="cast it")
        if x.device != first.device:
            got = f"{name} = {described(x)}"
            raise refused(op, expected=f"all tensors on {first.device}", got=got, fix="move it")


def check_shape(op: str, name: str, x: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """`x` has this shape.

    Raises:
        ValueError: with the tensor's name, shape and strides.
    """
    if tuple(x.shape) != tuple(shape):
        got = f"{name} = {described(x)}"
        raise refused(op, expected=f"{name} of shape {list(shape)}", got=got, fix="pass tensors that belong together")


def check_rows(op: str, x: torch.Tensor) -> None:
    """`x` has rows, and one program can hold a row.

    Raises:
        ValueError: with shape and strides.
    """
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_COLUMNS:
        expected = f"a last dimension of 1 to {MAX_COLUMNS} columns"
        raise refused(op, expected=expected, got=f"x = {described(x)}", fix="split the rows or use the plain ops")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., columns] as [rows, columns] whose columns lie side by side: a view where strides allow it, else a copy.

    Rows may have any one stride: a slice of columns, every second row. What no view can express (a transposed matrix,
    leading dimensions without a common stride, an expanded gradient) costs one more pass over memory.
    """
    rows = math.prod(x.shape[:-1])
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(rows, x.shape[-1])


def power_of_2(n: int) -> int:
    """The least power of two that is not less than `n`."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def tile_of(columns: int, *, most: int = MAX_COLUMNS) -> tuple[int, int, int]:
    """(rows, columns, warps) of one tile: powers of two, and as many rows as make up for short ones.

    Args:
        columns: of a row.
        most: columns of a tile at most; the kernel then goes over a row in several tiles.
    """
    width = min(power_of_2(columns), most)
    height = max(1, TILE // width)
    elements = height * width
    return height, width, 4 if elements <= 2048 else 8 if elements <= 8192 else 16 if elements <= 16384 else 32


def num_programs(tiles: int, device: torch.device) -> int:
    """Programs that share `tiles` tiles between them, each with a partial sum of its own: a few for each processor."""
    if device.type != "cuda":
        return max(1, min(tiles, _PROGRAMS_INTERPRETED))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, _PROGRAMS_PER_PROCESSOR * processors))
