"""A region's text as one Triton kernel: the Python text of a module that a person can read, with its launcher."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

import torch

from fxzero.errors import PlanError
from fxzero.kernels import launch, region_functions, region_ops, region_source, region_tiles
from fxzero.lower.inductor import Compiled
from fxzero.lower.row_document import Unsupported, row_document

_WRITERS = (launch, region_functions, region_ops, region_source, region_tiles)


def check_triton(device: torch.device) -> None:
    """Kernels in Triton's language can run on a device.

    Raises:
        PlanError: naming what is missing.
    """
    where, fix = "Plan.lowering", "or set lowering='eager'"
    if importlib.util.find_spec("triton") is None:
        raise PlanError.of(
            where, expected="the package triton for 'triton'", got="none", fix=f"pip install triton, {fix}"
        )
    if device.type != "cuda" and not (device.type == "cpu" and launch.interpreted()):
        raise PlanError.of(
            where,
            expected="a model on a GPU for 'triton', or Triton's interpreter on the CPU",
            got=f"a model on {device.type} and no TRITON_INTERPRET in the environment",
            fix=f"move the model, set TRITON_INTERPRET=1 before Python starts (slow, for tests), {fix}",
        )


def compile_region(text: str, *, autotune: bool = False) -> Compiled:
    """The module of a region's canonical text; Triton compiles its kernel when it first runs.

    Args:
        text: see `fxzero.lower.region_text`.
        autotune: at its first run on a GPU a few tiles are tried, and the fastest is kept.

    Raises:
        Unsupported: with the op and the shape that a kernel over rows cannot hold.
    """
    document = row_document(text)
    try:
        return Compiled(region_source.triton_source(document, autotune=autotune), ())
    except region_source.Unsupported as error:
        fix = "report it, and set eager_fallback=True to run the region op by op"
        expected = "an op that the generator of kernels has"
        raise Unsupported.of("a region", expected=expected, got=str(error), fix=fix) from error


@functools.cache
def generator() -> str:
    """What a module depends on beside its region: torch, and the files that write it and that it calls."""
    sources = "".join(Path(module.__file__ or "").read_text() for module in _WRITERS)
    return f"triton {torch.__version__} {hashlib.sha256(sources.encode()).hexdigest()}"
