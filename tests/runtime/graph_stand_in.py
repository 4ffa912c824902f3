"""CUDA graphs without a GPU: what is captured is a function, a replay runs it on the tensors of the capture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from fxzero import compat
from fxzero.plan import Plan

Values = tuple[Any, ...]


class StandIn:
    """The calls of a device whose graphs run on the CPU.

    Args:
        refused: an op at which a capture fails.

    Attributes:
        captured: all graphs.
        sent: the numbers of each copy to the device.
    """

    def __init__(self, refused: Any = None) -> None:
        self.device = torch.device("cpu")
        self.refused = refused
        self.captured: list[StandInGraph] = []
        self.sent: list[list[float]] = []

    def capture(self, run: Callable[[], Values]) -> StandInGraph:
        """Nothing is executed, but up to an op that fails."""
        if self.refused is not None:
            with refusing(self.refused):
                run()
        self.captured.append(StandInGraph(run))
        return self.captured[-1]

    def send(self, numbers: Sequence[float], into: torch.Tensor) -> None:
        self.sent.append(list(numbers))
        into.copy_(torch.tensor(numbers, dtype=into.dtype).view(into.shape))

    def pool_bytes(self) -> int:
        return 3 * 2**20


class StandInGraph:
    """Each replay writes over what the first one has returned."""

    def __init__(self, run: Callable[[], Values]) -> None:
        self._run = run
        self.values: Values = ()
        self.num_replays = 0

    def replay(self) -> None:
        found = self._run()
        self.num_replays += 1
        if not self.values:
            self.values = tuple(value.clone() for value in found)
        for old, new in zip(self.values, found, strict=True):
            old.copy_(new)


def refusing(op: Any) -> Any:
    """A mode that fails at an op, as CUDA does at one that a capture cannot hold."""

    class Refusing(compat.dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is op:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
            return func(*args, **(kwargs or {}))

    return Refusing()


@contextlib.contextmanager
def graphs_on_the_cpu(refused: Any = None) -> Iterator[StandIn]:
    """Within the block steps compiled with `cuda_graph` run so."""
    calls = StandIn(refused)

    def graph_calls(plan: Plan, device: torch.device, *, backend: str) -> StandIn | None:
        return calls if plan.cuda_graph else None

    with mock.patch("fxzero.compile.graph_calls", graph_calls):
        yield calls
