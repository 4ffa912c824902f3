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

from fxzero import compat

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


def match(pattern: Call, node: fx.Node, beside: Match | None = None) -> Match | None:
    """The pattern with `node` as its last call; None where it does not stand there.

    Args:
        pattern: a call.
        node: of a graph.
        beside: what has been found of another pattern, whose names mean the same; it is part of the match.
    """
    return _match(pattern, node, beside or Match({}, frozenset()))


@dataclass(frozen=True)
class Difference:
    """Where a graph goes on otherwise than a pattern.

    Args:
        last: the node that was compared with the pattern's last call.
        told: how the first one that differs does; nothing where only values do.
        alike: calls above `last`, itself too, that are as in the pattern.
    """

    last: fx.Node
    told: str
    alike: int


def first_difference(pattern: Call, node: fx.Node) -> Difference:
    """The first call, from the last one upwards, that is not the pattern's."""
    alike = 0
    stack: list[tuple[Any, Any]] = [(pattern, node)]
    while stack:
        part, value = stack.pop()
        if not isinstance(part, Call):
            continue
        target = value.target if isinstance(value, fx.Node) else value
        if target is not part.target:
            given = value.op if isinstance(value, fx.Node) and value.op != "call_function" else _named(target)
            told = f"%{value} is {given}" if isinstance(value, fx.Node) else f"{value!r} stands there"
            return Difference(node, f"{told}, not {_named(part.target)}", alike)
        if value.kwargs.keys() != part.kwargs.keys():
            given = ", ".join(value.kwargs) or "nothing"
            return Difference(
                node, f"%{value} is given {given} by name, not {', '.join(part.kwargs) or 'nothing'}", alike
            )
        alike += 1
        pairs = [(p, value.kwargs.get(key)) for key, p in part.kwargs.items()]
        pairs += zip(_in_order(part, value.args), value.args, strict=False)
        stack += reversed(pairs)
    return Difference(node, "", alike)


def _in_order(part: Call, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a pattern, turned around where that is more like a call's."""

    def likeness(order: tuple[Any, ...]) -> int:
        pairs = zip(order, args, strict=False)
        return sum(isinstance(p, Call) and getattr(a, "target", None) is p.target for p, a in pairs)

    turned = (*part.args[1::-1], *part.args[2:])
    return max(part.args, turned, key=likeness) if part.target in _COMMUTES else part.args


def _named(target: Any) -> str:
    return str(target) if compat.is_op(target) else str(getattr(target, "__name__", target))


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
