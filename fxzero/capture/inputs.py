"""The inputs of a traced step: one fake for everything that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxzero import compat
from fxzero.capture.batch_dims import SymbolicSizes
from fxzero.capture.inventory import Inventory, dense_strides, hyperparameters, state_name
from fxzero.capture.options import CaptureOptions
from fxzero.graph import StateEntry


class TracedInputs:
    """Entries and values of a step's inputs, in placeholder order.

    Args:
        inventory: what model and optimizer own.
        env, mode: the symbol environment and the fake tensor mode of the trace.
        device: where the step runs; None: where the parameters are.
        sizes: those of the batch that are symbols.

    Attributes:
        entries, values: what the inputs are, and the fakes or symbols that stand for them.
        symbols: symbol -> key of the entry that it is.
    """

    def __init__(
        self,
        inventory: Inventory,
        env: Any,
        mode: Any,
        device: torch.device | None = None,
        sizes: SymbolicSizes | None = None,
    ) -> None:
        self.inventory = inventory
        self.sizes = sizes
        self.env = env
        self.mode = mode
        found = (p.device for p in inventory.parameters.values() if not p.is_meta)
        self._device = next(found, torch.device("cpu")) if device is None else device
        self.entries: list[StateEntry] = []
        self.values: list[Any] = []
        self.symbols: dict[Any, tuple[str, str]] = {}

    def declare(self, batch: Sequence[tuple[str, Any]], options: CaptureOptions) -> None:
        """Make an input for everything that the step reads (or, at a first step, only writes).

        Args:
            batch: (path, leaf) of the arguments.
            options: what else there is: a scaler's state, gradients of earlier microbatches.
        """
        for name, parameter in self.inventory.parameters.items():
            self._add(StateEntry("parameter", name, tuple(parameter.shape)), self._fake(parameter, moved=True))
        for name, buffer in self.inventory.buffers.items():
            self._add(StateEntry("buffer", name, tuple(buffer.shape)), self._fake(buffer))
        if options.accumulation.updates:
            self._declare_optimizer()
        for state in options.scaling.states:
            self._add(state.entry, self._blank(state.shape, state.dtype))
        for name in options.accumulation.carried:
            parameter = self.inventory.parameters[name]
            entry = StateEntry(options.accumulation.kind, name, tuple(parameter.shape))
            self._add(entry, self._fake(parameter, moved=True))
        for path, leaf in batch:
            if isinstance(leaf, torch.Tensor):
                make = (
                    compat.fake_like(self.mode, leaf) if self.sizes is None else self.sizes.fake(self.mode, path, leaf)
                )
                self._add(StateEntry("batch", path, tuple(leaf.shape)), make)
        for entry in options.accumulation.weights:
            self._add(entry, self._blank(entry.shape, torch.float32))

    def _declare_optimizer(self) -> None:
        for param, key, value in self.inventory.optimizer_state():
            if is_tensor_or_number(value):
                self._add_scalar_or_tensor(
                    StateEntry("optimizer", state_name(param, key), _shape_of(value), param), value
                )
        for index, group in enumerate(self.inventory.optimizer.param_groups):
            for path, value in hyperparameters(group):
                if isinstance(value, (float, torch.Tensor)):
                    name = f"groups.{index}.{path}"
                    self._add_scalar_or_tensor(StateEntry("hyperparameter", name, _shape_of(value)), value)

    @property
    def device_type(self) -> str:
        """Where the model is; "cpu" for one on the meta device."""
        return self._device.type

    def _add(self, entry: StateEntry, value: Any) -> None:
        self.entries.append(entry)
        self.values.append(value)

    def _add_scalar_or_tensor(self, entry: StateEntry, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._add(entry, self._fake(value, moved=value.dim() > 0))  # a scalar may live on the host
            return
        make = compat.symbolic_int if isinstance(value, int) else compat.symbolic_float
        symbol = make(self.env, value, name=f"{entry.kind}:{entry.name}")
        if not isinstance(symbol, (float, int)):
            self.symbols[compat.symbol_of(symbol)] = entry.key
        self._add(entry, symbol)

    def _fake(self, tensor: torch.Tensor, *, moved: bool = False) -> torch.Tensor:
        """A fake like a tensor; `moved`: on the step's device, for state that may rest elsewhere."""
        device = self._device if tensor.device.type == "meta" or moved else tensor.device
        with self.mode:
            return torch.empty_strided(tensor.shape, dense_strides(tensor), dtype=tensor.dtype, device=device)

    def _blank(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self._device)


def is_tensor_or_number(value: Any) -> bool:
    """Whether a value of the optimizer's state is one that a graph takes as input."""
    return isinstance(value, (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
