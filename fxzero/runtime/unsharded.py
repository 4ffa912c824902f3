"""The plain model, for evaluation, generation and saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
                    full = parameter.detach().full_tensor()  # type: ignore[attr-defined]
                    if full.untyped_storage().nbytes() != full.nbytes:
                        full = full.clone()  # rows of a padded gather: the rest is nobody's
                    whole[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad)
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
            _write_rows(parameter, full.detach())


def _write_rows(parameter: torch.Tensor, full: torch.Tensor) -> None:
    assert isinstance(parameter, DTensor)
    local = parameter.detach().to_local()  # type: ignore[attr-defined]
    shards = [axis for axis, p in enumerate(parameter.placements) if p.is_shard()]
    if shards:
        index = parameter.device_mesh.get_local_rank(shards[0])
        each = -(-parameter.shape[0] // parameter.device_mesh.size(shards[0]))
        full = full[index * each : index * each + local.shape[0]]
    local.copy_(full)
