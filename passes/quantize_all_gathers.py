"""Gathered parameters travel as one byte an element: each rank quantizes its rows, all read the same rounded values.

The parameter itself keeps its precision: what is rounded is the copy that a forward or backward computes with. The
packed bytes die where they are read; what is released after the last use is the tensor that they are read into.
Source: ZeRO++ (Wang et al., 2023), section 3.1; a scale a row as in the fp8 linear layers of torchao.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.compression_ops import dequantize_blockwise, quantize_blockwise
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import identifier, is_getitem, is_view

aten = torch.ops.aten

# matrix products, and the position of their first factor
_PRODUCTS: dict[Any, int] = {aten.mm.default: 0, aten.bmm.default: 0, aten.mv.default: 0, aten.matmul.default: 0}
_PRODUCTS |= {aten.linear.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1, aten.addmv.default: 1}
# ops that only bring a weight into the form in which a matrix product takes it
_FORMS_OF_A_WEIGHT = {aten._to_copy.default, aten.clone.default, aten.slice.Tensor}


@graph_pass(
    requires=("parameters-sharded",),
    provides=("gathers-quantized",),
    numerics="rounds what forward and backward compute with: int8 to within 1/254 of its block's largest element, "
    "fp8 to within 1/16 of the element",
)
def quantize_all_gathers(step: StepGraph, *, form: str, block: int, below: int = 0) -> int:
    """Quantize each rank's rows of a parameter, gather scales and bytes as one tensor, and read that into whole rows.

    A parameter is quantized alike in forward and backward, or not at all. A cast before the gather is left out: the
    bytes are read straight into its dtype.

    Args:
        step: the graph.
        form: "int8" or "fp8" (a scale for each `block` elements), or "fp8_rows": fp8 with a scale a row, for weights
            that only matrix products read.
        block: elements that share a scale; not for "fp8_rows".
        below: parameters with fewer elements travel as they are.

    Raises:
        PlanError: if a parameter is not of a real floating-point dtype, or none can be quantized.
    """
    gathers: dict[fx.Node, list[fx.Node]] = {}
    for gather in step.calls(c10d.all_gather):
        parameter = c10d.parameter_gathered(gather)
        if parameter is not None and gather.meta["phase"] != "update":
            gathers.setdefault(parameter, []).append(gather)
    edits = 0
    for parameter, launches in gathers.items():
        name, shape = parameter.meta["entry"].name, _gathered_shape(parameter)
        by_rows = form == "fp8_rows"
        if math.prod(shape) < below:
            continue
        if by_rows and (len(shape) < 2 or not _is_weight_of_products(launches)):
            continue
        check_dtype(parameter.meta["val"].dtype, f"compress_gathers={form!r}, parameter {name!r}")
        size = math.prod(shape[1:]) if by_rows else block
        for gather in launches:
            _quantize(step, gather, parameter, form="fp8" if by_rows else form, block=size)
        edits += len(launches)
    if gathers and not edits:
        kind = "weight that only matrix products read, of" if form == "fp8_rows" else "gathered parameter of"
        largest = max(math.prod(_gathered_shape(parameter)) for parameter in gathers)
        raise PlanError.of(
            f"Plan.compress_gathers {form!r}",
            expected=f"a {kind} {below} elements or more",
            got=f"none; the largest parameter has {largest}",
            fix="lower compress_below, or leave compress_gathers out",
        )
    return edits


def _gathered_shape(parameter: fx.Node) -> tuple[int, ...]:
    """Of what is gathered of a sharded parameter, without padding: the whole, or what another axis leaves a rank."""
    return (parameter.meta["sharding"].rows, *parameter.meta["val"].shape[1:])


def check_dtype(dtype: torch.dtype, where: str) -> None:
    """Raise PlanError unless a tensor of this dtype can be quantized."""
    if not dtype.is_floating_point:
        raise PlanError.of(
            where,
            expected="a real floating-point dtype",
            got=str(dtype).removeprefix("torch."),
            fix="raise compress_below above its size, or leave that compression out",
        )


def _quantize(step: StepGraph, gather: fx.Node, parameter: fx.Node, *, form: str, block: int) -> None:
    (waited,) = gather.users
    rows, sharding = gather.args[0], parameter.meta["sharding"]
    dtype, shape = gather.meta["val"].dtype, list(gather.meta["val"].shape)
    name = gather.meta["param"]
    stem = identifier(name)
    editor = Editor(step, phase=gather.meta["phase"], module=gather.meta["module"], param=name)
    with editor.before(gather):
        packed = editor.call(quantize_blockwise, parameter, form, block, 1, name=f"{stem}_quantized")
        size = sharding.num_shards
        launch = editor.call(c10d.all_gather, packed, size, sharding.axis, name=f"{stem}_gather_packed")
    editor.meta = {**editor.meta, "phase": waited.meta["phase"]}
    with editor.before(waited):
        arrived = editor.call(c10d.wait, launch, name=f"{stem}_packed")
        full = editor.call(dequantize_blockwise, arrived, shape, form, block, size, dtype, name=f"{stem}_dequantized")
    waited.replace_all_uses_with(full)
    for node in (waited, gather, rows):
        if node.op == "call_function" and not node.users:  # type: ignore[union-attr]
            step.graph.erase_node(node)  # type: ignore[arg-type]


def _is_weight_of_products(launches: list[fx.Node]) -> bool:
    """Whether nothing but matrix products (and the release) reads what is gathered, in forward and backward."""
    stack = [wait for launch in launches for wait in launch.users]
    while stack:
        node = stack.pop()
        for user in node.users:
            if c10d.is_release(user) or _is_factor(node, user):
                continue
            if not (is_view(user) or is_getitem(user) or user.target in _FORMS_OF_A_WEIGHT):
                return False
            stack.append(user)
    return True


def _is_factor(node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` is a matrix product with `node` as a factor (and not as what is added to it)."""
    first = _PRODUCTS.get(user.target)
    return first is not None and any(node is factor for factor in user.args[first : first + 2])
