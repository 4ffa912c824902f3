"""Rotary position embeddings of queries and keys by one op in forward and one in backward.

x cos + R(x) sin is a row of slices, a negation and a concatenation; its backward takes them apart again. Forward and
backward are found each by itself, since backward reads of forward the tables cos and sin only: for each pair of tables
that a forward has, what they multiply in backward is a gradient dy, and what yields dy cos - R(dy sin) is replaced.
What the calls compute is seen by running them ([Note: proof by values] in `graph/small_values.py`), so that halves and
neighbours, chunks and slices are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxzero.graph import StepGraph, kernel_ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, erase_dead
from fxzero.graph.gradient_calls import Calls, Prover, Reference
from fxzero.graph.kernel_calls import KernelCalls, put_backward, put_forward
from fxzero.graph.small_values import can_run
from fxzero.graph.step_graph import device_of, is_getitem, is_view, tensor_val, yields_tensor
from fxzero.kernels.launch import FLOATS
from fxzero.kernels.rotary import rotary_backward_reference, rotary_reference

aten = torch.ops.aten

ALL = ("rotary",)
_MOST_CALLS = 16  # of a rotation
_JOINS = {aten.cat.default, aten.stack.default}


@dataclass(frozen=True)
class _Rotary:
    """A rotary embedding in forward.

    Args:
        calls: of x, cos and sin, as four-dimensional tables.
        interleaved: whether pairs are neighbours.
    """

    calls: Calls
    interleaved: bool


@graph_pass(
    requires=("captured",),
    provides=("rotaries-fused",),
    numerics="1e-6 relative a step in fp32; in bf16 and fp16 a sum of two products is rounded once, where models round "
    "each product",
)
def fuse_rotary(step: StepGraph, *, names: tuple[str, ...] = ALL, device: str | None = None) -> int:
    """Make each rotary embedding by one call in forward and one in backward.

    Args:
        step: the graph, as captured.
        names: of ALL.
        device: a type of device; on any other the graph stays as it is. None: on all.

    Returns:
        The number of rotary embeddings that are fused, forward and backward counted apart.
    """
    if not names or (device is not None and device_of(step) != device):
        return 0
    return _Fuser(step).fuse()


class _Fuser:
    """Puts rotary ops into one graph."""

    def __init__(self, step: StepGraph) -> None:
        self._step = step
        self._prover = Prover(dict(step.positions()))
        self._tables: dict[fx.Node, fx.Node] = {}  # four-dimensional -> as the op takes it
        self._forward = KernelCalls("rotary", "embeddings")
        self._backward = KernelCalls("rotary backward", "gradients")

    def fuse(self) -> int:
        """Replace all; returns how many."""
        pairs: dict[tuple[fx.Node, fx.Node, bool], None] = {}
        for total in self._step.calls(aten.add.Tensor):
            found = self._rotary(total) if total.meta["phase"] != "update" else None
            if found is None:
                continue
            self._forward.found += 1
            self._forward.fused += 1
            _, cos, sin = found.calls.inputs
            pairs[(cos, sin, found.interleaved)] = None
            self._replace(found)
        for cos, sin, interleaved in pairs:
            for dy in self._gradients_at(sin):
                self._fuse_backward(dy, cos, sin, interleaved=interleaved)
        erase_dead(self._step)
        told = [self._forward.told(), *([self._backward.told()] if self._backward.found else [])]
        self._step.remarks["fuse_rotary"] = "; ".join(told)
        return self._forward.fused + self._backward.fused

    # ---- forward

    def _rotary(self, total: fx.Node) -> _Rotary | None:
        """The rotary embedding that ends with a sum of two products."""
        products = [arg for arg in total.args if isinstance(arg, fx.Node) and arg.target is aten.mul.Tensor]
        if len(products) != 2 or total.kwargs or not _is_embedded(total):
            return None
        for straight, turned in (products, reversed(products)):
            for cos, x in _factors(straight):
                for sin, rotated in _factors(turned):
                    found = self._of(total, x, cos, sin, (straight, turned), rotated)
                    if found is not None:
                        return found
        joins = [source for product in products for source in product.all_input_nodes if source.target in _JOINS]
        if joins:
            self._forward.near(total, f"%{joins[0]} is no rotation by pairs of what the other product reads")
        return None

    def _of(
        self,
        total: fx.Node,
        x: fx.Node,
        cos: fx.Node,
        sin: fx.Node,
        products: tuple[fx.Node, fx.Node],
        rotated: fx.Node,
    ) -> _Rotary | None:
        val, made = tensor_val(x), tensor_val(total)
        if val.shape != made.shape or val.dtype != made.dtype or not all(_is_table(t, x) for t in (cos, sin)):
            return None
        rotation = self._made_of(rotated, x)
        if rotation is None:
            return None
        inner = sorted({*rotation, *products}, key=self._prover.position.__getitem__)
        calls = Calls((x, cos, sin), tuple(inner), total)
        for interleaved in (False, True):
            if self._prover.computes(calls, _forward_of(interleaved), ("rotary", interleaved)):
                return _Rotary(calls, interleaved) if self._only_inside(calls) else None
        return None

    def _made_of(self, rotated: fx.Node, x: fx.Node) -> set[fx.Node] | None:
        """The calls that make a rotation of x, and of x only."""
        found: set[fx.Node] = set()
        stack = [rotated]
        while stack:
            node = stack.pop()
            if node is x or node in found:
                continue
            if not can_run(node) or len(found) == _MOST_CALLS:
                return None
            found.add(node)
            stack += node.all_input_nodes
        return found if found and any(node.target in _JOINS for node in found) else None

    def _only_inside(self, calls: Calls) -> bool:
        """Whether nothing else reads what is computed in between; views of x may be read."""
        known = calls.known
        made = [node for node in calls.inner if not is_getitem(node) and not is_view(node)]
        return all(user in known for node in made for user in node.users)

    def _replace(self, found: _Rotary) -> None:
        x, cos, sin = found.calls.inputs
        old = found.calls.output
        args = (x, self._table(cos, old), self._table(sin, old), found.interleaved)
        put_forward(self._step, self._prover.position, old, kernel_ops.OPS["rotary"][0], args)

    def _table(self, table: fx.Node, reader: fx.Node) -> fx.Node:
        """A table as the op takes it, made before its first reader."""
        if table not in self._tables:
            editor = Editor(self._step, phase=table.meta["phase"], module=reader.meta["module"])
            with editor.after(table):
                made = editor.call(aten.squeeze.dim, table, 1)
                self._prover.position[made] = self._prover.position[table]
                if tensor_val(made).shape[0] == 1:
                    made = editor.call(aten.squeeze.dim, made, 0)
                    self._prover.position[made] = self._prover.position[table]
            self._tables[table] = made
        return self._tables[table]

    # ---- backward

    def _gradients_at(self, sin: fx.Node) -> list[fx.Node]:
        """What a table multiplies in backward."""
        products = [user for user in sin.users if user.target is aten.mul.Tensor and user.meta["phase"] == "backward"]
        return [other for product in products for table, other in _factors(product) if table is sin]

    def _fuse_backward(self, dy: fx.Node, cos: fx.Node, sin: fx.Node, *, interleaved: bool) -> None:
        """Replace the gradient that follows from dy, if there is one."""
        if not _is_embedded(dy) or not all(_is_table(table, dy) for table in (cos, sin)):
            return
        tables = Calls((dy, cos), (), sin)  # no calls, but what further calls follow from
        lines = self._prover.follows(tables)
        found = self._prover.by_value(
            *(lines, (dy, cos, sin), _backward_of(interleaved), ("rotary", interleaved)), like=(dy,)
        )
        if not found[0]:
            return
        self._backward.found += 1
        args = (dy, self._table(cos, dy), self._table(sin, dy), interleaved)
        put_backward(self._step, self._prover.position, found, kernel_ops.OPS["rotary"][1], args, results=1)
        self._backward.fused += 1


def _forward_of(interleaved: bool) -> Reference:
    def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rotary_reference(x, cos.squeeze(1), sin.squeeze(1), interleaved),)

    return forward


def _backward_of(interleaved: bool) -> Reference:
    def backward(dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rotary_backward_reference(dy, cos.squeeze(1), sin.squeeze(1), interleaved),)

    return backward


def _factors(product: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(table, other) for each factor that may be the table."""
    first, second = product.args
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        yield from ((second, first), (first, second))


def _is_embedded(node: fx.Node) -> bool:
    """Whether a value may be queries or keys: [batch, heads, positions, an even number] of floats."""
    if not yields_tensor(node):
        return False
    val = tensor_val(node)
    return val.dim() == 4 and val.shape[3] % 2 == 0 and val.dtype in FLOATS


def _is_table(node: fx.Node, x: fx.Node) -> bool:
    """Whether a value may be cos or sin of x: the same for all heads."""
    if not yields_tensor(node):
        return False
    val, shape = tensor_val(node), tuple(tensor_val(x).shape)
    shapes = tuple((batch, 1, *shape[2:]) for batch in (1, shape[0]))
    return tuple(val.shape) in shapes and val.dtype in FLOATS and node is not x
