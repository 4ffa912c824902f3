"""Sharded parameters among the inputs of a captured graph: the graph takes their rows, as plain tensors.

Dynamo's graph takes DTensors. AOTAutograd would take these apart by itself, at each call, with device meshes among the
tensors; so they are taken apart here, all by one autograd function, and AOTAutograd sees plain rows, padded to the same
number on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor

from fxzero import compat, compat_distributed, compat_dynamo
from fxzero.backend.sharded import WHOLE, Sharded, padded_rows, sharded_by
from fxzero.backend.unshard_ops import unshard
from fxzero.errors import CaptureError, PlanError
from fxzero.graph.ops import shard_rows


@dataclass(frozen=True)
class RowInputs:
    """Which inputs of a graph are sharded parameters.

    Args:
        examples: of all inputs, DTensors replaced by rows.
        rows: position of a DTensor input -> rows that its plain tensor has; WHOLE where it rests whole.
    """

    examples: list[Any]
    rows: dict[int, int]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function on the inputs that Dynamo has: DTensors."""
        if not self.rows:
            return function
        places, counts = list(self.rows), list(self.rows.values())

        def call(*inputs: Any) -> Any:
            taken = list(inputs)
            rows = _TakeRows.apply(counts, *(inputs[place] for place in places))
            for place, value in zip(places, rows, strict=True):
                taken[place] = value
            return function(*taken)

        return torch.compiler.disable(call)


def sharded_in(module: fx.GraphModule) -> Sharded | None:
    """Whose sharded parameters a graph of Dynamo's reads; None where it reads none.

    Raises:
        PlanError: if they are those of several sharded models.
    """
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    calls = [call for graph in graphs for call in graph.find_nodes(op="call_function", target=unshard)]
    names = {str(call.args[2]) for call in calls}
    if len(names) > 1:
        fix = "compile each of the models by itself"
        raise PlanError.of("a captured graph", expected="one sharded model", got=f"{len(names)}", fix=fix)
    return sharded_by(names.pop()) if names else None


def read_rows(module: fx.GraphModule, examples: Sequence[Any]) -> RowInputs:
    """Let a graph of Dynamo's take rows where it took DTensors; the graph is changed.

    Args:
        module: the graph.
        examples: fake tensors and numbers, one an input.

    Raises:
        CaptureError: for a DTensor that `fxzero.shard` has not made, or that is not read whole.
    """
    found, rows = list(examples), {}
    for place, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if isinstance(examples[place], DTensor):
            counts = _read_directly(module, node)
            rows[place] = _rows_of(examples[place], counts.pop() if counts else WHOLE)
            assert not counts, "a parameter rests in one way"
            found[place] = _rows_like(node.meta["example_value"], rows[place])
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            part.recompile()
    return RowInputs(found, rows)


def _read_directly(module: fx.GraphModule, placeholder: fx.Node) -> set[int]:
    """Let readers of the local part of an input read the input; returns how many rows they ask for.

    Args:
        module: whose graph it is; what the model puts under `torch.utils.checkpoint` is a graph of its own in it.
        placeholder: the input.
    """
    counts: set[int] = set()
    for reader in list(placeholder.users):
        inner = _body(module, reader)
        if inner is not None:
            inputs = inner.graph.find_nodes(op="placeholder")
            for given, taken in zip(reader.args[1:], inputs, strict=False):
                counts |= _read_directly(inner, taken) if given is placeholder else set()
            continue
        is_local = reader.op == "call_method" and reader.target == "to_local" and len(reader.args) == 1
        if not is_local or any(user.target is not unshard for user in reader.users):
            _refuse(placeholder, reader)
        counts |= {int(user.args[1]) for user in reader.users}  # type: ignore[arg-type]
        reader.replace_all_uses_with(placeholder)
        placeholder.graph.erase_node(reader)
    return counts


def _body(module: fx.GraphModule, call: fx.Node) -> fx.GraphModule | None:
    """The graph that a call runs on its other arguments, if it is such a call."""
    body = call.args[0] if call.args and compat_dynamo.is_higher_order(call.target) else None
    found = getattr(module, str(body.target), None) if isinstance(body, fx.Node) and body.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def _rows_of(example: DTensor, count: int) -> int:
    """Rows that every rank holds of a tensor with `count` rows."""
    if count == WHOLE:
        return WHOLE
    dim = next(dim for dim, placement in enumerate(example.placements) if placement.is_shard())
    return shard_rows(count, example.device_mesh.size(dim))


def _refuse(placeholder: fx.Node, reader: fx.Node) -> None:
    raise CaptureError.of(
        where=f"torch.compile(backend='fxzero'), input {compat_dynamo.source_of(placeholder) or placeholder.target}",
        expected="plain tensors, and parameters that fxzero.shard has sharded, read as attributes of their module",
        got=f"a DTensor that {reader.target} reads",
        fix="shard the plain model by fxzero.shard, or let torch.compiler.disable keep that function out of the graph",
    )


def _rows_like(example: DTensor, count: int) -> torch.Tensor:
    """The fake twin of what will come in place of a DTensor."""
    with torch.no_grad():
        local = example.to_local()
    shape = local.shape if count == WHOLE else (count, *local.shape[1:])
    with compat.fake_mode_of(local):
        return torch.empty(shape, dtype=local.dtype, device=local.device, requires_grad=example.requires_grad)


class _TakeRows(torch.autograd.Function):
    """DTensors -> their rows, padded; gradients of rows -> gradients of DTensors."""

    @staticmethod
    def forward(ctx: Any, counts: Sequence[int], *parameters: DTensor) -> tuple[torch.Tensor, ...]:
        """Take the rows.

        Args:
            ctx: of autograd.
            counts: rows that each has with padding; WHOLE where it rests whole.
            parameters: as modules own them.
        """
        ctx.set_materialize_grads(False)
        ctx.counts, ctx.parameters = counts, parameters
        locals_ = [parameter.to_local() for parameter in parameters]
        rows = [t.view_as(t) if n == WHOLE else padded_rows(t, n) for n, t in zip(counts, locals_, strict=True)]
        ctx.own = [0 if count == WHOLE else local.shape[0] for count, local in zip(counts, locals_, strict=True)]
        ctx.mark_non_differentiable(*(r for r, p in zip(rows, parameters, strict=True) if not p.requires_grad))
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        """Gradients of the parameters, sharded as they are; None where there is none."""
        found: list[Any] = [None]
        for gradient, parameter, count, own in zip(gradients, ctx.parameters, ctx.counts, ctx.own, strict=True):
            if gradient is not None and count != own and count != WHOLE:
                gradient = gradient[:own]
            found.append(None if gradient is None else compat_distributed.dtensor_like(gradient, parameter))
        return tuple(found)
