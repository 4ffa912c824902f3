"""What a model and its optimizer own: names, ties, groups, state. Read anew whenever it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxzero import compat
from fxzero.errors import CaptureError

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Inventory:
    """The state of one training step, by name; ties appear once, under their first name.

    Args:
        model, optimizer: the live objects.
        parameters, buffers: name -> tensor.
        groups: for each parameter group of the optimizer, the names of its parameters.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> Inventory:
        """Read the model and the optimizer.

        Raises:
            CaptureError: if the optimizer holds parameters that are not the model's, or cannot be captured at all.
        """
        parameters = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            strangers = [i for i, p in enumerate(group["params"]) if id(p) not in names]
            if strangers:
                shape = tuple(group["params"][strangers[0]].shape)
                raise CaptureError.of(
                    where=f"optimizer.param_groups[{index}]['params'][{strangers[0]}]",
                    expected="a parameter of the model",
                    got=f"a tensor of shape {shape} that model.parameters() does not hold",
                    fix="build the optimizer from the parameters of the model given to compile()",
                )
            groups.append(tuple(names[id(p)] for p in group["params"]))
        _refuse_uncapturable(optimizer)
        return cls(model, optimizer, parameters, dict(model.named_buffers()), tuple(groups))

    @cached_property
    def hyperparameters(self) -> list[dict[str, Any]]:
        """For each parameter group: path -> value, as they are at the first look."""
        return [dict(hyperparameters(group)) for group in self.optimizer.param_groups]

    @cached_property
    def attributes(self) -> dict[tuple[str, str], Any]:
        """(module path, name) -> value of what modules hold besides tensors and may read: `dropout.p`, flags, names."""
        return {
            (path, name): value
            for path, module in self.model.named_modules()
            for name, value in vars(module).items()
            if type(value) in _PLAIN and name != "training"
        }

    @property
    def optimized(self) -> list[str]:
        """Names of the parameters that the optimizer updates, in its order."""
        return [name for names in self.groups for name in names if self.parameters[name].requires_grad]

    def group_of(self, name: str) -> int:
        """Index of the parameter group that holds a parameter."""
        return next(i for i, names in enumerate(self.groups) if name in names)

    def optimizer_state(self) -> Iterator[tuple[str, str, Any]]:
        """(parameter name, key, value) for everything in `optimizer.state`."""
        for name in (n for names in self.groups for n in names):
            for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
                yield name, key, value


def state_name(param: str, key: str) -> str:
    """The name of one optimizer state in a step graph."""
    return f"{param}:{key}"


def hyperparameters(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path, value) for every hyperparameter of a parameter group; tuples are taken apart: "betas.0"."""
    for key, value in group.items():
        if key == "params":
            continue
        if isinstance(value, (tuple, list)):
            yield from ((f"{key}.{i}", item) for i, item in enumerate(value))
        else:
            yield key, value


def with_hyperparameters(group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `group` with the hyperparameters at these paths replaced."""
    out: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, (tuple, list)) and key != "params":
            out[key] = type(value)(values.get(f"{key}.{i}", item) for i, item in enumerate(value))
        else:
            out[key] = values.get(key, value)
    return out


def _refuse_uncapturable(optimizer: torch.optim.Optimizer) -> None:
    where = type(optimizer).__name__
    hooks = compat.optimizer_hooks(optimizer)
    if hooks:
        raise CaptureError.of(
            where=where,
            expected="an optimizer without step hooks",
            got=f"hooks {', '.join(hooks)}",
            fix="call them after step(...): a captured step would run them once, at capture",
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CaptureError.of(
            where=where,
            expected="an optimizer whose step() needs no closure",
            got="LBFGS, which evaluates the model several times a step",
            fix="use a first-order optimizer",
        )


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor whose memory has no holes; those of a contiguous one where it has."""
    shape, strides = tensor.shape, tensor.stride()
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
