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
        sizes: those of the batch that are symbols.

    Attributes:
        entries, values: what the inputs are, and the fakes or symbols that stand for them.
        symbols: symbol -> key of the entry that it is.
    """

    def __init__(self, inventory: Inventory, env: Any, mode: Any, sizes: SymbolicSizes | None = None) -> None:
        self.inventory = inventory
        self.sizes = sizes
        self.env = env
        self.mode = mode
        self.entries: list[StateEntry] = []
        self.values: list[Any] = []
        self.symbols: dict[Any, tuple[str, str]] = {}

    def declare(self, batch: Sequence[tuple[str, Any]], options: CaptureOptions) -> None:
        """Make an input for everything that the step reads (or, at a first step, only writes).

        Args:
            batch: (path, leaf) of the arguments.
            options: what else there is: a scaler's state, gradients of earlier microbatches.
        """
        for kind, tensors in (("parameter", self.inventory.parameters), ("buffer", self.inventory.buffers)):
            for name, tensor in tensors.items():
                self._add(StateEntry(kind, name, tuple(tensor.shape)), self._fake(tensor))
        if options.accumulation.updates:
            self._declare_optimizer()
        for state in options.scaling.states:
            self._add(state.entry, self._blank(state.shape, state.dtype))
        for name in options.accumulation.carried:
            parameter = self.inventory.parameters[name]
            entry = StateEntry(options.accumulation.kind, name, tuple(parameter.shape))
            self._add(entry, self._fake(parameter))
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
            self._add(entry, self._fake(value))
            return
        make = compat.symbolic_int if isinstance(value, int) else compat.symbolic_float
        symbol = make(self.env, value, name=f"{entry.kind}:{entry.name}")
        if not isinstance(symbol, (float, int)):
            self.symbols[compat.symbol_of(symbol)] = entry.key
        self._add(entry, symbol)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with self.mode:
            return torch.empty_strided(tensor.shape, dense_strides(tensor), dtype=tensor.dtype, device=device)

    def _blank(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.inventory.parameters.values() if not p.is_meta), torch.device("cpu"))


def is_tensor_or_number(value: Any) -> bool:
    """Whether a value of the optimizer's state is one that a graph takes as input."""
    return isinstance(value, (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
