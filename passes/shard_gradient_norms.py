"""The norm of all gradients, from the rows that each rank keeps: one small all-reduce instead of whole gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import first_argument
from fxzero.passes.shard_optimizer_state import rows_for

aten = torch.ops.aten


@graph_pass(
    requires=("optimizer-state-sharded",),
    numerics="sums squares in another order: within 1e-6 of the norm of whole gradients",
)
def shard_gradient_norms(step: StepGraph, *, axis: str, only_gathered: bool = False) -> int:
    """Take norms of rows, reduce what they add up to over `axis`, and join it with the norms of whole gradients.

    Args:
        step: the graph, whose update takes rows of reduced gradients.
        axis: the mesh axis of those rows.
        only_gathered: leave norms of what every rank has whole anyway.
    """
    edits = 0
    for total in step.calls(aten.linalg_vector_norm.default):
        norms = _norms_under(total)
        sources = {norm: first_argument(norm) for norm in norms}
        found = {norm: rows_for(x, axis, only_gathered=only_gathered) for norm, x in sources.items()}
        sharded = {norm: rows for norm, rows in found.items() if rows is not None}
        if not sharded:
            continue
        p = _order(total)
        for norm, rows in sharded.items():
            norm.replace_input_with(sources[norm], rows)
        editor = Editor(step, phase="update")
        with editor.before(total):
            partial = editor.call(aten.stack.default, list(sharded), name="grad_norm_parts")
            partial = editor.call(aten.linalg_vector_norm.default, partial, p, name="grad_norm_local")
            over_ranks = _over_ranks(editor, partial, p, axis)
            whole = [norm for norm in norms if norm not in sharded]
            joined = editor.call(aten.stack.default, [over_ranks, *whole], name="grad_norm_all")
        old = total.args[0]
        total.replace_input_with(old, joined)  # type: ignore[arg-type]
        step.graph.erase_node(old)  # type: ignore[arg-type]
        edits += len(sharded)
    return edits


def _norms_under(total: fx.Node) -> list[fx.Node]:
    """The norms that a norm of norms is taken of; none for any other node."""
    stack: Any = total.args[0]
    if stack.target is not aten.stack.default or len(stack.users) != 1 or len(total.args) > 2:
        return []
    norms = stack.args[0]
    alike = all(n.target is aten.linalg_vector_norm.default and len(n.args) <= 2 for n in norms)
    return list(norms) if alike and all(_order(n) == _order(total) for n in norms) else []


def _order(norm: fx.Node) -> float:
    return float(norm.args[1]) if len(norm.args) > 1 else 2.0  # type: ignore[arg-type]


def _over_ranks(editor: Editor, partial: fx.Node, p: float, axis: str) -> fx.Node:
    """The p-norm over ranks of one number a rank."""
    if math.isinf(p):
        return editor.all_reduce(partial, axis, op="max", stem="grad_norm")
    if p == 1:
        return editor.all_reduce(partial, axis, op="sum", stem="grad_norm")
    power = editor.call(aten.pow.Tensor_Scalar, partial, p)
    total = editor.all_reduce(power, axis, op="sum", stem="grad_norm")
    return editor.call(aten.pow.Tensor_Scalar, total, 1 / p)
