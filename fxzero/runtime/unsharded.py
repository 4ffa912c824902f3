"""The plain model, for evaluation, generation and saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fxzero.runtime.layout import gathered
from fxzero.runtime.state import StepState


@contextlib.contextmanager
def unsharded(state: StepState, *, writeback: bool) -> Iterator[nn.Module]:
    """Gather every parameter; the model has plain parameters until the block ends. All ranks must enter.

    Args:
        state: bound.
        writeback: copy what the block changed back into the rows.
    """
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for module in state.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    whole[parameter] = nn.Parameter(gathered(parameter), requires_grad=parameter.requires_grad)
                places.append((module, name, parameter))
    for module, name, parameter in places:
        module.register_parameter(name, whole[parameter])
    state.is_unsharded = True
    try:
        yield state.model
    finally:
        for module, name, parameter in places:
            module.register_parameter(name, parameter)
        state.is_unsharded = False
    if writeback:
        for parameter, full in whole.items():
            _write_part(parameter, full.detach())


def _write_part(parameter: torch.Tensor, part: torch.Tensor) -> None:
    """Copy this rank's part of a whole parameter, which the dims of the mesh split one after the other."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            size = part.shape[placement.dim]
            each = -(-size // mesh.size(axis))
            start = min(size, mesh.get_local_rank(axis) * each)
            part = part.narrow(placement.dim, start, min(each, size - start))
    parameter.detach().to_local().copy_(part)  # type: ignore[attr-defined]
