"""The state of a step on this rank: parameters and optimizer state as DTensors, and the memory behind them.

[Note: storage]
A sharded tensor rests as rows of dim 0 over the mesh axis dp. All ranks hold ceil(rows / ranks) rows, so that a
program is the same text everywhere; the last ones are padding. The module and the optimizer own a DTensor whose
local tensor is the unpadded view of that memory, so state dicts, checkpoints and schedulers see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fxzero import compat_distributed
from fxzero.capture.inventory import Inventory, dense_strides, state_name
from fxzero.capture.priming import InitialStates, check_state_can_be_sharded
from fxzero.capture.rehearsal import rehearse, starts_unlike_later
from fxzero.graph import AuxiliaryState
from fxzero.graph.ops import local_shard, padded_rows, shard_rows
from fxzero.graph.placement import Placement
from fxzero.graph.step_graph import rests_as_rows
from fxzero.graph.swap_ops import DEVICE
from fxzero.runtime.homes import Homes
from fxzero.runtime.materialize import Init, materialize
from fxzero.runtime.one_host import channel_key
from fxzero.runtime.shared_rows import RowsForm, SharedRows
from fxzero.runtime.topology import Topology

Blank = Callable[[tuple[int, ...]], torch.Tensor]


class StepState:
    """Parameters, buffers and optimizer state of one training step on this rank.

    Args:
        model, optimizer: the user's; after `bind` they own DTensors.
        topology: this rank's place.
        device: where the step runs.
        auxiliary: what the plan makes the step keep beside the model's and the optimizer's own.
        init: for meta models, fills the parameters and buffers that a module owns itself.
        share_rows: sharded parameters rest in memory that the ranks of this host share.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        topology: Topology,
        *,
        device: torch.device,
        auxiliary: Sequence[AuxiliaryState] = (),
        init: Init | None = None,
        share_rows: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.topology = topology
        self.device = device
        self.homes = Homes(topology.plan, device)
        self.auxiliary = {state.name: state for state in auxiliary}
        self.init = init
        self.bound = False
        self.special_first_step = False
        self.stepped = False
        self.is_unsharded = False
        self.awaits_checkpoint = False
        self._share_rows = share_rows
        self._rows: SharedRows | None = None
        self._local: dict[tuple[str, str], tuple[Any, torch.Tensor]] = {}  # key -> (owner's tensor, memory)

    # ---- layout

    def parameter_is_sharded(self, shape: torch.Size, *, stage: int) -> bool:
        """Whether a tensor shaped like its parameter rests as rows, where that starts at a ZeRO stage."""
        plan = self.topology.plan
        if plan.zero < stage or plan.axes.get("dp", 1) == 1:
            return False
        return rests_as_rows(shape, plan.persist_below)

    @property
    def fresh(self) -> bool:
        """Whether the next step is the optimizer's first and is unlike later ones."""
        return self.special_first_step and not self.stepped

    def rehearsal(self) -> Inventory:
        """What there is to capture before `bind`: the model, and a twin of the optimizer with its state."""
        states = InitialStates(self.optimizer)
        inventory, self.special_first_step = rehearse(Inventory.of(self.model, self.optimizer), states)
        if self.topology.plan.zero and self.topology.plan.axes.get("dp", 1) > 1:
            for index in range(len(self.optimizer.param_groups)):
                check_state_can_be_sharded(states, index)
        return inventory

    # ---- binding

    def bind(self) -> None:
        """Shard the parameters, make the optimizer's state, and hand both to model and optimizer as DTensors."""
        if self.bound:
            return
        inventory = Inventory.of(self.model, self.optimizer)
        on_meta = any(p.is_meta for p in inventory.parameters.values())
        self.special_first_step = starts_unlike_later(inventory, InitialStates(self.optimizer))
        if self._share_rows:
            self._make_shared_rows(inventory)
        if on_meta:
            materialize(self, inventory)
        else:
            self._broadcast(inventory)
            for name, parameter in inventory.parameters.items():
                self.replace(parameter, self.adopt_parameter(name, parameter.detach()), name=name)
        self.prime(Inventory.of(self.model, self.optimizer))
        for state in self.auxiliary.values():
            self._make_auxiliary(state)
        self.bound = True

    def _make_shared_rows(self, inventory: Inventory) -> None:
        """Room for the sharded parameters in memory that all ranks of the host map."""
        plan, groups = self.topology.plan, self.topology.groups
        forms = {
            name: RowsForm((shard_rows(p.shape[0], plan.axes["dp"]), *p.shape[1:]), p.dtype)
            for name, p in inventory.parameters.items()
            if self.parameter_is_sharded(p.shape, stage=plan.parameter_stage)
        }
        if forms:
            channel = groups[channel_key("dp")]
            self._rows = channel.rows = SharedRows.between(groups["dp"], channel, forms)

    def place(self, placed: Placement) -> None:
        """Let the state that a plan leaves open rest as decided; only the first decision counts."""
        if self.homes.placed is not None:
            return
        owned = [(key, tensor) for *key, tensor in self.named() if tuple(key) in self._local] if self.bound else []
        before = [self.homes.tier((kind, name), tensor.shape) for (kind, name), tensor in owned]
        self.homes.settle_moves()
        self.homes.placed = placed
        for ((kind, name), tensor), was in zip(owned, before, strict=True):
            if self.homes.tier((kind, name), tensor.shape) != was:
                self._move((kind, name), tensor)
        self.homes.settle_moves()

    def _move(self, key: tuple[str, str], owned: torch.Tensor) -> None:
        """Let a tensor rest where it belongs now."""
        memory = self._local[key][1].to(self.device, copy=True)
        self.homes.vacate(key)
        if isinstance(owned, DTensor):
            sharded = any(isinstance(p, Shard) for p in owned.placements)
            self._take_over(key, self._wrap(key, memory, owned.shape, sharded, owned.stride()), owned)
        else:
            self._take_over(key, self.homes.settle(key, memory, owned.shape), owned)

    def _make_auxiliary(self, state: AuxiliaryState) -> None:
        size = self.topology.plan.axes.get("dp", 1)
        shape = (state.shape[0] // size, *state.shape[1:]) if state.sharded else state.shape
        memory = torch.full(shape, state.initial, dtype=state.dtype, device=self.device)
        if self.topology.mesh is None:
            self._local[state.entry.key] = (memory, memory)
        else:
            self._wrap(state.entry.key, memory, torch.Size(state.shape), state.sharded)

    def _broadcast(self, inventory: Inventory) -> None:
        """All ranks start from rank 0's values, as under DDP."""
        for tensor in (*inventory.parameters.values(), *inventory.buffers.values()):
            self.send_from_first_rank(tensor)

    def blank_parameter(self, name: str, shape: torch.Size, strides: tuple[int, ...], blank: Blank) -> torch.Tensor:
        """A parameter that a checkpoint will fill, in rows where it is sharded, never the whole.

        Args:
            name, shape, strides: of the parameter.
            blank: makes memory of a shape.
        """
        key = ("parameter", name)
        sharded = self.parameter_is_sharded(shape, stage=self.topology.plan.parameter_stage)
        rows = (shard_rows(shape[0], self.topology.plan.axes["dp"]), *shape[1:]) if sharded else tuple(shape)
        if self.topology.mesh is None:
            memory = self.homes.settle(key, blank(rows), shape)
            self._local[key] = (memory, memory)
            return memory
        return self._wrap(key, blank(rows), shape, sharded, strides)

    def send_from_first_rank(self, tensor: torch.Tensor) -> None:
        """Give all ranks what the first one holds."""
        if self.topology.world_size > 1:
            dist.broadcast(tensor.detach(), src=0)

    def replace(self, old: nn.Parameter, new: torch.Tensor, *, name: str, also: torch.Tensor | None = None) -> None:
        """Put a new parameter wherever the old one (or its filled form) was: module tree, ties, optimizer."""
        if self.topology.mesh is None and not old.is_meta:
            if new.data_ptr() != old.data_ptr():
                old.data = new  # it rests elsewhere now, and is the same parameter
            self._local[("parameter", name)] = (old, new)
            return
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        self._local[("parameter", name)] = (parameter, self._local[("parameter", name)][1])
        for module in self.model.modules():
            for attribute, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if value is old or value is also:
                    module.register_parameter(attribute, parameter)
        for group in self.optimizer.param_groups:
            group["params"] = [parameter if p is old else p for p in group["params"]]
        if old in self.optimizer.state:
            self.optimizer.state[parameter] = self.optimizer.state.pop(old)

    def adopt_parameter(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """Take a whole parameter into this rank's memory; returns what the model will own."""
        sharded = self.parameter_is_sharded(full.shape, stage=self.topology.plan.parameter_stage)
        return self._adopt(("parameter", name), full, sharded)

    def _adopt(self, key: tuple[str, str], full: torch.Tensor, sharded: bool) -> torch.Tensor:
        """Take rows (or all) of a full tensor into this rank's memory; returns what model or optimizer own."""
        mesh = self.topology.mesh
        if mesh is None:
            full = self.homes.settle(key, full, full.shape)
            self._local[key] = (full, full)
            return full
        size = self.topology.plan.axes["dp"]
        if sharded:
            memory = local_shard(full, size, self.topology.coordinate("dp"))
        else:
            memory = full.detach()
            if memory.stride() != dense_strides(memory):
                memory = memory.clone()
        return self._wrap(key, memory, full.shape, sharded, dense_strides(full))

    def _wrap(
        self,
        key: tuple[str, str],
        memory: torch.Tensor,
        shape: torch.Size,
        sharded: bool,
        strides: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        mesh = self.topology.mesh
        assert mesh is not None
        memory = self.homes.settle(key, memory, shape)
        if self._rows is not None and sharded and key[0] == "parameter":
            memory = self._rows.settle(key[1], memory)
        rows = memory
        if sharded:
            size, index = self.topology.plan.axes["dp"], self.topology.coordinate("dp")
            each = shard_rows(shape[0], size)
            rows = memory[: max(0, min(each, shape[0] - index * each))]
        placements = [Shard(0) if sharded and axis == "dp" else Replicate() for axis in self.topology.plan.axes]
        stride = strides or torch.empty(shape, device="meta").stride()
        owned = compat_distributed.dtensor_over(rows, mesh, placements, shape=shape, stride=stride)
        self._local[key] = (owned, memory)
        return owned

    # ---- optimizer state

    def prime(self, inventory: Inventory) -> None:
        """Give each optimized parameter the state that the optimizer would start with.

        The largest come first: making a state takes a few times the parameter's memory, while little else is there.
        """
        states = InitialStates(self.optimizer)
        for name in sorted(inventory.optimized, key=lambda name: -inventory.parameters[name].numel()):
            parameter = inventory.parameters[name]
            existing = self.optimizer.state.get(parameter, {})
            state = dict(existing) if existing else self._initial(name, inventory.group_of(name), states)
            shape = parameter.shape
            sharded = self.parameter_is_sharded(shape, stage=1)
            rows_only = not existing
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.dim() > 0:
                    self.optimizer.state[parameter][key] = self._adopt_state(
                        name, key, value, shape, sharded=sharded, is_rows=rows_only
                    )
                else:
                    self.optimizer.state[parameter][key] = value

    def _initial(self, name: str, group: int, states: InitialStates) -> dict[str, Any]:
        """Initial state: of this rank's rows where the state is sharded, whole where it has a shape of its own."""
        parameter, memory = self._local[("parameter", name)]
        shape = parameter.shape
        if not self.parameter_is_sharded(shape, stage=1):
            return states.of(group, memory)
        if memory.shape == shape:
            memory = local_shard(memory.detach(), self.topology.plan.axes["dp"], self.topology.coordinate("dp"))
        state = states.of(group, memory)
        if any(isinstance(v, torch.Tensor) and v.dim() and v.shape != memory.shape for v in state.values()):
            whole = states.of(group, memory.new_zeros(shape))
            own_shape = [k for k, v in whole.items() if isinstance(v, torch.Tensor) and v.dim() and v.shape != shape]
            state.update({key: whole[key] for key in own_shape})
        return state

    def _adopt_state(
        self, param: str, key: str, value: torch.Tensor, shape: torch.Size, *, sharded: bool, is_rows: bool
    ) -> torch.Tensor:
        entry = ("optimizer", state_name(param, key))
        if self.topology.mesh is None:
            value = self.homes.settle(entry, value, shape if tuple(value.shape) == tuple(shape) else value.shape)
            self._local[entry] = (value, value)
            return value
        rows = (shard_rows(shape[0], self.topology.plan.axes["dp"]), *shape[1:]) if sharded else tuple(shape)
        if is_rows and sharded and tuple(value.shape) == rows:
            return self._wrap(entry, value.contiguous(), shape, True)
        return self._adopt(entry, value, sharded and tuple(value.shape) == tuple(shape))

    # ---- what a program reads

    def lookup(self, inventory: Inventory, kind: str, name: str) -> Any:
        """The current value of one entry, as a program takes it; follows what the user has replaced since.

        Args:
            inventory: what model and optimizer own at this step.
            kind, name: the key of a state entry.
        """
        if kind == "parameter":
            memory = self._current((kind, name), inventory.parameters[name])
            if self._local[(kind, name)][0] is not inventory.parameters[name]:
                inventory.parameters[name] = self._parameter(name)
            return memory
        if kind == "buffer":
            return inventory.buffers[name]
        if kind == "auxiliary":
            return self._local[(kind, name)][1]
        if kind == "optimizer":
            param, _, key = name.partition(":")
            return self._current((kind, name), self.optimizer.state[inventory.parameters[param]][key])
        if kind == "hyperparameter":
            _, index, path = name.split(".", 2)
            return inventory.hyperparameters[int(index)][path]
        assert kind == "coordinate", kind
        return self.topology.coordinate(name)

    def _parameter(self, name: str) -> nn.Parameter:
        owner, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), attribute)

    def _current(self, key: tuple[str, str], owned: Any) -> Any:
        if not isinstance(owned, torch.Tensor):
            return owned
        known = self._local.get(key)
        if known is not None and known[0] is owned:
            return known[1]
        return self._readopt(key, owned)

    def _readopt(self, key: tuple[str, str], owned: torch.Tensor) -> torch.Tensor:
        """A tensor that the user put in place of ours (load_state_dict of torch.optim does)."""
        if not isinstance(owned, DTensor):
            memory = self.homes.settle(key, owned.detach(), owned.shape)
            if memory.data_ptr() != owned.data_ptr():
                return self._take_over(key, memory, owned)
            self._local[key] = (owned, memory)
            return memory
        sharded = any(isinstance(p, Shard) for p in owned.placements)
        local = owned.to_local().detach()
        if self.homes.tier(key, owned.shape) != DEVICE:
            memory = padded_rows(local, owned.shape[0], self.topology.plan.axes["dp"]) if sharded else local
            return self._take_over(key, self._wrap(key, memory, owned.shape, sharded, owned.stride()), owned)
        if not sharded:
            self._local[key] = (owned, local)
            return local
        memory = padded_rows(local, owned.shape[0], self.topology.plan.axes["dp"])
        if memory is not local:
            return self._take_over(key, self._wrap(key, memory, owned.shape, True, owned.stride()), owned)
        self._local[key] = (owned, memory)
        return memory

    def _take_over(self, key: tuple[str, str], ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Put a tensor with our memory behind it in the place of the one that the user put there."""
        kind, name = key
        if kind == "parameter":
            assert isinstance(theirs, nn.Parameter)
            self.replace(theirs, ours, name=name)
        else:
            param, _, entry = name.partition(":")
            self.optimizer.state[self._parameter(param)][entry] = ours
            self._local[key] = (ours, self._local[key][1] if isinstance(ours, DTensor) else ours)
        return self._local[key][1]

    def write_back(self, kind: str, name: str, value: Any) -> None:
        """Store state that is a Python number."""
        assert kind == "optimizer", kind
        param, _, key = name.partition(":")
        self.optimizer.state[self._parameter(param)][key] = value

    # ---- views for people and checkpoints

    def named(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, name, tensor as model or optimizer own it) of everything that persists."""
        inventory = Inventory.of(self.model, self.optimizer)
        for name, parameter in inventory.parameters.items():
            yield "parameter", name, parameter
        for name, buffer in inventory.buffers.items():
            yield "buffer", name, buffer
        for param, key, value in inventory.optimizer_state():
            yield "optimizer", state_name(param, key), value
        for name, state in self.auxiliary.items():
            yield "auxiliary", name, self._local[state.entry.key][0]
