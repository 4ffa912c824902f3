"""Only the largest elements of a gradient travel; a rank keeps the others back and adds them to its next gradient.

Each rank gathers all ranks' chosen values with their positions, and adds up those of the rows that it updates.
Source: Deep Gradient Compression (Lin et al., 2018), section 3, without its momentum correction; that nothing is lost
where the rest is kept back: Stich et al., 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import AuxiliaryState, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, auxiliary_input, coordinate
from fxzero.graph.error_feedback_ops import MAX_ELEMENTS, drop_top_k, pack_top_k, sum_top_k
from fxzero.graph.step_graph import Sharding, identifier
from fxzero.passes.quantize_all_gathers import check_dtype
from fxzero.passes.reduce_gradients import gradient_reductions, own_gradient, replace_reduction

aten = torch.ops.aten


def num_chosen(shape: Sequence[int], *, fraction: float, below: int) -> int | None:
    """How many elements of a gradient travel; None where all do, as they are."""
    elements = math.prod(shape)
    return None if not shape or elements < max(below, 1) or elements > MAX_ELEMENTS else math.ceil(fraction * elements)


def top_k_states(
    parameters: Mapping[str, torch.Tensor], *, ranks: int, fraction: float, below: int
) -> list[AuxiliaryState]:
    """The state that `compress_with_top_k` needs for these parameters: what each rank keeps back."""
    return [
        _residual(name, p.shape, p.dtype, ranks)
        for name, p in parameters.items()
        if num_chosen(p.shape, fraction=fraction, below=below) and p.requires_grad and p.dtype.is_floating_point
    ]


def _residual(name: str, shape: Sequence[int], dtype: torch.dtype, ranks: int) -> AuxiliaryState:
    wide = torch.promote_types(dtype, torch.float32)
    return AuxiliaryState(f"top_k.residual.{name}", (ranks, *shape), wide, sharded=True)


@graph_pass(
    requires=("gradients-reduced",),
    provides=("gradients-sparse",),
    numerics="another gradient: the given fraction of each rank's, by magnitude; the rest is added to later ones",
)
def compress_with_top_k(step: StepGraph, *, axis: str, fraction: float, below: int = 0) -> int:
    """Replace a gradient's reduction over `axis`: gather all ranks' largest elements, keep back the others.

    Args:
        step: the graph.
        axis: the mesh axis.
        fraction: of a gradient's elements, how many travel.
        below: gradients with fewer elements travel as they are.

    Raises:
        PlanError: if a gradient is not of a real floating-point dtype, or none can be compressed.
    """
    launches = gradient_reductions(step, axis)
    parameters = {node.meta["entry"].name: node for node in step.inputs("parameter")}
    edits = 0
    for launch in launches:
        name = launch.meta["param"]
        shape, dtype = parameters[name].meta["entry"].shape, parameters[name].meta["val"].dtype
        k = num_chosen(shape, fraction=fraction, below=below)
        if k is None:
            continue
        check_dtype(launch.meta["val"].dtype, f"compress_reductions='topk', gradient of {name!r}")
        _compress(step, launch, k, auxiliary_input(step, _residual(name, shape, dtype, step.mesh[axis]), axis))
        edits += 1
    if launches and not edits:
        raise PlanError.of(
            "Plan.compress_reductions 'topk'",
            expected=f"a gradient of {below} elements or more (and of at most {MAX_ELEMENTS})",
            got="none",
            fix="lower compress_below, or leave compress_reductions out",
        )
    return edits


def _compress(step: StepGraph, launch: fx.Node, k: int, residual: fx.Node) -> None:
    (waited,) = launch.users
    axis, name, op = c10d.axis_of(launch), launch.meta["param"], launch.args[1]
    stem = f"{identifier(name)}_top_k"
    size, sharding = step.mesh[axis], launch.meta.get("sharding")
    editor = Editor(step, phase="backward", module=launch.meta["module"], param=name)
    rests = residual.meta["sharding"]
    with editor.before(launch):
        shape = list(residual.meta["val"].shape)
        gradient = editor.call(aten.view.default, editor.contiguous(own_gradient(launch)), shape)
        total = editor.call(aten.add.Tensor, residual, gradient, sharding=rests, name=f"{stem}_total")
        packed = editor.call(pack_top_k, total, k, name=f"{stem}_packed")
        missed = editor.call(drop_top_k, total, packed, sharding=rests, name=f"{stem}_missed")
        sent = editor.call(c10d.all_gather, packed, size, axis, name=f"{stem}_gather")
    with editor.before(waited):
        arrived = editor.call(c10d.wait, sent, name=f"{stem}_arrived")
        value = _sum(editor, arrived, shape[1:], size, op, sharding, waited.meta["val"].dtype, stem)
    replace_reduction(launch, value)
    step.set_result("auxiliary", residual.meta["entry"].name, missed)


def _sum(
    editor: Editor,
    arrived: fx.Node,
    shape: list[int],
    parts: int,
    op: object,
    sharding: Sharding | None,
    dtype: torch.dtype,
    stem: str,
) -> fx.Node:
    """What arrived, added up: in this rank's rows where the gradient is sharded, else in all."""
    shards = 1 if sharding is None else sharding.num_shards
    index = 0 if sharding is None else coordinate(editor.step, sharding.axis)
    return editor.call(sum_top_k, arrived, shape, parts, op, shards, index, dtype, sharding=sharding, name=stem)
