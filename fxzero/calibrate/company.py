"""The other ranks of this machine: they compute while one of them is timed, as in a step.

Cores share memory, caches and clock rates, so a rank alone is faster than any of several. GPUs share none of it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fxzero.calibrate.timing import settle
from fxzero.errors import HardwareError

READY = "computes"


def rank_environment(threads: int) -> dict[str, str]:
    """Of a process that stands for a rank: so many threads, this fxzero, and stacks if it crashes."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
    }


@contextlib.contextmanager
def company(count: int, *, threads: int) -> Iterator[None]:
    """So many processes compute meanwhile.

    Args:
        count: of them.
        threads: of each.

    Raises:
        HardwareError: if one does not begin to.
    """
    command = [sys.executable, "-c", f"from {__name__} import keep_computing; keep_computing()"]
    env = rank_environment(threads)
    others = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for other in others:
            assert other.stdout is not None
            if other.stdout.readline().strip() != READY:
                raise HardwareError.of(
                    f"calibration beside {count} other ranks",
                    expected="a process that computes",
                    got=f"exit code {other.wait()}",
                    fix="try --world 1, and look at what it said",
                )
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
            if other.stdout is not None:
                other.stdout.close()


def keep_computing() -> None:
    """Compute until the process that started this one ends it, or is gone."""
    parent = os.getppid()
    compute = Compute(torch.device("cpu"))
    print(READY, flush=True)
    while os.getppid() == parent:
        compute.run(10)


class Compute:
    """Compute in small chunks: a product and a sum, as in a step.

    Attributes:
        chunk_s: seconds of one, alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.randn(256, 256, device=device)
        self._vector = torch.randn(2**18, device=device)
        self.run(100)
        self.chunk_s = statistics.median(self.run(20) / 20 for _ in range(20))

    def run(self, chunks: int) -> float:
        """Seconds of so many."""
        began = time.perf_counter()
        for _ in range(chunks):
            torch.mm(self._matrix, self._matrix)
            torch.add(self._vector, self._vector)
        settle(self._matrix.device)
        return time.perf_counter() - began
