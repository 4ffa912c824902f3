"""Gradients travel as two thin matrices: a step of power iteration a step of training, and what it misses is kept.

With M the gradient of a rank plus what it has kept back, as a matrix [rows, rest], and Q the right factor of the step
before, on all ranks the same:

    P = mean over ranks of M Q                      sent: rows x rank
    P = orthonormal columns that span those of P
    q = M^T P;  Q = mean over ranks of q            sent: rest x rank
    gradient = P Q^T                                of it a rank forms the rows that it updates
    kept back = M - P q^T                           of what this rank's M added to the mean

The mean of what ranks keep back is what the gradient misses of the mean of M, so nothing is lost, only late.
Source: PowerSGD (Vogels et al., 2019), algorithms 1 and 2.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import AuxiliaryState, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, auxiliary_input
from fxzero.graph.error_feedback_ops import power_basis
from fxzero.graph.step_graph import Sharding, identifier
from fxzero.passes.quantize_all_gathers import check_dtype
from fxzero.passes.reduce_gradients import gradient_reductions, own_gradient, replace_reduction

aten = torch.ops.aten


@dataclass(frozen=True)
class LowRank:
    """How one gradient is compressed: as a matrix [rows, rest] of a rank."""

    rows: int
    rest: int
    rank: int

    @classmethod
    def of(cls, shape: Sequence[int], *, rank: int, below: int) -> LowRank | None:
        """For a parameter of this shape; None where it travels as it is: a vector, what two factors would enlarge."""
        elements = math.prod(shape)
        if len(shape) < 2 or elements < max(below, 1):
            return None
        rows, rest = shape[0], elements // shape[0]
        rank = min(rank, rows, rest)
        return cls(rows, rest, rank) if rank * (rows + rest) < elements else None

    def states(self, name: str, shape: Sequence[int], dtype: torch.dtype, ranks: int) -> list[AuxiliaryState]:
        """What is kept for the parameter `name`: what each rank keeps back, and the factor Q."""
        wide = torch.promote_types(dtype, torch.float32)
        return [
            AuxiliaryState(f"powersgd.residual.{name}", (ranks, *shape), wide, sharded=True),
            AuxiliaryState(f"powersgd.factor.{name}", (self.rest, self.rank), wide),
        ]


def powersgd_states(
    parameters: Mapping[str, torch.Tensor], *, ranks: int, rank: int, below: int
) -> list[AuxiliaryState]:
    """The state that `compress_with_powersgd` needs for these parameters."""
    states = []
    for name, p in parameters.items():
        low = LowRank.of(p.shape, rank=rank, below=below)
        if low is not None and p.requires_grad and p.dtype.is_floating_point:
            states += low.states(name, p.shape, p.dtype, ranks)
    return states


@graph_pass(
    requires=("gradients-reduced",),
    provides=("gradients-low-rank",),
    numerics="another gradient: the best that a rank of `rank` can follow; what is missed is added to later ones",
)
def compress_with_powersgd(step: StepGraph, *, axis: str, rank: int, below: int = 0) -> int:
    """Replace a gradient's reduction over `axis` by those of two factors, and keep back what they miss.

    Args:
        step: the graph.
        axis: the mesh axis.
        rank: columns of the factors.
        below: gradients with fewer elements travel as they are, as do vectors.

    Raises:
        PlanError: if a gradient is not of a real floating-point dtype, or none can be compressed.
    """
    launches = gradient_reductions(step, axis)
    parameters = {node.meta["entry"].name: node for node in step.inputs("parameter")}
    edits = 0
    for launch in launches:
        name = launch.meta["param"]
        shape, dtype = parameters[name].meta["entry"].shape, parameters[name].meta["val"].dtype
        low = LowRank.of(shape, rank=rank, below=below)
        if low is None:
            continue
        check_dtype(launch.meta["val"].dtype, f"compress_reductions='powersgd', gradient of {name!r}")
        residual, factor = low.states(name, shape, dtype, step.mesh[axis])
        _compress(step, launch, low, auxiliary_input(step, residual, axis), auxiliary_input(step, factor, axis))
        edits += 1
    if launches and not edits:
        raise PlanError.of(
            "Plan.compress_reductions 'powersgd'",
            expected=f"a gradient of {below} elements or more that two factors of rank {rank} make smaller",
            got="none",
            fix="lower compress_below or powersgd_rank, or leave compress_reductions out",
        )
    return edits


def _compress(step: StepGraph, launch: fx.Node, low: LowRank, residual: fx.Node, factor: fx.Node) -> None:
    (waited,) = launch.users
    axis, name = c10d.axis_of(launch), launch.meta["param"]
    stem = f"{identifier(name)}_powersgd"
    sharding: Sharding | None = launch.meta.get("sharding")
    editor = Editor(step, phase="backward", module=launch.meta["module"], param=name)
    with editor.before(launch):
        matrix = [low.rows, low.rest]
        gradient = editor.call(aten.view.default, editor.contiguous(own_gradient(launch)), matrix)
        kept = editor.call(aten.view.default, residual, matrix)
        m = editor.call(aten.add.Tensor, kept, gradient, name=f"{stem}_m")
        started = editor.call(power_basis, factor, name=f"{stem}_basis")
        p = editor.call(aten.mm.default, m, started, name=f"{stem}_p")
        p = editor.call(c10d.all_reduce, p, "avg", axis, name=f"{stem}_p_reduce")
    with editor.before(waited):
        p = editor.call(c10d.wait, p, name=f"{stem}_p_mean")
        p = editor.call(operator.getitem, editor.call(aten.linalg_qr.default, p), 0, name=f"{stem}_p_orthonormal")
        own = editor.call(aten.mm.default, editor.call(aten.t.default, m), p, name=f"{stem}_q")
        q = editor.all_reduce(own, axis, op="avg", stem=f"{stem}_q")
        missed = editor.call(aten.addmm.default, m, p, editor.call(aten.t.default, own), alpha=-1)
        shape, rests = list(residual.meta["val"].shape), residual.meta["sharding"]
        missed = editor.call(aten.view.default, missed, shape, sharding=rests, name=f"{stem}_missed")
        rows = p if sharding is None else editor.local_shard(p, sharding, stem=f"{stem}_p")
        value = editor.call(aten.mm.default, rows, editor.call(aten.t.default, q), sharding=sharding)
        whole = launch.meta["val"]
        value = editor.call(aten.view.default, value, list(waited.meta["val"].shape), sharding=sharding, name=stem)
        if value.meta["val"].dtype != whole.dtype:
            value = editor.call(aten._to_copy.default, value, dtype=whole.dtype, sharding=sharding)
    replace_reduction(launch, value)
    step.set_result("auxiliary", residual.meta["entry"].name, missed)
    step.set_result("auxiliary", factor.meta["entry"].name, q)
