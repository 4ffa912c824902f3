"""A region's text compiled by Inductor: the Python text of a function, with its kernels beside it on disk."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sysconfig
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxzero import compat, compat_inductor
from fxzero.errors import LoweringError, PlanError
from fxzero.lower.conditions import conditions_on, hold
from fxzero.lower.region_text import read_region, written_inputs
from fxzero.lower.symbolic_text import Sizes, names_in

aten = torch.ops.aten

# Values at which a compiled region is checked for what fxzero has checked already, or keeps in files of its own.
OPTIONS: dict[str, Any] = {
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
    "fx_graph_cache": False,  # pickles
    "fx_graph_remote_cache": False,
    "fallback_random": True,
    "triton.cudagraphs": False,
}


@dataclass(frozen=True)
class Compiled:
    """What Inductor made of a region.

    Args:
        source: a Python module whose `call(inputs)` empties the list and returns the outputs.
        aligned: indices of inputs that its kernels take to start at a multiple of 16 bytes (GPU).
        conditions: what must be true of sizes that its text leaves open; see `conditions`.
    """

    source: str
    aligned: tuple[int, ...]
    conditions: tuple[str, ...] = ()


class PinnedError(LoweringError):
    """A region cannot be compiled for all sizes, as the compiler takes one number for one of them."""


def check_compiler(device: torch.device) -> None:
    """What Inductor needs on a device is there.

    Raises:
        PlanError: naming what is missing.
    """
    where, fix = "Plan.lowering", "or set lowering='eager'"
    if device.type == "cpu" and compat_inductor.find_cpp_compiler() is None:
        fix = f"install g++ or clang++, name one in the environment's CXX, {fix}"
        raise PlanError.of(where, expected="a C++ compiler for 'inductor' on the CPU", got="none", fix=fix)
    if device.type == "cpu" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        fix = f"install Python's headers (the package python3-dev, say), {fix}"
        expected = "the headers of this Python for 'inductor' on the CPU"
        raise PlanError.of(where, expected=expected, got=f"no {sysconfig.get_path('include')}/Python.h", fix=fix)
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        expected = f"the package triton for 'inductor' on {device.type}"
        raise PlanError.of(where, expected=expected, got="none", fix=f"pip install triton, {fix}")


def compile_region(text: str, *, threads: int, sizes: Sizes | None = None) -> Compiled:
    """Compile the region of a canonical text.

    Args:
        text: see `fxzero.lower.region_text`.
        threads: processes that compile its kernels beside each other.
        sizes: those that the text leaves open, as they are at present: where the compiler asks, they decide.

    Raises:
        PinnedError: where it cannot be compiled for all sizes.
        LoweringError: with what Inductor says.
    """
    env = compat.new_shape_env()
    mode = compat.new_fake_mode(env)
    names = names_in(json.loads(text))
    symbols = {name: compat.symbolic_size(env, (sizes or {})[name], name=f"size:{name}") for name in names}
    found = {compat.symbol_of(symbol): name for name, symbol in symbols.items()}  # before one is pinned
    module, fakes = read_region(text, mode, symbols)
    try:
        with mode, compat.kernels_for_symbols() if names else contextlib.nullcontext():
            traced = compat_inductor.decomposed(module, fakes)
        _write_back(traced, text)
        with compat_inductor.inductor_options({**OPTIONS, "compile_threads": threads}):
            source, aligned, strides = compat_inductor.inductor_source(traced, fakes, mode)
        _check_strides(traced, strides)
    except Exception as error:
        got = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ..")
        fix = "set eager_fallback=True to run it op by op, or lowering='eager'"
        raise LoweringError.of("a region", expected="a program that Inductor compiles", got=got, fix=fix) from error
    return Compiled(source, tuple(aligned), _conditions(env, found, sizes or {}))


def _conditions(env: Any, symbols: dict[Any, str], sizes: Sizes) -> tuple[str, ...]:
    """What the compiler has asked of the sizes, which must be true of the present ones, and leave them open."""
    fix = "wait: it is compiled for one shape"
    for symbol, name in symbols.items():
        if compat.pinned(env, symbol):
            raise PinnedError.of(name, expected="a region for all sizes", got=f"one for {sizes[name]}", fix=fix)
    conditions = conditions_on(env, symbols)
    for condition in conditions:
        if not hold([condition], sizes):
            raise PinnedError.of("a region", expected="conditions that can be asked", got=condition, fix=fix)
    return tuple(conditions)


def _check_strides(traced: torch.fx.GraphModule, strides: Sequence[tuple[Any, ...] | None]) -> None:
    """Outputs have the layout that what follows relies on; the stride of a dimension of one element says nothing."""
    outputs = traced.graph.output_node().args[0]
    for index, (node, found) in enumerate(zip(outputs, strides, strict=True)):  # type: ignore[arg-type]
        val = node.meta["val"]  # type: ignore[union-attr]
        if found is None or not val.numel():
            continue
        sized = [
            (stride, other) for size, stride, other in zip(val.shape, val.stride(), found, strict=True) if size > 1
        ]
        if not all(compat.is_same_size(stride, other) for stride, other in sized):
            raise ValueError(f"output {index} has strides {found} instead of {tuple(val.stride())}")


def _write_back(traced: torch.fx.GraphModule, text: str) -> None:
    """Let the last outputs go into the memory of the inputs that they are written to."""
    written = written_inputs(text)
    if not written:
        return
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    output = graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    values = returned[len(returned) - len(written) :]
    with graph.inserting_before(output):
        for index, value in zip(written, values, strict=True):
            copy = graph.call_function(aten.copy_.default, (placeholders[index], value))
            copy.meta["val"] = placeholders[index].meta["val"]
    output.args = (tuple(returned[: len(returned) - len(written)]),)
    traced.recompile()
