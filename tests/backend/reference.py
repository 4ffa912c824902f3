"""A loop as users write it, run plainly and through torch.compile(backend=fxzero)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from fxzero.backend import fxzero_backend
from tests.lower.interpreted import Interpreted, interpreted

Batch = tuple[torch.Tensor, ...]


def compiled(function: Any, dynamic: bool | None = None, **options: Any) -> Any:
    """The function or model through the door."""
    return torch.compile(function, backend=fxzero_backend, dynamic=dynamic, options=options)


@contextlib.contextmanager
def regions_interpreted() -> Iterator[Interpreted]:
    """Within the block lowering="inductor" needs no compiler."""
    with interpreted() as store, mock.patch("fxzero.backend.programs.check_compiler", lambda device: None):
        yield store


def train(
    build: Callable[[], nn.Module],
    batch: Callable[[int], Batch],
    wrap: Callable[[nn.Module], Any] = lambda model: model,
    *,
    steps: int = 6,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and state after some steps of AdamW; the random stream goes on from step to step."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    called = wrap(model)
    losses = []
    for step in range(steps):
        loss = called(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(got: tuple[list[float], dict[str, torch.Tensor]], want: tuple[list[float], dict]) -> None:
    """Bit for bit."""
    assert got[0] == want[0]
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name
