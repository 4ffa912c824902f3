"""The batch of a step as its microbatches: a list of them, or one batch split on dim 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxzero import compat
from fxzero.capture.accumulation import WEIGHT
from fxzero.capture.signature import flatten_batch
from fxzero.errors import PlanError
from fxzero.graph.step_graph import WEIGHTS

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """What a step is called with.

    Args:
        microbatches: (args, kwargs) of each, as the model (or `loss`) takes them.
        weights: how much each counts, float32, on the model's device; None: all alike.
    """

    microbatches: tuple[Arguments, ...]
    weights: torch.Tensor | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, number: int, device: Any) -> Batch:
        """The arguments of a step, taken apart.

        Args:
            args, kwargs: of one microbatch where `number` is 1. Else either one list of that many microbatches (each
                a tuple of arguments, a dict of keyword arguments, or the one argument), or arguments whose tensors are
                split on dim 0; in both cases `weights` may come with them, a number for each microbatch.
            number: microbatches in a step.
            device: where the model is.

        Raises:
            PlanError: if the batch cannot be taken apart so.
        """
        if number == 1:
            return cls(((args, kwargs),))
        rest = {key: value for key, value in kwargs.items() if key != "weights"}
        weights = _weights(kwargs.get("weights"), number=number, device=device)
        if len(args) == 1 and not rest and isinstance(args[0], list):
            _check_count(args[0], number, what="microbatches")
            return cls(tuple(map(_arguments, args[0])), weights)
        return cls(_split(args, rest, number), weights)

    def weight_inputs(self, index: int) -> dict[str, torch.Tensor]:
        """Batch inputs of a program, beside the arguments of its microbatch."""
        if self.weights is None:
            return {}
        return {WEIGHT.name: self.weights[index], WEIGHTS: self.weights}


def joined_metrics(metrics: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The metrics of a step: one row a microbatch, where each has reported; else as they are.

    Those whose shapes differ from one microbatch to the next are flattened and joined end to end.
    """
    if len(metrics) == 1:
        return dict(metrics[0])
    out = {name: value for found in metrics for name, value in found.items()}
    for name in set.intersection(*(set(found) for found in metrics)):
        values = [found[name] for found in metrics]
        alike = len({value.shape for value in values}) == 1
        out[name] = torch.stack(values) if alike else torch.cat([value.reshape(-1) for value in values])
    return out


def _arguments(item: Any) -> Arguments:
    if isinstance(item, tuple):
        return item, {}
    return ((), dict(item)) if isinstance(item, Mapping) else ((item,), {})


def _check_count(items: Sequence[Any], number: int, *, what: str) -> None:
    if len(items) != number:
        raise PlanError.of(
            where=f"step(...), accumulate={number}",
            expected=f"{number} {what}",
            got=str(len(items)),
            fix=f"give one for each, or set accumulate={len(items)}",
        )


def _weights(weights: Any, *, number: int, device: Any) -> torch.Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, torch.Tensor) and weights.dim() == 1:
        weights = list(weights)
    if not isinstance(weights, (list, tuple)):
        raise PlanError.of(
            where=f"step(..., weights=), accumulate={number}",
            expected="a list of numbers or a tensor, one weight a microbatch",
            got=repr(weights),
            fix="pass how many tokens each microbatch has, such as weights=[1024, 1000]",
        )
    _check_count(weights, number, what="weights")
    if any(isinstance(weight, torch.Tensor) for weight in weights):
        return torch.stack([torch.as_tensor(w, device=device).detach().float().reshape(()) for w in weights])
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> tuple[Arguments, ...]:
    """One microbatch for each part of dim 0; what is no tensor, or has no dims, goes to each of them."""
    leaves, structure = flatten_batch(args, kwargs)
    tensors = [(path, leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    where = f"step(...), accumulate={number}"
    fix = f"pass a list of {number} microbatches: tuples of arguments, or dicts of keyword arguments"
    if not tensors:
        raise PlanError.of(where, expected="a batch of tensors, to be split on dim 0", got="no tensor", fix=fix)
    first, rows = tensors[0][0], len(tensors[0][1])
    for path, tensor in tensors:
        if len(tensor) != rows:
            got = f"{path} with {len(tensor)} rows beside {first} with {rows}"
            raise PlanError.of(where, expected="tensors with equal dim 0, which is split", got=got, fix=fix)
    if rows % number:
        got = f"{first} of shape {list(tensors[0][1].shape)}"
        divisor = next(k for k in range(number, 0, -1) if rows % k == 0)
        fix = f"set accumulate={divisor}, or {fix}" if divisor > 1 else fix
        raise PlanError.of(where, expected=f"a batch whose dim 0 divides by {number}", got=got, fix=fix)
    parts = []
    for index in range(number):
        part = [
            leaf.narrow(0, index * (rows // number), rows // number)
            if isinstance(leaf, torch.Tensor) and leaf.dim()
            else leaf
            for _, leaf in leaves
        ]
        parts.append(compat.unflatten(part, structure))
    return tuple(parts)
