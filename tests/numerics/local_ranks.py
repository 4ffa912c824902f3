"""Runs a compiled graph for several ranks in one process, with real numerics (torch's LocalTensorMode).

Ranks are those of the graph's mesh, outermost axis first; a group of one axis is rank 0's, of which the mode makes the
others. What ranks of tp, sp and ep get of a batch is all of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fxzero import Plan, StepGraph, compat_distributed
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.signature import flatten_batch
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import SPLIT_AXES, Placement
from fxzero.graph.ops import local_shard
from fxzero.recipe import recipe
from fxzero.runtime.program import Program
from fxzero.runtime.state import StepState
from fxzero.runtime.topology import Topology


@dataclass
class Outcome:
    """What one step left: the losses by rank, and the whole new state, by (kind, name)."""

    losses: dict[int, torch.Tensor]
    state: dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Mesh:
    """The ranks of a graph's mesh.

    Args:
        axes: axis -> size, outermost first, without the parts of axes within a node.
        nodes: axis -> size of its part within a node, where the graph has one.
    """

    axes: dict[str, int]
    nodes: dict[str, int]

    @classmethod
    def of(cls, step: StepGraph) -> Mesh:
        """The ranks that a graph is for."""
        nodes = {axis: step.mesh[c10d.node_axis(axis)] for axis in step.mesh if c10d.node_axis(axis) in step.mesh}
        parts = {c10d.node_axis(axis) for axis in nodes}
        return cls({axis: size for axis, size in step.mesh.items() if axis not in parts}, nodes)

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(math.prod(self.axes.values()))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> index of a rank on it; that of an axis within a node, too."""
        found = {}
        for axis, size in reversed(self.axes.items()):
            rank, found[axis] = divmod(rank, size)
        return found | {c10d.node_axis(axis): found[axis] % size for axis, size in self.nodes.items()}

    def data_index(self, rank: int) -> int:
        """Which batch a rank gets."""
        index, found = 0, self.coordinates(rank)
        for axis, size in self.axes.items():
            index = index if axis in SPLIT_AXES else index * size + found[axis]
        return index

    def groups(self) -> dict[str, Any]:
        """Axis -> the process group of rank 0 along it."""
        spans = self.axes | {c10d.node_axis(axis): size for axis, size in self.nodes.items()}
        base = {c10d.node_axis(axis): axis for axis in self.nodes}
        found = {}
        for axis, size in spans.items():
            along = base.get(axis, axis)
            stride = math.prod(list(self.axes.values())[list(self.axes).index(along) + 1 :])
            members = [index * stride for index in range(size)]
            found[axis] = dist.group.WORLD if members == [*self.ranks] else dist.new_group(members)
        return found


def compile_for(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any, plan: Plan) -> StepGraph:
    """The graph that a plan makes of a step, for the ranks of its mesh."""
    capture = capture_step(rehearse(Inventory.of(model, optimizer))[0], None, batch, {})
    capture.step.mesh = dict(plan.axes)
    return recipe(plan, backend="fake").run(capture.step)


def run_ranks(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], plan: Plan, *, step: StepGraph
) -> Outcome:
    """One step of `step` on all ranks at once, as by `train_ranks`."""
    return train_ranks(model, optimizer, [batches], plan, step=step)


def train_ranks(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[list[Any]],
    plan: Plan,
    *,
    step: StepGraph,
    constants: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """Steps of `step` on all ranks at once; the i-th of the data axes gets `batches[n][i]` at step n.

    A batch is a tuple of arguments, or a dict of keyword arguments; `constants` are the capture's. The losses are the
    last step's. State that is a Python number must not change between steps; model and optimizer are not changed.
    """
    mesh = Mesh.of(step)
    model, optimizer = copy.deepcopy((model, optimizer))
    state = StepState(
        model, optimizer, Topology(Plan(zero=plan.zero).resolve(1), None, "none"), device=torch.device("cpu")
    )
    state.bind()
    if dist.is_initialized() and dist.get_world_size() != len(mesh.ranks):
        dist.destroy_process_group()
    if not dist.is_initialized():
        compat_distributed.fake_process_group(len(mesh.ranks))
    assert all(len(batch) == 1 + max(map(mesh.data_index, mesh.ranks)) for batch in batches)
    program = Program(step, groups=mesh.groups())
    values: dict[tuple[str, str], Any] = {}
    for batch in batches:
        for node in step.placeholders:
            entry = node.meta["entry"]
            if entry.kind == "constant":
                values[entry.key] = (constants or {})[entry.name]
            elif entry.key not in values or entry.kind == "batch":
                values[entry.key] = _value(node, state, batch, mesh)
        with compat_distributed.local_tensor_mode(len(mesh.ranks)):
            outputs = program.run(list(values.values()))
    losses = next(v for key, v in zip(program.outputs, outputs, strict=True) if key[0] == "loss")
    after = {}
    for node in step.inputs("parameter", "optimizer", "auxiliary"):
        value = values[node.meta["entry"].key]
        if isinstance(value, torch.Tensor):
            parts = compat_distributed.local_values(value) if not isinstance(value, torch.nn.Parameter) else None
            after[node.meta["entry"].key] = value if parts is None else _whole(node, parts, mesh)
    return Outcome(compat_distributed.local_values(losses), after)


def _value(node: Any, state: StepState, batches: list[Any], mesh: Mesh) -> Any:
    entry, ranks = node.meta["entry"], mesh.ranks
    if entry.kind == "coordinate":
        return compat_distributed.local_int({rank: mesh.coordinates(rank)[entry.name] for rank in ranks})
    if entry.kind == "batch":
        leaves = [_leaves(batch) for batch in batches]
        return compat_distributed.local_tensor({rank: leaves[mesh.data_index(rank)][entry.name] for rank in ranks})
    if entry.kind == "auxiliary":
        val = node.meta["val"]
        return compat_distributed.local_tensor({rank: torch.zeros(val.shape, dtype=val.dtype) for rank in ranks})
    value = state.lookup(Inventory.of(state.model, state.optimizer), entry.kind, entry.name)
    if not isinstance(value, torch.Tensor):
        return value
    parts = {rank: _part(node, value.detach(), mesh, rank) for rank in ranks}
    assert all(part.shape == node.meta["val"].shape for part in parts.values()), f"{node.name} has other parts"
    return compat_distributed.local_tensor(parts)


def _leaves(batch: Any) -> dict[str, Any]:
    args, kwargs = ((), batch) if isinstance(batch, dict) else (tuple(batch), {})
    return dict(flatten_batch(args, kwargs)[0])


def _part(node: Any, whole: torch.Tensor, mesh: Mesh, rank: int) -> torch.Tensor:
    """What a rank holds of the whole: of each axis that splits it, in the order of the mesh, then its rows by ZeRO."""
    index, placements = mesh.coordinates(rank), node.meta.get("placements", {})
    for axis, size in mesh.axes.items():
        whole = split(whole, placements[axis], size)[index[axis]] if axis in placements else whole
    sharding = node.meta.get("sharding")
    if sharding is None:
        return whole.clone(memory_format=torch.contiguous_format)
    return local_shard(whole, sharding.num_shards, index[sharding.axis])


def _whole(node: Any, parts: dict[int, torch.Tensor], mesh: Mesh) -> torch.Tensor:
    """What ranks hold parts of: `_part` undone, one axis after the other."""
    sharding, placements = node.meta.get("sharding"), node.meta.get("placements", {})
    by_index = {tuple(mesh.coordinates(rank)[axis] for axis in mesh.axes): part for rank, part in parts.items()}
    if sharding is not None:
        by_index = _merged(by_index, [*mesh.axes].index(sharding.axis), lambda found: torch.cat(found)[: sharding.rows])
    for position, axis in reversed(list(enumerate(mesh.axes))):
        is_split = axis in placements and placements[axis].is_shard
        if sharding is not None and axis == sharding.axis:
            continue
        merge = (lambda found, axis=axis: join(found, placements[axis])) if is_split else _the_same(node)
        by_index = _merged(by_index, position, merge)
    (whole,) = by_index.values()
    return whole


def _merged(
    parts: dict[tuple[int, ...], torch.Tensor], position: int, merge: Callable[[list[torch.Tensor]], torch.Tensor]
) -> dict[tuple[int, ...], torch.Tensor]:
    """What ranks that differ in one coordinate have together."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for index, part in sorted(parts.items(), key=lambda item: item[0]):
        found.setdefault((*index[:position], 0, *index[position + 1 :]), []).append(part)
    return {index: merge(together) for index, together in found.items()}


def _the_same(node: Any) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    def merge(found: list[torch.Tensor]) -> torch.Tensor:
        assert all(torch.equal(found[0], other) for other in found), f"ranks differ in {node.name}"
        return found[0]

    return merge


def split(whole: torch.Tensor, placement: Placement, ranks: int) -> list[torch.Tensor]:
    """What each rank of an axis holds of a tensor."""
    assert not placement.is_partial, "no rank knows its summand of a value"
    if not placement.is_shard:
        return [whole] * ranks
    blocks = whole.unflatten(placement.dim, (placement.blocks, ranks, -1))
    return [blocks.select(placement.dim + 1, rank).flatten(placement.dim, placement.dim + 1) for rank in range(ranks)]


def join(parts: list[torch.Tensor], placement: Placement) -> torch.Tensor:
    """`split` of a shard undone."""
    blocks = [part.unflatten(placement.dim, (placement.blocks, -1)) for part in parts]
    return torch.stack(blocks, placement.dim + 1).flatten(placement.dim, placement.dim + 2)
