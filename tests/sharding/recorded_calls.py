"""The distinct calls of captured steps, each with the values that it takes when the step runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.capture import CaptureOptions, Inventory, capture_step
from fxzero.capture.clipping import Clipping
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.signature import flatten_batch
from fxzero.capture.trace import Capture
from fxzero.graph.call_signature import call_signature
from fxzero.graph.step_graph import is_getitem, yields_tensor
from tests.hf.models import CASES, Batch

Optimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class RecordedCall:
    """A call of a captured step.

    Args:
        node: the call, whole on every rank.
        values: of the nodes that it takes.
    """

    node: fx.Node
    values: dict[fx.Node, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it takes, in the order of its arguments, as often as it takes it."""
        found: list[torch.Tensor] = []

        def note(source: fx.Node) -> fx.Node:
            if yields_tensor(source):
                found.append(self.values[source])
            return source

        fx.map_arg((self.node.args, self.node.kwargs), note)
        return found


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def muon(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=0.1)


def calls_of_models(*names: str, optimizer: Optimizer, clipped: bool = False) -> Iterator[RecordedCall]:
    """The calls of the steps of some of `tests/hf/models.py`."""
    for name in names:
        torch.manual_seed(0)
        batch = CASES[name].batch(torch.Generator().manual_seed(0))
        yield from calls_of_step(CASES[name].model(), batch, optimizer, loss=CASES[name].loss, clipped=clipped)


def calls_of_step(
    model: torch.nn.Module,
    batch: Batch,
    optimizer: Optimizer,
    *,
    loss: Callable[..., torch.Tensor] | None = None,
    clipped: bool = False,
) -> Iterator[RecordedCall]:
    """The calls of one step of a model."""
    options = CaptureOptions(clipping=Clipping(norm=1.0)) if clipped else None
    inventory = rehearse(Inventory.of(model, optimizer(list(model.parameters()))))[0]
    yield from recorded(capture_step(inventory, loss, (), batch, options=options), model, batch)


def distinct(calls: Iterable[RecordedCall]) -> Iterator[RecordedCall]:
    """The first call of each signature."""
    seen: set[Hashable] = set()
    known: dict[fx.Node, Hashable] = {}
    for call in calls:
        key = call_signature(call.node, known)
        if key not in seen:
            seen.add(key)
            yield call


def recorded(capture: Capture, model: torch.nn.Module, batch: Batch) -> Iterator[RecordedCall]:
    """The calls of one captured step that take tensors, as they run one after the other.

    Args:
        capture: of the step.
        model: whose parameters it takes; optimizer state is drawn.
        batch: keyword arguments of the step.
    """
    generator = torch.Generator().manual_seed(1)
    state = {**model.state_dict(), **dict(model.named_buffers())}
    given = {**dict(flatten_batch((), batch)[0]), **capture.constants, **state}
    values: dict[fx.Node, Any] = {}
    for node in capture.step.graph.nodes:
        if node.op == "placeholder":
            values[node] = _given(node, given, generator)
        elif node.op == "call_function":
            if not is_getitem(node) and any(map(yields_tensor, node.all_input_nodes)):
                taken = {source: _told_apart(values[source], generator) for source in node.all_input_nodes}
                yield RecordedCall(node, taken)
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)


def _given(node: fx.Node, given: dict[str, Any], generator: torch.Generator) -> Any:
    val, name = node.meta["val"], node.meta["entry"].name
    if not isinstance(val, torch.Tensor):
        return val
    if name in given:
        return given[name].detach()
    return torch.rand(val.shape, generator=generator, dtype=val.dtype)


def _told_apart(value: Any, generator: torch.Generator) -> Any:
    """A tensor of one number all over would hide that a rank takes a wrong part of it."""
    if not isinstance(value, torch.Tensor) or value.numel() < 2 or (value != value.flatten()[0]).any():
        return value
    if value.dtype is torch.bool:
        return torch.rand(value.shape, generator=generator) < 0.5
    if not value.is_floating_point() or not value.isfinite().all():
        return value
    return value + 0.1 * torch.rand(value.shape, generator=generator).to(value.dtype)
