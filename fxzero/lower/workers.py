"""Processes that compile regions beside this one.

A worker gets the texts that are not on disk yet, the last first, and puts what it compiles into the store; this process
begins at the front, and waits for a region only where a worker is at it. So nothing has to be sent back, and a worker
that fails is one that has not helped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fxzero.errors import LoweringError, PlanError
from fxzero.lower.inductor import compile_region
from fxzero.lower.store import Store
from fxzero.lower.symbolic_text import Sizes

VARIABLE = "FXZERO_COMPILE_PROCESSES"
_FEWEST_EACH = 3  # starting a worker takes as long as compiling two or three regions


def num_processes(ranks: int) -> int:
    """How many compile at a time for one of a host's ranks: $FXZERO_COMPILE_PROCESSES, else its share of cores.

    Raises:
        PlanError: the variable is no number.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return max(1, (os.cpu_count() or 1) // ranks)
    if not asked.isdecimal() or int(asked) < 1:
        raise PlanError(f"{VARIABLE}: expected a whole number of at least 1, got {asked!r}; unset it, or correct it")
    return int(asked)


@contextlib.contextmanager
def working_on(texts: Sequence[str], store: Store, *, processes: int, sizes: Sizes | None = None) -> Iterator[None]:
    """Until the block ends, further processes compile these regions, the last first.

    Args:
        texts: canonical texts of regions that are not on disk.
        store: that they go to.
        processes: that compile at a time, this one included.
        sizes: see `compile_region`.
    """
    import torch

    number = min(processes - 1, len(texts) // _FEWEST_EACH)
    workers = []
    for index in range(number):
        backwards = list(reversed(texts))
        turned = backwards[index * len(texts) // number :] + backwards[: index * len(texts) // number]
        job = {"folder": str(store.folder), "texts": turned, "threads": torch.get_num_threads(), "sizes": sizes}
        command = [sys.executable, "-m", __name__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        worker = subprocess.Popen(command, text=True, env=_environment(), **pipes)  # type: ignore[call-overload]
        workers.append(worker)
        worker.stdin.write(json.dumps(job))
        worker.stdin.close()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def _environment() -> dict[str, str]:
    """That of this process, with the same fxzero."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def main() -> None:
    """Compile the regions of a job that comes by stdin."""
    import torch

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    store = Store(Path(job["folder"]))
    for text in job["texts"]:
        with contextlib.suppress(LoweringError):  # the process that needs it will meet the same, and say so
            store.get(text, functools.partial(compile_region, text, threads=1, sizes=job["sizes"]))


if __name__ == "__main__":
    main()
