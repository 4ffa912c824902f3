"""Values of a trace in progress, and the nodes that yield them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_slot, track_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxzero import compat


def node_of(value: Any) -> fx.Node | None:
    """The node that yields a tensor (wrapped by `compat.to_functional`) or a symbolic number at present.

    Returns:
        None where none does: for what is not traced.
    """
    if not isinstance(value, torch.Tensor):
        return compat.node_of(value)
    if not hasattr(value, "elem"):
        return None
    slot: Any = get_proxy_slot(compat.from_functional(value, sync=False), compat.tracer(), None)
    return None if slot is None else slot.proxy.node


def value_like(tensor: torch.Tensor, node: fx.Node) -> torch.Tensor:
    """A new tensor in the layout of a wrapped one, yielded by `node`."""
    inner = compat.from_functional(tensor, sync=False)
    with compat.no_modes(), compat.fake_mode_of(inner):
        fake = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device)
    tracer = compat.tracer()
    track_tensor(fake, fx.Proxy(node, tracer), constant=None, tracer=tracer)
    return compat.to_functional(fake)


def constant_like(value: torch.Tensor) -> fx.Node:
    """A node that yields a constant of its own, with the value of a real tensor."""
    with compat.no_modes():
        own = value.clone()
    node: fx.Node = compat.tracer().create_arg(own)
    return node


def memory_of(tensor: torch.Tensor) -> int:
    """What is equal for two wrapped tensors where one is a view of the other."""
    return int(StorageWeakRef(tensor.elem.untyped_storage()).cdata)  # type: ignore[attr-defined]
