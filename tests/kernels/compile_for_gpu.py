"""Compiles what launchers launch, for a GPU that need not be there: run by test_compilation.py as a program of its own.

    python -m tests.kernels.compile_for_gpu rms_norm
    python -m tests.kernels.compile_for_gpu rms_norm --after-the-interpreter

The interpreter runs kernels as Python and forgives what Triton's compiler refuses, and no tensor of a test is so large
that an offset of 32 bits would overflow. So each launcher is called on tensors of the CPU, and in place of the launch
its kernel is compiled for compute capability 9.0, with floats in fp64, as Inductor hands them over. The exit code is 1
where a kernel does not compile, computes in fp64, has an offset of 32 bits that is not one within a row, or, of those
that are told of aligned addresses, has no load of 16 bytes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from unittest import mock

import torch

from fxzero.kernels import launch
from tests.kernels.interpreter import interpreter
from tests.kernels.launches import LAUNCHES

WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\.b32")
F64_ALLOWED = ("arith.truncf", "tt.func", "tt.call", "tt.return")


def f64_faults(ttir: str) -> list[str]:
    """Lines of Triton's intermediate text that compute in fp64: all but the casts of arguments."""
    lines = [line.strip() for line in ttir.splitlines() if re.search(r"\bf64\b", line)]
    return [line for line in lines if not any(op in line for op in F64_ALLOWED) and not line.startswith("#loc")]


def offset_faults(ttir: str) -> list[str]:
    """Lines that add an offset of 32 bits to a pointer, where it is not one of columns alone.

    Offsets of columns, within one row or block, are ranges of constants: `tt.make_range` and what is added to it.
    """
    small = set(re.findall(r"(%\S+) = tt\.make_range", ttir))
    faults = []
    for line in ttir.splitlines():
        added = re.search(r"tt\.addptr \S+ (%\S+) : .*i32>?\s*(?:loc|$)", line)
        if added and added[1] not in small:
            faults.append(line.strip())
    return faults


def signature_of(kernel, values: dict[str, object]) -> tuple[dict[str, str], dict[str, object]]:
    """(argument -> type, argument -> constant value) as Triton's own launch has them, but with floats in fp64."""
    from triton.runtime.jit import mangle_type

    types, constants = {}, {}
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            types[parameter.name] = "fp64" if isinstance(value, float) else mangle_type(value)
    return types, constants


def compiling(faults: list[str]) -> Callable[..., None]:
    """What stands in for the launch of a kernel: it is compiled, and what is wrong with it is added to `faults`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    done: set[str] = set()

    def run(self, *args, grid, warmup, num_warps=4, **constants) -> None:
        source = ASTSource(self, *signature_of(self, dict(zip(self.arg_names, args, strict=False)) | constants))
        key = f"{self.__name__} {source.signature} {source.constants}"
        if key in done:
            return
        done.add(key)
        target, options = GPUTarget("cuda", 90, 32), {"num_warps": num_warps}
        texts = triton.compile(source, target=target, options=options).asm
        found = f64_faults(texts["ttir"]) + offset_faults(texts["ttir"])
        if constants.get("ALIGNED") and not WIDE_LOAD.search(texts["ptx"]):
            found.append("no load of 16 bytes, expected those of aligned tensors to be so wide")
        faults.extend(f"{self.__name__}: {fault}" for fault in found)
        print(self.__name__, flush=True)

    return run


def main() -> None:
    """Compiles every kernel of the launches named on the command line."""
    from triton.runtime.jit import JITFunction

    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    if "--after-the-interpreter" in sys.argv:
        with interpreter():
            for name in names:
                next(LAUNCHES[name](torch.device("cpu")))()
    faults: list[str] = []
    with (
        mock.patch.object(JITFunction, "run", compiling(faults)),
        mock.patch.object(launch, "runs_kernel", lambda x: True),
    ):
        for name in names:
            for call in LAUNCHES[name](torch.device("cpu")):
                call()
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
