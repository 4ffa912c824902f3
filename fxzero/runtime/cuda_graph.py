"""The calls that make and replay a CUDA graph; all that is beside them is in `graphed_program.py`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fxzero.errors import PlanError
from fxzero.plan import Plan

Values = tuple[Any, ...]


class Captured(Protocol):
    """Launches that were recorded once.

    Attributes:
        values: what was returned, in memory that each replay writes over.
    """

    values: Values

    def replay(self) -> None:
        """Launch all of them again."""


class GraphCalls(Protocol):
    """What a device must do for steps in one graph.

    Attributes:
        device: where its tensors are.
    """

    device: torch.device

    def capture(self, run: Callable[[], Values]) -> Captured:
        """Record what a function launches, of which nothing is executed."""

    def send(self, numbers: Sequence[float], into: torch.Tensor) -> None:
        """Copy numbers of the host into a tensor of the device, behind what was launched before, without a wait."""

    def pool_bytes(self) -> int:
        """Device memory that the graphs hold for what they compute."""


class CudaCalls:
    """Graphs of one GPU that share a pool of memory.

    They may: none runs while another does, and what a replay returns is copied before the next.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[CudaCaptured] = weakref.WeakSet()

    def capture(self, run: Callable[[], Values]) -> Captured:
        """Record what a function launches.

        Other threads of the process go on calling CUDA meanwhile: the one that watches over NCCL asks events.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            if not self._graphs:  # torch ends a pool with its last graph
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                values = run()
        captured = CudaCaptured(graph, values)
        self._graphs.add(captured)
        return captured

    def send(self, numbers: Sequence[float], into: torch.Tensor) -> None:
        """Copy numbers through pinned memory, which torch gives to nobody else before the copy has ended."""
        into.copy_(torch.tensor(numbers, dtype=into.dtype, pin_memory=True).view(into.shape), non_blocking=True)

    def pool_bytes(self) -> int:
        """What torch's allocator has taken from the device for the pool."""
        segments = torch.cuda.memory_snapshot(self._pool, include_traces=False) if self._graphs else ()
        return sum(int(segment["total_size"]) for segment in segments)


class CudaCaptured:
    """A CUDA graph with what it returns."""

    def __init__(self, graph: torch.cuda.CUDAGraph, values: Values) -> None:
        self._graph = graph
        self.values = values

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


def graph_calls(plan: Plan, device: torch.device, *, backend: str) -> GraphCalls | None:
    """What makes graphs of a plan's steps; None where it asks for none.

    Args:
        plan: of the step.
        device: that it runs on.
        backend: what carries its collectives; "none" where there are none.

    Raises:
        PlanError: the device has no graphs, or collectives run on the host.
    """
    if not plan.cuda_graph:
        return None
    if device.type != "cuda":
        fix = "move the model to a GPU, or leave cuda_graph out"
        raise PlanError.of("Plan.cuda_graph", expected="a model on cuda", got=f"one on {device.type}", fix=fix)
    if backend not in ("none", "nccl"):
        fix = "init_process_group('nccl'), or leave cuda_graph out"
        raise PlanError.of("Plan.cuda_graph", expected="collectives over nccl", got=backend, fix=fix)
    return CudaCalls(device)
