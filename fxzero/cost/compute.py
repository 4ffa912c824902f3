"""Seconds that a call takes by itself: the longer of its arithmetic and its traffic with memory, and an overhead.

Source: Roofline: An Insightful Visual Performance Model (Williams et al., 2009). Counts of operations are torch's own
(`torch.utils.flop_counter`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxzero import compat
from fxzero.cost.hardware import Hardware
from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.step_graph import is_getitem, is_view, num_bytes, yields_scalar

aten = torch.ops.aten

# ops that torch has no formula for -> the one whose formula is theirs, with the same leading arguments
_AS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_efficient_attention_backward,
}


def compute_seconds(node: fx.Node, hardware: Hardware) -> float:
    """Seconds of one call on a device that does nothing else.

    Views, host numbers, collectives (whose time is the network's) and inputs take none.
    """
    target: Any = node.target
    if node.op != "call_function" or is_getitem(node) or is_view(node) or yields_scalar(node):
        return 0.0
    if c10d.is_collective(node) or c10d.is_wait(node) or target is ops.release or not compat.is_op(target):
        return 0.0
    traffic_s = traffic_bytes(node) / hardware.memory_bytes_s
    flops = matrix_flops(node)
    if flops:
        arithmetic_s = flops / hardware.matrix_rate(_computed_in(node))
    else:
        arithmetic_s = max(map(_num_elements, _tensors(node)), default=0) / hardware.vector_flops
    return max(arithmetic_s, traffic_s) + hardware.op_overhead_s


def matrix_flops(node: fx.Node) -> int:
    """Floating point operations of a matrix product, convolution or attention; 0 for all else."""
    target: Any = node.target
    if not compat.is_op(target):
        return 0
    formula = flop_registry.get(_AS.get(target.overloadpacket, target.overloadpacket))
    if formula is None:
        return 0
    args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def traffic_bytes(node: fx.Node) -> int:
    """Bytes of the tensors that a call reads and of those that it makes."""
    return sum(num_bytes(source.meta.get("val")) for source in node.all_input_nodes) + num_bytes(node.meta["val"])


def _computed_in(node: fx.Node) -> torch.dtype:
    floating = [val.dtype for val in _tensors(node) if val.dtype.is_floating_point]
    return floating[0] if floating else torch.float32


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a call reads and makes; of lists, the items."""
    found: list[torch.Tensor] = []
    values = [source.meta.get("val") for source in node.all_input_nodes] + [node.meta["val"]]
    while values:
        val = values.pop(0)
        if isinstance(val, torch.Tensor):
            found.append(val)
        elif isinstance(val, (list, tuple)):
            values += val
    return found


def _num_elements(val: torch.Tensor) -> int:
    return val.numel() if isinstance(val.numel(), int) else 0
