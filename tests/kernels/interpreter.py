"""Triton's interpreter, switched on for a block of code and off again.

[Note: the interpreter beside other tests]
Triton asks TRITON_INTERPRET when a function is decorated: ours at their first launch, those of its own library (tl.sum)
when Triton is imported, which torch has done before any test is reached. So the variable is set for the block alone,
and for that long the functions of Triton's library are replaced by interpreted twins. The interpreter also replaces
parts of the language while it runs, and leaves some replaced. After the block all is as it was: other tests of the
process, and the processes that they start, see nothing of it. A kernel that was built in the block is kept under
another key than the compiled one (`launch.jit`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def interpreter() -> Iterator[None]:
    """Within the block, kernels that are built run on the CPU, one program after the other."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    libraries = (tl, tl.core, tl.math, tl.standard)
    twins: dict[int, object] = {}
    rewritten = mock.patch.object(InterpretedFunction, "rewritten_fn", {})  # its functions use names that go away again
    set_variable = mock.patch.dict(os.environ, TRITON_INTERPRET="1")
    with set_variable, rewritten, as_before(*libraries, tl.tensor, tl.dtype, tl.condition):
        for library in libraries:
            for name, value in list(vars(library).items()):
                if isinstance(value, JITFunction):  # none where Triton was imported with the variable set
                    setattr(library, name, twins.setdefault(id(value), InterpretedFunction(value.fn)))
        yield


@contextmanager
def as_before(*owners: Any) -> Iterator[None]:
    """After the block, modules and classes have the attributes that they had before."""
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            for name, value in list(vars(owner).items()):
                if name not in attributes:
                    delattr(owner, name)
                elif attributes[name] is not value:
                    setattr(owner, name, attributes[name])
