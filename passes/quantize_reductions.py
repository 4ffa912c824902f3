"""Gradients travel as one byte an element: each rank quantizes the rows for each other one, which averages what comes.

A gradient is rounded once, at the rank that computed it, and summed in fp32 where it arrives; a ring reduce-scatter of
quantized values would round again at every hop.
Source: ZeRO++ (Wang et al., 2023), section 3.3, without its second hop over nodes.
"""

from __future__ import annotations

import math

from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.compression_ops import dequantize_reduce, packed_bytes, quantize_blockwise
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import first_argument, identifier
from fxzero.passes.quantize_all_gathers import check_dtype


@graph_pass(
    requires=("gradients-sharded",),
    provides=("reductions-quantized",),
    numerics="rounds each rank's gradient before the mean: int8 to within 1/254 of its block's largest element, "
    "fp8 to within 1/16 of the element; ranks are summed in order",
)
def quantize_reductions(step: StepGraph, *, form: str, block: int, below: int = 0) -> int:
    """Replace a gradient's reduce-scatter: quantize the rows of each rank, exchange them all to all, average.

    Args:
        step: the graph.
        form: "int8" or "fp8".
        block: elements that share a scale.
        below: gradients with fewer elements travel as they are.

    Raises:
        PlanError: if a gradient is not of a real floating-point dtype, or none can be quantized.
    """
    edits, largest = 0, 0
    scatters = step.calls(c10d.reduce_scatter)
    launches = [n for n in scatters if n.meta["phase"] == "backward" and not c10d.moves_parts(n)]
    for launch in launches:
        sharding, full = launch.meta["sharding"], first_argument(launch).meta["val"]
        elements = math.prod((sharding.rows, *full.shape[1:]))
        largest = max(largest, elements)
        if elements < below:
            continue
        check_dtype(full.dtype, f"compress_reductions={form!r}, gradient of {launch.meta.get('param')!r}")
        _quantize(step, launch, form=form, block=block)
        edits += 1
    if launches and not edits:
        raise PlanError.of(
            f"Plan.compress_reductions {form!r}",
            expected=f"a sharded gradient of {below} elements or more",
            got=f"none; the largest has {largest}",
            fix="lower compress_below, or leave compress_reductions out",
        )
    return edits


def _quantize(step: StepGraph, launch: fx.Node, *, form: str, block: int) -> None:
    full, op, size, axis = launch.args
    (waited,) = launch.users
    sharding, rows = launch.meta["sharding"], launch.meta["val"]
    name = launch.meta["param"]
    stem = f"{identifier(name)}_grad"
    editor = Editor(step, phase=launch.meta["phase"], module=launch.meta["module"], param=name)
    with editor.before(launch):
        packed = editor.call(quantize_blockwise, full, form, block, size, name=f"{stem}_quantized")
        splits = [packed_bytes(rows.numel(), block)] * size  # type: ignore[operator]
        sent = editor.call(c10d.all_to_all, packed, splits, splits, axis, name=f"{stem}_exchange")
    with editor.before(waited):
        received = editor.call(c10d.wait, sent, name=f"{stem}_packed")
        shape = list(rows.shape)
        arguments = (shape, form, block, size, op, rows.dtype)
        reduced = editor.call(dequantize_reduce, received, *arguments, sharding=sharding, name=f"{stem}_mean")
    waited.replace_all_uses_with(reduced)
    step.graph.erase_node(waited)
    step.graph.erase_node(launch)
