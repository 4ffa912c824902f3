"""Private names of torch.distributed: process groups and their store, DTensors, ranks within one process.

Tried with torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch


def default_store() -> Any:
    """The key-value store of the default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def timeout_of(group: Any) -> timedelta:
    """How long collectives of a process group may take."""
    return group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[no-any-return]


def local_tensor_mode(world_size: int) -> Any:
    """Run the block for `world_size` ranks in one process, with real numerics."""
    from torch.distributed._local_tensor import LocalTensorMode

    return LocalTensorMode(world_size)


def local_int(values: Mapping[int, int]) -> Any:
    """An int that differs by rank, under `local_tensor_mode`."""
    from torch.distributed._local_tensor import LocalIntNode

    node = LocalIntNode(dict(values))
    return torch.SymInt(node)


def local_tensor(values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A tensor that differs by rank, under `local_tensor_mode`."""
    from torch.distributed._local_tensor import LocalTensor

    return LocalTensor(dict(values))


def local_values(value: Any) -> dict[int, torch.Tensor]:
    """The per-rank tensors of a value made under `local_tensor_mode`."""
    return dict(value._local_tensors)


def fake_process_group(world_size: int) -> None:
    """Start a default process group of `world_size` ranks whose collectives move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)


def dtensor_over(local: torch.Tensor, mesh: Any, placements: Any, *, shape: Any, stride: Any) -> Any:
    """A DTensor with this local tensor, left where it is: off the mesh's device, too.

    `DTensor.from_local` moves what is on another device; FSDP2 makes its offloaded parameters as this does.
    Covers torch 2.11 to 2.13.
    """
    from torch.distributed.tensor import DTensor

    if local.device.type == mesh.device_type:
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def dtensor_like(local: torch.Tensor, like: Any) -> Any:
    """A DTensor with this local tensor, in all else as another one: without the checks of `DTensor.from_local`."""
    from torch.distributed.tensor import DTensor

    return DTensor(local, like._spec, requires_grad=False)
