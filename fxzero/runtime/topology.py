"""This rank's place in the mesh: groups and coordinates, made once from a resolved plan.

[Note: mesh of the state]
Ranks are numbered with the plan's last axis fastest. DTensor splits a dim by the mesh's dims in their order, outermost
first. Where tp and dp both split dim 0 of a tensor, tp must split first: ZeRO's rows are rows of what a tp rank holds;
and ep splits before tp, which has parts of its rank's experts. So the DTensors that model and optimizer own lie over a
mesh of their own, with ep and tp as its first dims: the same ranks and the same process groups, given to it in another
order. Two `Shard(0)` then mean what is meant, and gathers, checkpoints and redistribution, which all read mesh and
placements, need to know nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import STATE_AXES
from fxzero.graph.collectives import node_axis
from fxzero.plan import Plan
from fxzero.runtime import gloo
from fxzero.runtime.one_host import channel_key, open_channels
from fxzero.runtime.shared_memory import Channel


class SharedBytes(NamedTuple):
    """What ranks of a host read of each other lies in memory of its own, which torch's allocator does not know.

    Args:
        rows: this rank's rows of parameters. A step's predicted peak has them among its tensors.
        messages: made by this rank for what it sends, beside those.
    """

    rows: int
    messages: int


@dataclass(frozen=True)
class Topology:
    """The running counterpart of a plan's mesh.

    Args:
        plan: resolved.
        mesh: the device mesh; None in a single process without torch.distributed.
        backend: what carries collectives: "nccl", "gloo", "fake", or "shm" (gloo, on one host).
        groups: axis, or part of one -> its process group; with "shm" also `channel_key` of it -> its channel.
        state_mesh: what DTensors of the state lie over: the device mesh, ep and tp first; [Note: mesh of the state].
    """

    plan: Plan
    mesh: DeviceMesh | None
    backend: str
    groups: dict[str, Any] = field(default_factory=dict)
    state_mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, plan: Plan, device_type: str) -> Topology:
        """Resolve a plan against the running world.

        Raises:
            PlanError: if the mesh does not multiply to the world size.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(plan.resolve(1), None, "none")
        plan = plan.resolve(dist.get_world_size())
        axes = plan.axes
        mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        groups: dict[str, Any] = {axis: mesh.get_group(axis) for axis in axes}
        if plan.node_size and axes["dp"] > 1:
            groups[node_axis("dp")] = _node_group(mesh, tuple(axes), plan.node_size)
        backend = gloo.backend_of(mesh.get_group(next(iter(axes))), device_type)
        if backend == "gloo":
            gloo.rest_at_exit()
        return cls(plan, mesh, backend, groups, _in_order_of_state(mesh))

    def sharing_memory(self) -> Topology:
        """The same with channels through shared memory, where all ranks are CPU ranks of one host; all must call this.

        Raises:
            PlanError: if the plan says that collectives go through shared memory, and they cannot.
            RankMismatchError: naming a rank that does not come.
        """
        channels = open_channels(self.groups, timeout_s=self.plan.timeout_s) if self.backend == "gloo" else {}
        backend = c10d.SHM if channels else self.backend
        if self.world_size > 1:
            _check_carriers(self.plan, backend)
        keyed = {channel_key(axis): channel for axis, channel in channels.items()}
        return replace(self, backend=backend, groups=self.groups | keyed)

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank() if self.mesh is not None else 0

    @property
    def world_size(self) -> int:
        """Number of ranks of the mesh."""
        return self.mesh.size() if self.mesh is not None else 1

    @property
    def shared(self) -> SharedBytes:
        """The memory that this rank shares with the others of its host, as far as it was needed."""
        channels = [value for value in self.groups.values() if isinstance(value, Channel)]
        rows = sum(channel.rows.num_bytes // channel.size for channel in channels if channel.rows is not None)
        return SharedBytes(rows, sum(channel.room.num_bytes for channel in channels))

    def groups_along(self, *axes: str) -> list[list[int]]:
        """The ranks of each group along some axes together, lowest first; none where these have one rank."""
        axes = tuple(axis for axis in axes if self.plan.axes.get(axis, 1) > 1)
        if self.mesh is None or not axes:
            return []
        groups = ranks_along(self.mesh.mesh, tuple(self.plan.axes), *axes)
        return groups.sort(-1).values.tolist()  # type: ignore[no-any-return]

    def coordinate(self, axis: str) -> Any:
        """This rank's index on an axis, or on the part of dp within a node."""
        if axis == node_axis("dp"):
            return self.coordinate("dp") % self.plan.node_size
        return self.mesh.get_local_rank(axis) if self.mesh is not None else 0


def node_ranks(ranks: torch.Tensor, axes: Sequence[str], node_size: int) -> list[list[int]]:
    """The ranks of each node: neighbours on dp.

    Args:
        ranks: global ranks by their place in the mesh.
        axes: names of its dims.
        node_size: ranks of a node.
    """
    return ranks_along(ranks, axes, "dp").reshape(-1, node_size).tolist()  # type: ignore[no-any-return]


def ranks_along(ranks: torch.Tensor, axes: Sequence[str], *along: str) -> torch.Tensor:
    """One row for each group of ranks that differ on one axis alone, or on some.

    Args:
        ranks: global ranks by their place in the mesh.
        axes: names of its dims.
        along: one or some of them.
    """
    dims = [list(axes).index(axis) for axis in along]
    last = ranks.movedim(dims, list(range(-len(dims), 0)))
    return last.reshape(-1, math.prod(ranks.shape[dim] for dim in dims))


def _in_order_of_state(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh with ep and tp as its first dims, over the same process groups."""
    names = mesh.mesh_dim_names or ()
    first = [names.index(axis) for axis in STATE_AXES if axis in names]
    order = [*first, *(dim for dim in range(len(names)) if dim not in first)]
    if order == sorted(order):
        return mesh
    ranks = mesh.mesh.permute(order).contiguous()
    groups = [mesh.get_group(names[dim]) for dim in order]
    return DeviceMesh.from_group(
        groups, mesh.device_type, mesh=ranks, mesh_dim_names=tuple(names[dim] for dim in order)
    )


def _check_carriers(plan: Plan, backend: str) -> None:
    for key in ("all_gather", "reduce_scatter"):
        if getattr(plan, key) == c10d.SHARED_MEMORY and backend != c10d.SHM:
            raise PlanError.of(
                where=key,
                expected="CPU ranks that share the memory of one host (Linux, x86-64), over gloo",
                got=f"{backend}, or ranks that cannot open each other's memory",
                fix="leave it at 'auto'",
            )


def _node_group(mesh: DeviceMesh, axes: Sequence[str], node_size: int) -> Any:
    """The group of this rank's node; all ranks must call this."""
    group, _ = dist.new_subgroups_by_enumeration(node_ranks(mesh.mesh, axes, node_size))
    return group
