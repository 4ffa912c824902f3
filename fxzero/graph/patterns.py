"""Patterns of calls: a table of ops with names for what may stand there, matched from the last call upwards.

    Call(aten.lerp.Scalar, "exp_avg", "grad", Call(operator.sub, 1.0, "beta1"), name="new_exp_avg")

A string stands for any one value, the same wherever it occurs; a `name` is that of the call itself. The first two
arguments of what commutes may be turned around. Modules and names of nodes have no say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_COMMUTES = (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default)


@dataclass(frozen=True)
class Call:
    """A call of a pattern.

    Args:
        target: what it calls.
        args: of the call: calls, strings for any value, or plain values, which must be equal.
        kwargs: as args; all that a node has must be here.
        name: for the value of the call.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    def __init__(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> None:
        for key, value in (("target", target), ("args", args), ("kwargs", kwargs), ("name", name)):
            object.__setattr__(self, key, value)


@dataclass(frozen=True)
class Match:
    """Where a pattern stands.

    Args:
        found: name in the pattern -> what stands there.
        calls: the nodes of its calls.
    """

    found: dict[str, Any]
    calls: frozenset[fx.Node]


def match(pattern: Call, node: fx.Node) -> Match | None:
    """The pattern with `node` as its last call; None where it does not stand there."""
    return _match(pattern, node, Match({}, frozenset()))


def _match(pattern: Any, value: Any, so_far: Match) -> Match | None:
    if isinstance(pattern, str):
        return _bound(pattern, value, so_far)
    if not isinstance(pattern, Call):
        return so_far if type(pattern) is type(value) and pattern == value else None
    if not isinstance(value, fx.Node) or value.target is not pattern.target:
        return None
    if len(value.args) != len(pattern.args) or value.kwargs.keys() != pattern.kwargs.keys():
        return None
    named = so_far if pattern.name is None else _bound(pattern.name, value, so_far)
    orders = [pattern.args]
    if pattern.target in _COMMUTES and not pattern.kwargs:
        orders.append((pattern.args[1], pattern.args[0], *pattern.args[2:]))
    for args in orders:
        found = named
        pairs = [*zip(args, value.args, strict=True), *((p, value.kwargs[key]) for key, p in pattern.kwargs.items())]
        for part, argument in pairs:
            found = None if found is None else _match(part, argument, found)
        if found is not None:
            return Match(found.found, found.calls | {value})
    return None


def _bound(name: str, value: Any, so_far: Match) -> Match | None:
    """The match with a name bound to a value, if it is to no other."""
    if name in so_far.found:
        known = so_far.found[name]
        return so_far if known is value or (not isinstance(value, fx.Node) and known == value) else None
    return Match({**so_far.found, name: value}, so_far.calls)
