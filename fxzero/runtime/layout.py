"""How one tensor of the state lies over the ranks: this rank's part of it, its memory, and the DTensor over that.

[Note: storage]
A sharded tensor rests as rows of dim 0 over the mesh axis dp. All ranks hold ceil(rows / ranks) rows, so that a
program is the same text everywhere; the last ones are padding. The module and the optimizer own a DTensor whose
local tensor is the unpadded view of that memory, so state dicts, checkpoints and schedulers see nothing unusual.
What ep and tp split is split first, in equal parts: a rank's memory is its part, contiguous, or the padded rows of
that part; [Note: mesh of the state] in `runtime/topology.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxzero import compat_distributed
from fxzero.capture.inventory import dense_strides
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED, STATE_AXES, Placement, divides, local_shape, placement_of, shard
from fxzero.graph.ops import local_shard, padded_rows, shard_rows
from fxzero.graph.step_graph import rests_as_rows, yields_tensor
from fxzero.runtime.topology import Topology

# (kind, name) of an entry -> mesh axis -> how its tensor lies over that
Placements = Mapping[tuple[str, str], Mapping[str, Placement]]


@dataclass(frozen=True)
class Place:
    """A rank's place on a mesh axis."""

    size: int = 1
    index: int = 0


@dataclass(frozen=True)
class Layout:
    """How one tensor lies, and what of it is this rank's; [Note: storage].

    Args:
        shape: single-device shape.
        over_tp: how what is this rank's by ep lies over tp, in equal parts.
        as_rows: what is this rank's by ep and tp rests as rows over dp.
        tp, dp: this rank's place on these axes.
        over_ep: how it lies over ep, in equal parts.
        ep: this rank's place on ep.
    """

    shape: tuple[int, ...]
    over_tp: Placement = REPLICATED
    as_rows: bool = False
    tp: Place = Place()
    dp: Place = Place()
    over_ep: Placement = REPLICATED
    ep: Place = Place()

    def __post_init__(self) -> None:
        shape = self.shape
        for axis, over, place in self._splits:
            parts = f"{over} over {place.size} ranks of {axis}"
            assert divides(shape, over, place.size), f"expected a shape that divides by {parts}: {shape}"
            shape = local_shape(shape, over, place.size)

    @property
    def _splits(self) -> tuple[tuple[str, Placement, Place], ...]:
        """(axis, how it lies over that, this rank's place), in the order in which they split."""
        return ("ep", self.over_ep, self.ep), ("tp", self.over_tp, self.tp)

    @property
    def is_split(self) -> bool:
        """Whether ranks hold different parts."""
        return self.as_rows or any(over.is_shard for _, over, _ in self._splits)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what is this rank's by ep and tp."""
        shape = self.shape
        for _, over, place in self._splits:
            shape = local_shape(shape, over, place.size)
        return shape

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """Shape of this rank's memory, padding included."""
        part = self.part_shape
        return (shard_rows(part[0], self.dp.size), *part[1:]) if self.as_rows else part

    def memory_of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's memory, of the whole tensor; without holes."""
        assert tuple(whole.shape) == self.shape, f"expected shape {self.shape}, got {tuple(whole.shape)}"
        part = whole.detach()
        for _, over, place in self._splits:
            each = part.shape[over.dim] // place.size if over.is_shard else 0
            part = part.narrow(over.dim, place.index * each, each) if over.is_shard else part
        if self.as_rows or tuple(part.shape) == self.shape:
            return self.memory_of_part(part)
        return part.clone(memory_format=torch.contiguous_format)  # a view would keep the whole

    def memory_of_part(self, part: torch.Tensor) -> torch.Tensor:
        """This rank's memory, of its part by ep and tp: that itself where it is all of it, without holes."""
        part = part.detach()
        if self.as_rows:
            return local_shard(part, self.dp.size, self.dp.index)
        return self.without_holes(part)

    def without_holes(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory with the same values: contiguous where ranks hold different parts."""
        if self.is_split:
            return memory.contiguous()
        return memory if memory.stride() == dense_strides(memory) else memory.clone()

    def memory_of_local(self, local: torch.Tensor) -> torch.Tensor:
        """This rank's memory, of a DTensor's local tensor: that itself where there is nothing to pad."""
        return padded_rows(local, self.part_shape[0], self.dp.size) if self.as_rows else local

    def local_of(self, memory: torch.Tensor) -> torch.Tensor:
        """The view of this rank's memory without its padding."""
        if not self.as_rows:
            return memory
        rows, each = self.part_shape[0], memory.shape[0]
        return memory[: max(0, min(each, rows - self.dp.index * each))]

    def placements(self, axes: Iterable[str]) -> tuple[Replicate | Shard, ...]:
        """As DTensor says it, for the dims of a mesh."""
        split = {axis: over.dim for axis, over, _ in self._splits if over.is_shard}
        split |= {"dp": 0} if self.as_rows else {}
        return tuple(Shard(split[axis]) if axis in split else Replicate() for axis in axes)

    def tensor_over(self, memory: torch.Tensor, mesh: DeviceMesh, strides: Sequence[int] | None = None) -> DTensor:
        """The DTensor over this rank's memory.

        Args:
            memory: of this rank.
            mesh: the topology's `state_mesh`.
            strides: of the whole tensor; None: of a contiguous one.
        """
        stride = strides or torch.empty(self.shape, device="meta").stride()
        placements = self.placements(mesh.mesh_dim_names or ())
        owned: DTensor = compat_distributed.dtensor_over(
            self.local_of(memory), mesh, placements, shape=torch.Size(self.shape), stride=stride
        )
        return owned


class Held(NamedTuple):
    """One tensor of the state: as model or optimizer own it, the memory behind it, and how it lies over the ranks.

    Args:
        owned: a DTensor; where there are no process groups, the memory itself or a Parameter of it.
        memory: of this rank, padding included.
        layout: None where there are no process groups.
    """

    owned: Any
    memory: torch.Tensor
    layout: Layout | None = None

    def whole(self) -> torch.Tensor:
        """The whole tensor, gathered onto the device wherever the parts rest; all ranks must call this."""
        if self.layout is None:
            return self.memory
        mesh = self.owned.device_mesh
        memory = self.memory.detach().to(mesh.device_type)
        return gathered(self.layout.tensor_over(memory, mesh, self.owned.stride()))


class Layouts:
    """The layouts of a step's state: over ep and tp as its programs have it, over dp as its plan says.

    [Note: bound before it is laid out]
    How tensors lie over ep and tp is known when the first program is. A checkpoint may be loaded before that, and then
    needs tensors to be loaded into. They rest in parts of dim 0 where these divide that, so that no rank holds more
    than it will later; when the program is known, each is gathered and split anew.

    Args:
        topology: this rank's place.

    Attributes:
        given: what programs take each tensor to lie like; None: not known yet. What is not in it lies whole, but for
            optimizer state of its parameter's shape, which lies as that does.
    """

    def __init__(self, topology: Topology) -> None:
        self.given: Placements | None = None
        self._plan = topology.plan
        axes = topology.plan.axes
        self._places = {
            axis: Place(axes[axis], topology.coordinate(axis)) if axis in axes else Place()
            for axis in (*STATE_AXES, "dp")
        }

    @property
    def are_known(self) -> bool:
        """Whether no layout will change any more."""
        return self.given is not None or not self._has_parts

    @property
    def _has_parts(self) -> bool:
        return any(self._places[axis].size > 1 for axis in STATE_AXES)

    @property
    def may_split_state(self) -> bool:
        """Whether ranks may hold different parts of optimizer state."""
        return self._has_parts or (self._plan.zero > 0 and self._places["dp"].size > 1)

    def give(self, placements: Placements) -> None:
        """Let tensors lie so over ep and tp."""
        assert self.given is None, "expected one layout for all programs of a step, got a second one"
        for (kind, name), over in placements.items():
            for axis, placement in over.items():
                splits = placement.is_shard and placement.blocks == 1 and kind != "buffer"
                expected = "R" if kind == "buffer" else "R or S(dim)"
                assert axis in STATE_AXES and (splits or placement == REPLICATED), (
                    f"{kind} {name}: expected {expected} over {' or '.join(STATE_AXES)}, got {placement} over {axis}"
                )
        self.given = {key: dict(over) for key, over in placements.items()}

    def of_parameter(self, name: str, shape: Sequence[int], *, stage: int | None = None) -> Layout:
        """How a parameter lies.

        Args:
            name, shape: of the parameter; single-device shape.
            stage: the ZeRO stage from which it rests as rows over dp; None: the plan's for parameters.
        """
        over: dict[str, Placement] = {}
        part = tuple(shape)
        for axis in STATE_AXES:
            over[axis] = self._over(axis, ("parameter", name), self._before_given(axis, part))
            part = local_shape(part, over[axis], self._places[axis].size)
        plan, dp = self._plan, self._places["dp"]
        splits = plan.zero >= (plan.parameter_stage if stage is None else stage) and dp.size > 1
        return self._layout(shape, over, as_rows=splits and rests_as_rows(part, plan.persist_below))

    def of_state(self, name: str, shape: Sequence[int], *, owner: Sequence[int]) -> Layout:
        """How optimizer state lies.

        Args:
            name: "parameter:key".
            shape: single-device shape.
            owner: single-device shape of its parameter.
        """
        lies = self.of_parameter(name.partition(":")[0], owner, stage=1)
        alike = tuple(shape) == lies.shape
        defaults = {"ep": lies.over_ep, "tp": lies.over_tp} if alike else dict.fromkeys(STATE_AXES, REPLICATED)
        over = {axis: self._over(axis, ("optimizer", name), default) for axis, default in defaults.items()}
        return self._layout(shape, over, as_rows=alike and lies.as_rows and over == defaults)

    def of_auxiliary(self, shape: Sequence[int], *, as_rows: bool) -> Layout:
        """How a tensor lies that the plan makes the step keep."""
        return self._layout(shape, {}, as_rows=as_rows)

    def _layout(self, shape: Sequence[int], over: Mapping[str, Placement], *, as_rows: bool) -> Layout:
        over_ep, over_tp = (over.get(axis, REPLICATED) for axis in STATE_AXES)
        return Layout(tuple(shape), over_tp, as_rows, over_ep=over_ep, **self._places)

    def _over(self, axis: str, key: tuple[str, str], default: Placement) -> Placement:
        if self._places[axis].size == 1:
            return REPLICATED
        return default if self.given is None else self.given.get(key, {}).get(axis, default)

    def _before_given(self, axis: str, shape: Sequence[int]) -> Placement:
        splits = self.given is None and divides(shape, shard(0), self._places[axis].size)
        return shard(0) if splits else REPLICATED


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, in memory of its own; all ranks must call this."""
    whole: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    # that may be rows of a padded gather, the rest of which is nobody's
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def laid_out_by(step: StepGraph) -> dict[tuple[str, str], dict[str, Placement]]:
    """How the state that a program takes lies over ep and tp: of each tensor, over those of more than one rank."""
    axes = [axis for axis in STATE_AXES if axis in step.axes]
    if not axes:
        return {}
    state = [node for node in step.inputs("parameter", "buffer", "optimizer") if yields_tensor(node)]
    return {node.meta["entry"].key: {axis: placement_of(node, axis) for axis in axes} for node in state}
