"""Which parameters are those of experts: stacked matrices, one for each expert, that a product takes as such.

They are found by who reads them, not by name: grouped products, which take rows sorted by expert, and batched ones,
whose batch are the experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import Placement, shard

aten = torch.ops.aten

_GROUPED = ("transformers::grouped_mm_fallback", "aten::_grouped_mm")
_BATCHED = {aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}  # op -> its arguments that are matrices
# what keeps a stack of matrices one of as many
_FORMS = {
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.clone.default,
    aten._to_copy.default,
}


def experts_over(step: StepGraph, axis: str) -> dict[str, Placement]:
    """Name of each parameter of experts -> that a rank has some of them.

    Args:
        step: as captured; parameters with `meta["pinned"]` for the axis keep to that.
        axis: of its mesh.

    Raises:
        PlanError: if there are no experts, or a number that the ranks of the axis do not divide.
    """
    ranks, found = step.mesh[axis], {}
    parameters = step.inputs("parameter")
    for node in parameters:
        given = node.meta.get("pinned", {}).get(axis)
        if given is not None:
            found[node.meta["entry"].name] = given
        elif _is_of_experts(node):
            _check(node, axis, ranks)
            found[node.meta["entry"].name] = shard(0)
    if any(placement.is_shard for placement in found.values()):
        return found
    raise PlanError.of(
        f"Plan.mesh[{axis!r}]",
        expected="a model with experts: parameters that a grouped or batched product takes, a matrix for each expert",
        got=f"none among {len(parameters)} parameters",
        fix=f"leave the axis out; to split the tokens of such a model, write mesh={{'sp': {ranks}}}",
    )


def _is_of_experts(parameter: fx.Node) -> bool:
    val = parameter.meta["val"]
    if val.dim() < 3 or val.shape[0] < 2:
        return False
    seen = [parameter]
    for node in seen:  # it grows
        for user in node.users:
            if _takes_matrices(user, node) and node.meta["val"].shape[0] == val.shape[0]:
                return True
            if user.target in _FORMS:
                seen.append(user)
    return False


def _takes_matrices(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call takes what a node yields as one matrix for each expert."""
    if user.op != "call_function" or user.meta["phase"] != "forward":
        return False
    target: Any = user.target
    if compat.is_op(target) and target.name() in _GROUPED:
        return user.args[1] is node
    return any(user.args[index] is node for index in _BATCHED.get(target, ()))


def _check(parameter: fx.Node, axis: str, ranks: int) -> None:
    shape = tuple(parameter.meta["val"].shape)
    if shape[0] % ranks == 0:
        return
    sizes = [size for size in range(2, shape[0] + 1) if shape[0] % size == 0]
    raise PlanError.of(
        f"Plan.mesh[{axis!r}], parameter {parameter.meta['entry'].name}",
        expected=f"a number of experts that {axis}={ranks} divides",
        got=f"{shape[0]} of shape {shape}",
        fix=f"set {axis} to {' or '.join(map(str, sizes))} in the mesh",
    )
