"""Which calls around a cross entropy work on its logits row by row, found by structure: forward, loss and backward.

[Note: rows of a loss]
Logits are a matrix product of hidden rows [N, D] with a weight. What follows works on each of their N rows by itself
(views, casts, pointwise ops, log_softmax, the loss, and the same backwards), until it gives rows again (the gradient of
the hidden, [N, D]) or a sum over all rows (the loss, the gradients of weight and bias). Such calls can be made for some
rows after the other, and what comes out is joined or added up. Where anything else reads the logits, they are needed
whole. A slice of the logits before the loss (older losses leave out each sequence's last row) only leaves out rows, so
the hidden can be sliced instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import StepGraph, ancestors, is_getitem, is_view, yields_tensor

aten = torch.ops.aten

MEAN, SUM = 1, 2  # of torch's reductions, those that give one number

# what a call of the rows is
PRODUCT, SAME, POINTWISE, SOFTMAX, LOSS = "product", "same", "pointwise", "softmax", "loss"
LOSS_BACKWARD, SOFTMAX_BACKWARD, TURNED = "loss backward", "softmax backward", "turned"
ROWS, ADDED = "rows", "added"
_ON_ROWS = (SAME, POINTWISE, SOFTMAX, LOSS_BACKWARD, SOFTMAX_BACKWARD, TURNED)

_REGROUPING = (aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim)
_PLAIN = (aten.alias.default, aten.detach.default, aten.clone.default)
_PRODUCTS = (aten.mm.default, aten.addmm.default)


class NotByRows(Exception):
    """Why the logits of a loss are needed whole, as a person is told it."""


@dataclass
class LossRows:
    """A cross entropy and all that works on the rows of its logits.

    Args:
        loss: the call of nll_loss_forward.
        backward: that of nll_loss_backward.
        product: that of the matrix product that makes the logits.
        roles: each call that works on rows -> what it is, in program order.
        slices: those that leave out rows before the loss, in order.
    """

    loss: fx.Node
    backward: fx.Node
    product: fx.Node
    roles: dict[fx.Node, str] = field(default_factory=dict)
    slices: list[fx.Node] = field(default_factory=list)

    @property
    def hidden(self) -> fx.Node:
        """The rows that the product takes: [N, D]."""
        return self.product.args[-2]  # type: ignore[return-value]

    @property
    def log_probabilities(self) -> fx.Node:
        """What the loss reads: [rows, V]."""
        return self.loss.args[0]  # type: ignore[return-value]

    @property
    def labels(self) -> fx.Node:
        """What the loss compares with: [rows]."""
        return self.loss.args[1]  # type: ignore[return-value]

    @property
    def module(self) -> str:
        """The path of the module that makes the logits."""
        return str(self.product.meta["module"])


def losses(step: StepGraph) -> list[fx.Node]:
    """The cross entropies (and other losses of log-probabilities) of a step."""
    return step.calls(aten.nll_loss_forward.default)


def loss_rows(step: StepGraph, loss: fx.Node) -> LossRows:
    """The calls that work on the rows of a loss's logits.

    Args:
        step: the graph, as captured.
        loss: one of `losses`.

    Raises:
        NotByRows: if something needs the logits whole, saying what.
    """
    return _Finder(step, loss).find()


def rebuilt(node: fx.Node) -> bool:
    """Whether a call only names or casts one other value, so that it can be made where it is read."""
    return node.op == "call_function" and len(node.all_input_nodes) == 1 and (is_view(node) or _is_cast(node))


class _Finder:
    """Goes from a loss up to the product, and from there down to all that follows."""

    def __init__(self, step: StepGraph, loss: fx.Node) -> None:
        self._step, self._loss = step, loss
        self._position = step.positions()
        self._returned = set(step.results.values())
        self._level: dict[fx.Node, int] = {}  # of a call that works on rows: slices before it

    def find(self) -> LossRows:
        backward = self._differentiated()
        product = self._product()
        self._found = found = LossRows(self._loss, backward, product, {product: PRODUCT})
        self._columns = product.meta["val"].shape[1]
        self._level[product] = 0
        self._check_readers(product)
        for node in self._step.calls():
            if node in found.roles or not any(source in self._level for source in node.all_input_nodes):
                continue
            role = self._role(node)
            if role is None:
                raise NotByRows(f"%{node.name} = {node.target} works on its logits, too")
            found.roles[node] = role
            if role in _ON_ROWS:
                self._check_readers(node)
        self._check_inputs()
        return found

    def _differentiated(self) -> fx.Node:
        """The one call of nll_loss_backward; what kind of loss this is has been checked."""
        _, labels, weight, reduction, _ = self._loss.args
        if weight is not None:
            raise NotByRows("its classes have weights")
        if reduction not in (MEAN, SUM):
            raise NotByRows("it is one number a row, neither their mean nor their sum")
        if labels.meta["val"].dim() != 1:  # type: ignore[union-attr]
            raise NotByRows("its labels are not one a row")
        found = [user for user in self._loss.args[0].users if user.target is aten.nll_loss_backward.default]  # type: ignore[union-attr]
        if len(found) != 1:
            raise NotByRows(f"{len(found)} calls differentiate it, not one")
        return found[0]

    def _product(self) -> fx.Node:
        """The product that makes the logits."""
        node: Any = self._loss.args[0]
        while isinstance(node, fx.Node) and node.target not in _PRODUCTS:
            wide = [n for n in node.all_input_nodes if yields_tensor(n) and n.meta["val"].dim() > 1]
            if node.op != "call_function" or len(wide) != 1:
                break
            node = wide[0]
        if not isinstance(node, fx.Node) or node.target not in _PRODUCTS or len(node.args[-2:]) != 2:
            raise NotByRows(f"no matrix product makes its logits, but %{node}")
        if node.target is aten.addmm.default and (node.args[0].meta["val"].dim() != 1 or node.kwargs):  # type: ignore[union-attr]
            raise NotByRows(f"%{node.name} adds more than a bias")
        return node

    def _check_readers(self, node: fx.Node) -> None:
        if node in self._returned:
            raise NotByRows(f"%{node.name}, which follows from its logits, is returned")

    def _check_inputs(self) -> None:
        """What is read beside the rows is there where the loss is differentiated, and does not follow from it."""
        found, anchor = self._found, self._position[self._found.backward]
        if self._level[found.log_probabilities] != len(found.slices):
            raise NotByRows(f"%{found.slices[-1].name} slices its logits, too")
        outside = beside(found)
        for source in outside:
            first = source
            while self._position[first] >= anchor and rebuilt(first):
                first = first.all_input_nodes[0]
            if self._position[first] >= anchor:
                raise NotByRows(f"%{source.name} is made after it is differentiated")
        if ancestors(outside, but_of=says_shape) & found.roles.keys():
            raise NotByRows("its gradient depends on its value")

    # ---- what a call is

    def _role(self, node: fx.Node) -> str | None:
        """What a call that reads rows is; None where it needs more than each row by itself."""
        role = _RULES.get(node.target, _Finder._pointwise)(self, node)
        if role in _ON_ROWS:
            self._level.setdefault(node, max(self._level.get(source, -1) for source in node.all_input_nodes))
        return role

    def _is_wide(self, node: Any) -> bool:
        """Whether a value holds rows of all columns, untransposed."""
        return node in self._level and self._found.roles[node] != TURNED

    def _regrouped(self, node: fx.Node) -> str | None:
        source, val = node.args[0], node.meta["val"]
        same = self._is_wide(source) and val.shape[-1] == self._columns
        return SAME if same and val.numel() == source.meta["val"].numel() else None  # type: ignore[union-attr]

    def _plain(self, node: fx.Node) -> str | None:
        return SAME if self._is_wide(node.args[0]) else None

    def _sliced(self, node: fx.Node) -> str | None:
        source: Any = node.args[0]
        last = source.meta["val"].dim() - 1
        if not self._is_wide(source) or how_sliced(node)[0] in (last, -1):
            return None
        if self._level[source] != len(self._found.slices):  # another slice of the same rows
            return None
        self._found.slices.append(node)
        self._level[node] = self._level[source] + 1
        return SAME

    def _sliced_backward(self, node: fx.Node) -> str | None:
        source, sizes, *how = node.args
        level = self._level.get(source, 0)  # type: ignore[arg-type]
        if not self._is_wide(source) or not level:
            return None
        forward = self._found.slices[level - 1]
        shape, (dim, *span) = forward.args[0].meta["val"].shape, how_sliced(forward)  # type: ignore[union-attr]
        if tuple(sizes) != tuple(shape) or how[0] != dim or _span(how[1:], shape[dim]) != _span(span, shape[dim]):  # type: ignore[arg-type, call-overload]
            return None
        self._level[node] = level - 1
        return SAME

    def _pointwise(self, node: fx.Node) -> str | None:
        target: Any = node.target
        if not compat.is_op(target) or is_random(node) or not yields_tensor(node):
            return None
        if torch.Tag.pointwise not in target.tags and not _is_cast(node):
            return None
        val, level = node.meta["val"], max(self._level.get(source, -1) for source in node.all_input_nodes)
        for source in node.all_input_nodes:
            if source in self._level:
                fits = self._is_wide(source) and self._level[source] == level and source.meta["val"].shape == val.shape
            else:
                fits = not yields_tensor(source) or source.meta["val"].dim() == 0
                fits = fits or tuple(source.meta["val"].shape) == (self._columns,)
            if not fits:
                return None
        return POINTWISE

    def _softmax(self, node: fx.Node) -> str | None:
        source, dim, _ = node.args
        right = self._is_wide(source) and source.meta["val"].dim() == 2 and dim in (1, -1)  # type: ignore[union-attr]
        return SOFTMAX if right and node is self._loss.args[0] else None

    def _loss_forward(self, node: fx.Node) -> str | None:
        return LOSS if node is self._loss and self._is_wide(node.args[0]) else None

    def _loss_backward(self, node: fx.Node) -> str | None:
        total = node.args[-1]
        of_this = isinstance(total, fx.Node) and is_getitem(total) and total.args == (self._loss, 1)
        right = node is self._found.backward and node.args[1] is self._loss.args[0]
        return LOSS_BACKWARD if right and of_this and node.args[2:6] == self._loss.args[1:] else None

    def _softmax_backward(self, node: fx.Node) -> str | None:
        gradient, output, *_ = node.args
        right = self._is_wide(gradient) and output is self._loss.args[0]
        return SOFTMAX_BACKWARD if right and gradient.meta["val"].dim() == 2 else None  # type: ignore[union-attr]

    def _turned(self, node: fx.Node) -> str | None:
        return TURNED if self._is_wide(node.args[0]) and _turns(node) else None

    def _multiplied(self, node: fx.Node) -> str | None:
        a, b = node.args
        if max(self._level.get(source, 0) for source in (a, b)):  # type: ignore[arg-type]
            return None
        if a in self._level and not self._is_wide(a):
            return ADDED if self._is_hidden(b) else None
        if b in self._level:
            return ADDED if self._is_wide(b) and self._is_hidden(a, turned=True) else None
        return ROWS if b not in self._found.roles else None

    def _summed(self, node: fx.Node) -> str | None:
        source: Any = node.args[0]
        if not self._is_wide(source) or self._level[source] or node.kwargs:
            return None
        dims: Any = node.args[1]
        return ADDED if list(dims) == list(range(source.meta["val"].dim() - 1)) else None

    def _is_hidden(self, node: Any, *, turned: bool = False) -> bool:
        """Whether a value is what the product takes, or its transpose."""
        if turned:
            return _turns(node) and self._is_hidden(node.args[0])
        hidden = self._found.hidden
        return node.meta["val"].shape == hidden.meta["val"].shape and _base(node) is _base(hidden)


def beside(found: LossRows) -> list[fx.Node]:
    """What the calls on rows read and none of them makes; the loss's own number of labels is left out."""
    read = dict.fromkeys(source for node in found.roles for source in node.all_input_nodes)
    own = set(found.loss.users)
    return [source for source in read if source not in found.roles and source not in own]


def how_sliced(node: fx.Node) -> list[Any]:
    """Dimension, start, end and step of a slice."""
    return [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]


def says_shape(node: fx.Node) -> bool:
    """Whether a call needs only the shape of what it reads."""
    return node.target in (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default


def _turns(node: fx.Node) -> bool:
    """Whether a call is the transpose of a matrix."""
    if node.op != "call_function" or not yields_tensor(node) or node.meta["val"].dim() != 2:
        return False
    if node.target is aten.transpose.int:
        return {dim % 2 for dim in node.args[1:]} == {0, 1}  # type: ignore[operator]
    if node.target is aten.permute.default:
        return [dim % 2 for dim in node.args[1]] == [1, 0]  # type: ignore[operator, union-attr]
    return node.target is aten.t.default


def _base(node: fx.Node) -> fx.Node:
    """What a regrouping of dimensions, or several, regroups."""
    while node.target in _REGROUPING or node.target in (aten.alias.default, aten.detach.default):
        node = node.all_input_nodes[0]
    return node


def _span(how: Sequence[Any], size: int) -> tuple[int, int, int]:
    """First, last and step of a slice of a dimension."""
    return slice(*how).indices(size)


_RULES: dict[Any, Callable[[_Finder, fx.Node], str | None]] = {
    **dict.fromkeys(_REGROUPING, _Finder._regrouped),
    **dict.fromkeys(_PLAIN, _Finder._plain),
    **dict.fromkeys((aten.t.default, aten.transpose.int, aten.permute.default), _Finder._turned),
    aten.slice.Tensor: _Finder._sliced,
    aten.slice_backward.default: _Finder._sliced_backward,
    aten._log_softmax.default: _Finder._softmax,
    aten.nll_loss_forward.default: _Finder._loss_forward,
    aten.nll_loss_backward.default: _Finder._loss_backward,
    aten._log_softmax_backward_data.default: _Finder._softmax_backward,
    aten.mm.default: _Finder._multiplied,
    aten.sum.dim_IntList: _Finder._summed,
}
