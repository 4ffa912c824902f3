"""Which calls draw random numbers: their order in a graph is part of its meaning."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero import compat

aten = torch.ops.aten


def is_random(node: fx.Node) -> bool:
    """Whether a call draws from the default generator."""
    target: Any = node.target
    if not compat.is_op(target) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    if "attention" in target.name():  # tagged, but draws nothing at dropout 0
        named = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False))
        return bool({**named, **node.kwargs}.get("dropout_p", 0.0))
    return target is not aten.empty_like.default
