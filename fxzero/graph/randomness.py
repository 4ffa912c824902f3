"""Which calls draw random numbers: their order in a graph is part of its meaning."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat

aten = torch.ops.aten


def is_random(node: fx.Node) -> bool:
    """Whether a call draws from the default generator."""
    return draws(node.target, node.args, node.kwargs)


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an op, called like this, draws from the default generator."""
    if not _may_draw(target):
        return False
    if "attention" in target.name():  # tagged, but draws nothing at dropout 0
        named = dict(zip((a.name for a in target._schema.arguments), args, strict=False))
        return bool({**named, **kwargs}.get("dropout_p", 0.0))
    return target is not aten.empty_like.default


@functools.cache  # asked for every node of every graph, and the tags of an op are slow to read
def _may_draw(target: Any) -> bool:
    return compat.is_op(target) and torch.Tag.nondeterministic_seeded in target.tags
