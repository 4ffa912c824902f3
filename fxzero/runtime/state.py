"""The state of a step on this rank: parameters and optimizer state as DTensors, and the memory behind them.

How one of them lies over the ranks: [Note: storage] in `runtime/layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fxzero.capture.inventory import Inventory, dense_strides, state_name
from fxzero.capture.priming import InitialStates, check_state_can_be_sharded
from fxzero.capture.rehearsal import rehearse, starts_unlike_later
from fxzero.graph import AuxiliaryState
from fxzero.graph.placement import Placement
from fxzero.graph.swap_ops import DEVICE
from fxzero.runtime.homes import Homes
from fxzero.runtime.initial_state import initial_state
from fxzero.runtime.layout import Held, Layout, Layouts, Placements, gathered
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
        self._layouts = Layouts(topology)
        self._local: dict[tuple[str, str], Held] = {}

    # ---- layout

    @property
    def laid_out(self) -> Placements | None:
        """How tensors lie over tp, as every program of the step must take them; None: not known yet.

        What is not in it lies whole, but for optimizer state of its parameter's shape, which lies as that does.
        """
        return self._layouts.given

    def lay_out(self, placements: Placements) -> None:
        """Let tensors lie over ep and tp as the step's programs take them; all ranks call this, once, with the same.

        Where model and optimizer are bound already, what lies otherwise is moved; [Note: bound before it is laid out].

        Args:
            placements: (kind, name) -> {axis: R or S(dim)} of parameters, buffers (R) and optimizer state; what is
                not in it is as `laid_out` says.
        """
        known = self._layouts.are_known
        self._layouts.give(placements)
        if self.bound and not known:
            self._lay_anew()

    def _lay_anew(self) -> None:
        """Gather what lies otherwise than it should, one tensor at a time, and split it as it should be."""
        self.homes.settle_moves()
        if self._share_rows:
            self._make_shared_rows(Inventory.of(self.model, self.optimizer))
        for kind, name, owned in list(self.named()):
            held = self._local.get((kind, name))
            if held is None or held.layout is None or kind == "auxiliary":
                continue
            layout, strides = self._layout_of((kind, name), owned.shape), owned.stride()
            memory = held.memory if layout == held.layout else layout.memory_of_whole(held.whole())
            if layout != held.layout:
                self.homes.vacate((kind, name))
            self._take_over((kind, name), self._rest((kind, name), memory, layout, strides), owned)
        self.homes.settle_moves()

    def _layout_of(self, key: tuple[str, str], shape: Sequence[int]) -> Layout:
        """How an entry of this single-device shape lies."""
        kind, name = key
        if kind == "parameter":
            return self._layouts.of_parameter(name, shape)
        return self._layouts.of_state(name, shape, owner=self._parameter(name.partition(":")[0]).shape)

    @property
    def fresh(self) -> bool:
        """Whether the next step is the optimizer's first and is unlike later ones."""
        return self.special_first_step and not self.stepped

    def rehearsal(self) -> Inventory:
        """What there is to capture before `bind`: the model, and a twin of the optimizer with its state."""
        states = InitialStates(self.optimizer)
        inventory, self.special_first_step = rehearse(Inventory.of(self.model, self.optimizer), states)
        if self._layouts.may_split_state:
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
        if self._share_rows and self._layouts.are_known:
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
        groups = self.topology.groups
        layouts = {name: self._layouts.of_parameter(name, p.shape) for name, p in inventory.parameters.items()}
        forms = {
            name: RowsForm(layout.memory_shape, inventory.parameters[name].dtype)
            for name, layout in layouts.items()
            if layout.as_rows
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
        held = self._local[key]
        memory = held.memory.to(self.device, copy=True)
        self.homes.vacate(key)
        layout = held.layout or Layout(tuple(owned.shape))
        self._take_over(key, self._rest(key, memory, layout, owned.stride()), owned)

    def _make_auxiliary(self, state: AuxiliaryState) -> None:
        layout = self._layouts.of_auxiliary(state.shape, as_rows=state.sharded)
        memory = torch.full(layout.memory_shape, state.initial, dtype=state.dtype, device=self.device)
        self._rest(state.entry.key, memory, layout)

    def _broadcast(self, inventory: Inventory) -> None:
        """All ranks start from rank 0's values, as under DDP."""
        for tensor in (*inventory.parameters.values(), *inventory.buffers.values()):
            self.send_from_first_rank(tensor)

    def blank_parameter(self, name: str, shape: torch.Size, strides: tuple[int, ...], blank: Blank) -> torch.Tensor:
        """A parameter that a checkpoint will fill: this rank's part where it is split, never the whole.

        Args:
            name, shape, strides: of the parameter.
            blank: makes memory of a shape.
        """
        layout = self._layouts.of_parameter(name, shape)
        return self._rest(("parameter", name), blank(layout.memory_shape), layout, strides)

    def send_from_first_rank(self, tensor: torch.Tensor) -> None:
        """Give all ranks what the first one holds."""
        if self.topology.world_size > 1:
            dist.broadcast(tensor.detach(), src=0)

    def replace(self, old: nn.Parameter, new: torch.Tensor, *, name: str, also: torch.Tensor | None = None) -> None:
        """Put a new parameter wherever the old one (or its filled form) was: module tree, ties, optimizer."""
        if self.topology.mesh is None and not old.is_meta:
            if new.data_ptr() != old.data_ptr():
                old.data = new  # it rests elsewhere now, and is the same parameter
            self._local[("parameter", name)] = Held(old, new)
            return
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        self._local[("parameter", name)] = self._local[("parameter", name)]._replace(owned=parameter)
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
        return self._adopt(("parameter", name), full, self._layouts.of_parameter(name, full.shape))

    def _adopt(self, key: tuple[str, str], full: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Take this rank's part of a full tensor into its memory; returns what model or optimizer own."""
        return self._rest(key, self._part(full, layout), layout, dense_strides(full))

    def _part(self, full: torch.Tensor, layout: Layout) -> torch.Tensor:
        return full if self.topology.mesh is None else layout.memory_of_whole(full)

    def _rest(
        self, key: tuple[str, str], memory: torch.Tensor, layout: Layout, strides: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Let memory rest where it belongs; returns what model or optimizer own.

        Args:
            key: of the entry.
            memory: of this rank.
            layout: how the entry lies.
            strides: of the whole tensor; None: of the memory where that is the whole, else of a contiguous one.
        """
        mesh = self.topology.state_mesh
        memory = self.homes.settle(key, memory, layout.shape)
        if mesh is None:
            self._local[key] = Held(memory, memory)
            return memory
        if self._rows is not None and layout.as_rows and key[0] == "parameter":
            memory = self._rows.settle(key[1], memory)
        owned = layout.tensor_over(memory, mesh, strides or (None if layout.is_split else memory.stride()))
        self._local[key] = Held(owned, memory, layout)
        return owned

    # ---- optimizer state

    def prime(self, inventory: Inventory) -> None:
        """Give each optimized parameter the state that the optimizer would start with.

        The largest come first: making a state takes a few times the parameter's memory, while little else is there.
        """
        states = InitialStates(self.optimizer)
        for name in sorted(inventory.optimized, key=lambda name: -inventory.parameters[name].numel()):
            parameter = inventory.parameters[name]
            for key, value, layout in self._started(inventory, name, states):
                if layout is not None:
                    value = self._rest(("optimizer", state_name(name, key)), value, layout)
                self.optimizer.state[parameter][key] = value

    def _started(
        self, inventory: Inventory, name: str, states: InitialStates
    ) -> Iterator[tuple[str, Any, Layout | None]]:
        """As `initial_state`, of what there is to be made or adopted of one parameter's state."""
        parameter = inventory.parameters[name]
        existing = self.optimizer.state.get(parameter)
        if not existing:
            held = self._local[("parameter", name)]
            yield from initial_state(states, inventory.group_of(name), name, held, self._layouts)
            return
        for key, value in dict(existing).items():
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.dim():
                layout = self._layouts.of_state(state_name(name, key), value.shape, owner=parameter.shape)
                yield key, self._part(value, layout), layout

    # ---- what a program reads

    def lookup(self, inventory: Inventory, kind: str, name: str) -> Any:
        """The current value of one entry, as a program takes it; follows what the user has replaced since.

        Args:
            inventory: what model and optimizer own at this step.
            kind, name: the key of a state entry.
        """
        if kind == "parameter":
            memory = self._current((kind, name), inventory.parameters[name])
            if self._local[(kind, name)].owned is not inventory.parameters[name]:
                inventory.parameters[name] = self._parameter(name)
            return memory
        if kind == "buffer":
            return inventory.buffers[name]
        if kind == "auxiliary":
            return self._local[(kind, name)].memory
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
        if known is not None and known.owned is owned:
            return known.memory
        return self._readopt(key, owned)

    def _readopt(self, key: tuple[str, str], owned: Any) -> torch.Tensor:
        """A tensor that the user put in place of ours (load_state_dict of torch.optim does)."""
        known = self._local.get(key)
        if not isinstance(owned, DTensor):
            if known is not None and known.layout is not None and known.layout.is_split:
                return self._take_over(key, self._adopt(key, owned.detach(), known.layout), owned)
            memory = self.homes.settle(key, owned.detach(), owned.shape)
            if memory.data_ptr() != owned.data_ptr():
                return self._take_over(key, memory, owned)
            self._local[key] = Held(owned, memory)
            return memory
        layout = self._layout_of(key, owned.shape)
        mesh = self.topology.state_mesh
        if owned.device_mesh != mesh or owned.placements != layout.placements(mesh.mesh_dim_names or ()):
            return self._take_over(key, self._adopt(key, gathered(owned), layout), owned)
        local = owned.to_local().detach()
        memory = layout.memory_of_local(local)
        if memory is not local or self.homes.tier(key, owned.shape) != DEVICE:
            return self._take_over(key, self._rest(key, memory, layout, owned.stride()), owned)
        self._local[key] = Held(owned, memory, layout)
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
            is_ours = isinstance(ours, DTensor)
            self._local[key] = self._local[key]._replace(owned=ours) if is_ours else Held(ours, ours)
        return self._local[key].memory

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
            yield "auxiliary", name, self._local[state.entry.key].owned
