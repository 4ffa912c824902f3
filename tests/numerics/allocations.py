"""What torch's CPU allocator gave out while a block ran: an account that knows nothing of graphs.

The allocator is that of tests/benchmarks/memory_counter.cpp, which sees every thread. (torch's profiler sees the thread
that it was started in: what gloo's threads free would stay in its account.)
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from fxzero.runtime.program import Program

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@contextmanager
def benchmarks_importable() -> Iterator[None]:
    """The benchmark's scripts import each other as they lie."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path.remove(str(BENCHMARKS))


def build_counter(folder: Path) -> tuple[Path | None, str | None]:
    """(the library, None), or (None, why it cannot be built here)."""
    with benchmarks_importable():
        import compare
    return compare.build_memory_counter(sys.executable, folder)


@dataclass
class Account:
    """Bytes that were allocated after the beginning of the block and not freed.

    Attributes:
        setup_bytes: the most before the first program ran.
        peaks: the most between one program's start and the next one's, in order.
    """

    setup_bytes: int = 0
    peaks: list[int] = field(default_factory=list)

    @property
    def later_peak(self) -> int:
        """The least of all peaks but the first: in some step a thread of gloo may free a message late."""
        return min(self.peaks[1:])


class Counter:
    """Accounts of blocks of this process, whose tensors are counted from now on.

    Args:
        library: from `build_counter`.
    """

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        for read in (self._library.memory_counter_live, self._library.memory_counter_peak):
            read.restype = ctypes.c_int64
        self._library.memory_counter_start()

    @contextmanager
    def account(self) -> Iterator[Account]:
        """An account of the block, whole at its end."""
        account, parts, run = Account(), [], Program.run
        gc.collect()
        base = self._library.memory_counter_live()
        self._library.memory_counter_reset_peak()

        def cut() -> None:
            parts.append(self._library.memory_counter_peak() - base)
            self._library.memory_counter_reset_peak()

        def counted(program: Program, inputs: list[Any]) -> tuple[Any, ...]:
            cut()
            return run(program, inputs)

        with mock.patch.object(Program, "run", counted):
            yield account
        cut()
        account.setup_bytes, account.peaks = parts[0], parts[1:]
