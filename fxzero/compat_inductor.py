"""The private names of torch's compiler that fxzero uses; one function each, for torch 2.11 to 2.13.

Beside compat.py, of which it is the second half: a thin door, no fxzero logic, no state.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx


def decomposed(module: fx.GraphModule, fakes: list[Any]) -> fx.GraphModule:
    """The module in the ops that Inductor has kernels or patterns for, traced on fake tensors."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(module, decomposition_table=select_decomp_table())(*fakes)


def inductor_source(
    module: fx.GraphModule, fakes: list[Any], mode: Any
) -> tuple[str, list[int], list[tuple[Any, ...] | None]]:
    """The Python text that Inductor writes for a decomposed module, whose `call(list of tensors)` runs it.

    All outputs keep the strides of the graph. Compiles what the text needs, so that loading it finds that ready.

    Returns:
        The text, the inputs that its kernels take for aligned (GPU), and the strides of its outputs: whole numbers, or
        expressions of the symbols in the mode's environment.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner

    output = module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
    with tracing(TracingContext(mode)):
        compiled: Any = compile_fx_inner(module, fakes, is_inference=True)
    symbols = {str(symbol): symbol for symbol in mode.shape_env.var_to_range}

    def read(text: Any) -> Any:
        return int(text) if str(text).isdecimal() else sympy.sympify(str(text), locals=symbols)

    strides = [None if found is None else tuple(map(read, found)) for found in compiled.output_strides]
    return compiled.source_code, list(compiled.inputs_to_check), strides


def inductor_options(options: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Within the block Inductor's options have these values; names that a version lacks are left out."""
    from torch._inductor import config

    return config.patch({name: value for name, value in options.items() if _has(config, name)})


def _has(config: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def find_cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use; None where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, RuntimeError):
        return None


def has_onednn() -> bool:
    """Whether this build of torch multiplies by oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def mm_by_onednn() -> Any:
    """The op `fxzero_lower::mm_onednn(a, b)`: the product of two float32 matrices on the CPU, by oneDNN.

    Registered at the first call, as an op of one's own costs least: `torch.library.custom_op` takes 10 us a call more.
    """
    linear = torch.ops.mkldnn._linear_pointwise.default
    library = torch.library.Library("fxzero_lower", "FRAGMENT")
    library.define("mm_onednn(Tensor a, Tensor b) -> Tensor")
    library.impl("mm_onednn", lambda a, b: linear(a, b.t(), None, "none", [], ""), "CPU")
    library.impl("mm_onednn", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")
    _LIBRARIES.append(library)
    return torch.ops.fxzero_lower.mm_onednn.default


_LIBRARIES: list[Any] = []  # an op lives as long as the library that it is registered in


def vector_instructions() -> str:
    """The vector instructions that Inductor compiles for on this CPU."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa())


@contextlib.contextmanager
def inductor_cache(folder: str) -> Iterator[None]:
    """Within the block Inductor keeps what it compiles below `folder`."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(variable)
    os.environ[variable] = folder
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before
