"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU; without Triton the tests skip."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.interpreter import interpreter

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
NUMBERS = itertools.count()

Mutant = Callable[..., ModuleType]


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    if torch.cuda.is_available():
        yield
        return
    with interpreter():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def mutant(tmp_path: Path) -> Iterator[Mutant]:
    """`mutant("rms_norm", "+ eps", "")` is that kernel file with another text, its ops in a namespace of their own."""
    made: list[str] = []

    def make(name: str, old: str, new: str) -> ModuleType:
        source = (KERNELS / f"{name}.py").read_text()
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {name}.py"
        module_name = f"{name}_mutant_{next(NUMBERS)}"
        path = tmp_path / f"{module_name}.py"
        path.write_text(source.replace(old, new).replace("fxzero_kernels", f"fxzero_kernels_{module_name}"))
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        made.append(module_name)
        spec.loader.exec_module(module)
        return module

    yield make
    for module_name in made:
        del sys.modules[module_name]
