"""Many comparisons in one start of ranks: each job's run beside a reference, and what the first difference is."""

import json
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from tests.numerics.worker import launch

Values = dict[str, torch.Tensor]


class Job(Protocol):
    """What is compared."""

    @property
    def name(self) -> str:
        """A test's id."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, gathered where it is a DTensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def parameters(model: nn.Module) -> Values:
    """The whole parameters of a model, by name."""
    return {name: whole(p) for name, p in model.named_parameters()}


def first_difference(a: Values, b: Values, *, rtol: float = 0.0) -> str:
    """The first value that two runs do not agree on, NaN being equal to NaN; "" where there is none."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()

    def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
        near = torch.allclose(x.double(), y.double(), rtol=rtol, atol=rtol * float(x.abs().max()), equal_nan=True)
        return x.dtype == y.dtype and near

    return next((f"{k}: {a[k].flatten()[:3]} and {b[k].flatten()[:3]}" for k in a if not alike(a[k], b[k])), "")


def run_jobs(path: str, jobs: Sequence[Any], run: Callable[[Any, int], str]) -> None:
    """What each rank does: every job in turn; rank 0 writes what all ranks found, a table of job names for each.

    Args:
        path: of the JSON file.
        jobs: the comparisons.
        run: (job, rank) -> the first difference.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for job in jobs:
        try:
            found[job.name] = run(job, dist.get_rank())
        except Exception:
            found[job.name] = traceback.format_exc()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(everywhere))
    dist.destroy_process_group()


def results_of(module: str, folder: Path, *, ranks: int) -> list[dict[str, str]]:
    """What the ranks of a module that calls `run_jobs` have found."""
    path = folder / "results.json"
    launch(module, str(path), ranks=ranks, timeout_s=480)
    return json.loads(path.read_text())


def check(job: Job, results: list[dict[str, str]], *, differs: bool) -> None:
    """A job's ranks agree with their reference; or, where they must not, do not."""
    for found in results:
        assert "Traceback" not in found[job.name], found[job.name]
    if differs:
        assert any(found[job.name] for found in results), "the fault was not seen"
    else:
        assert [found[job.name] for found in results] == [""] * len(results)
