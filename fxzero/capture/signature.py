"""What a captured step depends on besides tensor values: one signature, one graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxzero import compat
from fxzero.capture.inventory import Inventory, hyperparameters
from fxzero.errors import CaptureError


@dataclass(frozen=True)
class Signature:
    """Hashable: equal signatures may share a captured graph (if its guards hold too).

    Args:
        batch: per leaf of (args, kwargs), shape, strides, dtype, device and requires_grad of a tensor or the value
            of anything else.
        structure: the pytree of (args, kwargs).
        training: `training` of every module.
        parameters: requires_grad, shape and dtype of every parameter.
        optimizer: the hyperparameters that are no floats, and the types of those that are.
        fresh: the optimizer's first step, where that differs from later ones.
    """

    batch: tuple[Any, ...]
    structure: Any
    training: tuple[bool, ...]
    parameters: tuple[Any, ...]
    optimizer: tuple[Any, ...]
    fresh: bool

    @classmethod
    def of(cls, inventory: Inventory, args: tuple[Any, ...], kwargs: dict[str, Any], *, fresh: bool) -> Signature:
        """The signature of one call.

        Raises:
            CaptureError: if an argument is neither a tensor nor hashable.
        """
        leaves, structure = flatten_batch(args, kwargs)
        model = inventory.model
        return cls(
            batch=tuple(_leaf(path, leaf) for path, leaf in leaves),
            structure=structure,
            training=tuple(module.training for module in model.modules()),
            parameters=tuple((n, p.requires_grad, tuple(p.shape), p.dtype) for n, p in inventory.parameters.items()),
            optimizer=tuple(_constants(group) for group in inventory.optimizer.param_groups),
            fresh=fresh,
        )

    def without_sizes(self) -> Signature:
        """What it has in common with calls whose tensors have other sizes."""
        return replace(self, batch=tuple(_without_sizes(*leaf) for leaf in self.batch))

    def describe_change(self, other: Signature) -> str:
        """What differs from `other`, in words, for logs."""
        fields = ("batch", "structure", "training", "parameters", "optimizer", "fresh")
        return ", ".join(name for name in fields if getattr(self, name) != getattr(other, name)) or "guards"


def flatten_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[tuple[str, Any]], Any]:
    """((path, leaf) list, pytree structure) of the arguments of a step; paths read "args.0", "kwargs.labels"."""
    with_paths, structure = compat.flatten_with_path((args, kwargs))
    return [(_path_text(path), leaf) for path, leaf in with_paths], structure


def _path_text(path: tuple[Any, ...]) -> str:
    first, *rest = path
    parts = ["args" if first.idx == 0 else "kwargs"]
    for key in rest:
        parts.append(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))))
    return ".".join(parts)


def _leaf(path: str, leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, str(leaf.device), leaf.requires_grad)
    if isinstance(leaf, nn.Module):
        raise CaptureError.of(
            where=path,
            expected="tensors and plain values",
            got="a module",
            fix="let the loss function hold it",
        )
    try:
        hash(leaf)
    except TypeError as error:
        raise CaptureError.of(
            where=path,
            expected="a tensor, a number, a string, None, or a pytree of these",
            got=type(leaf).__name__,
            fix="pass it as tensors, or register the type as a pytree node",
        ) from error
    return (type(leaf), leaf)


def _without_sizes(first: Any, second: Any, *rest: Any) -> tuple[Any, ...]:
    """Of a tensor, how many dims it has and whether they stand in memory in order; another leaf as it is."""
    return (len(first), stands_in_order(first, second), *rest) if rest else (first, second)


def stands_in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the first dim is the outermost in memory and so on, as in a contiguous tensor and in a slice of one."""
    found = [stride for size, stride in zip(shape, strides, strict=True) if size > 1 and stride]
    return found == sorted(found, reverse=True)


def _constants(group: dict[str, Any]) -> tuple[Any, ...]:
    out: list[tuple[Any, ...]] = []
    for path, value in hyperparameters(group):
        if isinstance(value, torch.Tensor):
            out.append((path, "tensor", tuple(value.shape), value.dtype, str(value.device)))
        elif isinstance(value, float):
            out.append((path, "float"))
        else:
            out.append((path, repr(value)))
    return tuple(out)
