"""Seconds that a call takes by itself: the longer of its arithmetic and its traffic with memory, and an overhead.

Source: Roofline: An Insightful Visual Performance Model (Williams et al., 2009). Counts of operations are torch's own
(`torch.utils.flop_counter`). Which rates count is said by the op's class (`op_classes.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxzero import compat
from fxzero.cost.hardware import Hardware
from fxzero.cost.op_classes import SAME_FLOPS, op_class, word_of
from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.step_graph import is_getitem, is_view, num_bytes, yields_scalar

# ops that read of their first tensor only what their indices name
_READ_WHAT_IS_NAMED = {"embedding", "index", "index_select", "gather", "_unsafe_index", "nll_loss_forward"}


def computes(node: fx.Node) -> bool:
    """Whether a call does work on tensors: views, host numbers, collectives, waits and releases do not."""
    target: Any = node.target
    if node.op != "call_function" or is_getitem(node) or is_view(node) or yields_scalar(node):
        return False
    return not (c10d.is_collective(node) or c10d.is_wait(node) or target is ops.release or not compat.is_op(target))


def compute_seconds(node: fx.Node, hardware: Hardware, *, in_place: bool = False, blocks: int = 1) -> float:
    """Seconds of one call on a device that does nothing else.

    Views, host numbers, collectives (whose time is the network's) and inputs take none.

    Args:
        node: the call.
        hardware: the machine.
        in_place: it writes over its first input, and takes no memory of its own.
        blocks: how many calls are made for it, each of its part of the elements (`graph/blocked_runs.py`).
    """
    if not computes(node):
        return 0.0
    name = op_class(node)
    if in_place and name == "pointwise":
        name = "in_place"
    traffic = traffic_bytes(node)
    flops = matrix_flops(node)
    if flops:
        peak = hardware.matrix_rate(_computed_in(node))
        rate = hardware.matrix_rates.get(name) or hardware.matrix_rates.get("matmul")
        part = rate.part(_smallest_dim(node, name)) if rate else 1.0
        seconds = max(flops / (peak * part), traffic / hardware.memory_bytes_s) + hardware.op_overhead_s
    else:
        overhead_s = _memory_overhead(hardware, name)
        each_s = memory_seconds(node, hardware, traffic / blocks, name=name, overhead=False)
        seconds = max(arithmetic_seconds(node, hardware), blocks * each_s) + blocks * overhead_s
    return seconds if in_place or blocks > 1 else seconds + fresh_seconds(node, hardware)


def arithmetic_seconds(node: fx.Node, hardware: Hardware) -> float:
    """Seconds that the arithmetic of a call takes which is no product, where memory takes none."""
    return max(map(_num_elements, _tensors(node)), default=0) / hardware.vector_flops


def memory_seconds(
    node: fx.Node, hardware: Hardware, traffic: float, *, name: str | None = None, overhead: bool
) -> float:
    """Seconds in which a call moves bytes through memory, at the rate of its class.

    Args:
        node: the call.
        hardware: the machine.
        traffic: bytes that it reads and writes.
        name: of its class, where that is known.
        overhead: with what a call costs beside.
    """
    name = name or op_class(node)
    memory = hardware.ops.get(name) or hardware.ops.get("pointwise")
    beside_s = _memory_overhead(hardware, name)
    alone_s = memory.seconds(traffic) - beside_s if memory else traffic / hardware.memory_bytes_s
    return alone_s + (beside_s if overhead else 0.0)


def _memory_overhead(hardware: Hardware, name: str) -> float:
    memory = hardware.ops.get(name) or hardware.ops.get("pointwise")
    return memory.overhead_s if memory else hardware.op_overhead_s


def host_seconds(node: fx.Node, hardware: Hardware) -> float:
    """Seconds of one call of an update that the host runs: on a GPU's host, bound by that one's memory."""
    if hardware.device == "cpu":
        return compute_seconds(node, hardware)
    return traffic_bytes(node) / hardware.host_memory_bytes_s + hardware.op_overhead_s if computes(node) else 0.0


def fresh_seconds(node: fx.Node, hardware: Hardware) -> float:
    """Seconds until the memory of a call's outputs is usable."""
    val = node.meta["val"]
    outputs = val if isinstance(val, (list, tuple)) else [val]
    return sum(hardware.fresh_seconds(num_bytes(output)) for output in outputs)


def matrix_flops(node: fx.Node) -> int:
    """Floating point operations of a matrix product, convolution or attention; 0 for all else."""
    target: Any = node.target
    if not compat.is_op(target):
        return 0
    formula = flop_registry.get(SAME_FLOPS.get(target.overloadpacket, target.overloadpacket))
    if formula is None:
        return 0
    args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def traffic_bytes(node: fx.Node) -> int:
    """Bytes of the tensors that a call reads and of those that it makes; of a table, of the rows that are looked up."""
    made = num_bytes(node.meta["val"])
    sources = node.all_input_nodes
    if compat.is_op(node.target) and word_of(node.target) in _READ_WHAT_IS_NAMED and len(sources) > 1:
        return 2 * made + sum(num_bytes(source.meta.get("val")) for source in sources[1:])
    return sum(num_bytes(source.meta.get("val")) for source in sources) + made


def _smallest_dim(node: fx.Node, name: str) -> float:
    """The smallest size of a product: rows, columns or what is summed over; of attention, the shorter sequence."""
    tensors = [arg.meta["val"] for arg in node.args if isinstance(arg, fx.Node)]
    shapes = [val.shape for val in tensors if isinstance(val, torch.Tensor)]
    if name.startswith("attention"):
        return float(min(shape[-2] for shape in shapes[:2]))
    if name == "convolution":
        weight = shapes[2 if "backward" in str(node.target) else 1]
        return float(min(weight[0], math.prod(weight[1:])))
    left, right = shapes[-2:]
    return float(min(*left[-2:], *right[-2:]))


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
