"""Swappers of the CPU with small buffers, so that small tensors pass in several chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fxzero.errors import PlanError
from fxzero.runtime.swap import Swapper

BUFFER_BYTES = 8192

MakeSwapper = Callable[..., Swapper]


@pytest.fixture(scope="session")
def direct_io(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether the file system of the tests' directories takes direct I/O."""
    try:
        Swapper(torch.device("cpu"), directory=tmp_path_factory.mktemp("probe")).close()
    except PlanError:
        return False
    return True


@pytest.fixture
def make_swapper(tmp_path: Path, direct_io: bool) -> Iterator[MakeSwapper]:
    """`make_swapper(**options)` below tmp_path; with direct I/O where that works, unless `io` says otherwise."""
    made = []

    def make(**options: object) -> Swapper:
        if options.get("io") == "direct" and not direct_io:
            pytest.skip("the file system of the tests' directories refuses O_DIRECT")
        options.setdefault("io", "direct" if direct_io else "buffered")
        options = {"directory": tmp_path, "buffer_bytes": BUFFER_BYTES, "num_buffers": 3, **options}
        made.append(Swapper(torch.device("cpu"), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for swapper in made:
        swapper.close()


@pytest.fixture
def swapper(make_swapper: MakeSwapper) -> Swapper:
    return make_swapper()
