"""Matrix products that stand beside a collective: they wait for a gather, or a reduce-scatter waits for them.

[Note: rows on their way]
A gather brings the ranks' rows together as [ranks, lead, span]: rank after rank, of each what it has sent. What a
product reads are rows [lead, ranks, span], where a dim behind the first was split (several rows of a batch, tokens in
parts), with a copy between. A reduce-scatter takes [ranks, lead, span], and the product has made [lead, ranks, span].
How the calls between say it (views, permutations, copies) is left to them: row numbers are sent through them, and what
comes out is compared with such an order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.call_signature import has_symbols
from fxzero.graph.step_graph import StepGraph, first_argument, tensor_val, yields_tensor

aten = torch.ops.aten

_FACTOR: dict[Any, int] = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
}  # product -> position of the factor whose rows are the result's
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Rows:
    """Rows of all ranks: [ranks, lead, span] as they travel, [lead, ranks, span] as products have them.

    Args:
        ranks: of the axis.
        lead, span: that one rank has; lead 1: both orders are one.
    """

    ranks: int
    lead: int
    span: int

    @property
    def of_a_rank(self) -> int:
        """Rows of one rank."""
        return self.lead * self.span

    @property
    def total(self) -> int:
        """Rows of all."""
        return self.ranks * self.lead * self.span

    def cut(self, count: int) -> tuple[Rows, int] | None:
        """The rows of one of so many equal pieces, and of [lead, span] the dim that is cut; None: they do not divide.

        Whole spans stay together where they can, so that a piece is rows that follow each other on each rank.
        """
        if self.lead > 1 and self.lead % count == 0:
            return Rows(self.ranks, self.lead // count, self.span), 0
        return None if self.span % count else (Rows(self.ranks, self.lead, self.span // count), 1)


@dataclass(frozen=True)
class GatheredProducts:
    """A gather and the products that read what it brings.

    Args:
        launch, wait: of the gather.
        rows: how they lie.
        products: calls whose rows are those that were gathered, in program order.
        between: what stands between the wait and all its readers, in program order, the wait first.
        others: of these, what other calls read, with these calls in program order.
    """

    launch: fx.Node
    wait: fx.Node
    rows: Rows
    products: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]
    others: dict[fx.Node, list[fx.Node]]


@dataclass(frozen=True)
class ScatteredProducts:
    """A reduce-scatter and the products of whose results, or of their sum, it makes rows of each rank.

    Args:
        launch, wait: of the reduce-scatter.
        rows: how they lie.
        products: in program order.
        root: what their sum is.
    """

    launch: fx.Node
    wait: fx.Node
    rows: Rows
    products: tuple[fx.Node, ...]
    root: fx.Node


def factor_of(product: fx.Node) -> fx.Node:
    """The factor of a product that has its rows."""
    found = product.args[_FACTOR[product.target]]
    assert isinstance(found, fx.Node)
    return found


def with_factor(product: fx.Node, factor: fx.Node) -> tuple[Any, ...]:
    """The arguments of a product of other rows."""
    at = _FACTOR[product.target]
    return (*product.args[:at], factor, *product.args[at + 1 :])


def gathered_products(step: StepGraph) -> Iterator[GatheredProducts]:
    """The gathers of values in parts whose rows products read, in program order; what is yielded may be rewritten."""
    for launch in filter(_can_be_cut, step.calls(c10d.all_gather)):
        found = _behind(launch, step)
        if found is not None:
            yield found


def scattered_products(step: StepGraph) -> Iterator[ScatteredProducts]:
    """The reduce-scatters of sums over ranks that products alone have made, in the same manner."""
    for launch in filter(_can_be_cut, step.calls(c10d.reduce_scatter)):
        found = _before(launch, step)
        if found is not None:
            yield found


def _can_be_cut(launch: fx.Node) -> bool:
    """Whether a collective of one value in parts, of known sizes and no piece of one, is waited for in this program."""
    if not c10d.moves_parts(launch) or c10d.carrier_of(launch) is not None or "piece" in launch.meta:
        return False
    (source,), waits = c10d.sent(launch), list(launch.users)
    known = not has_symbols(launch.meta["val"]) and tensor_val(source).is_contiguous()
    return known and tensor_val(source).dim() > 1 and len(waits) == 1 and c10d.is_wait(waits[0])


def _behind(launch: fx.Node, step: StepGraph) -> GatheredProducts | None:
    wait = next(iter(launch.users))
    orders = dict(_orders(wait))
    readers: dict[fx.Node, list[fx.Node]] = {}
    products = []
    for node in orders:
        for user in node.users:
            if user in orders:
                continue
            if _reads_rows(user, node):
                products.append(user)
            else:
                readers.setdefault(node, []).append(user)
    used = [*map(factor_of, products), *readers]
    if any(user.op == "output" for users in readers.values() for user in users):
        return None
    if not products or not all(tensor_val(node).is_contiguous() for node in used):
        return None
    ranks = int(launch.args[1])  # type: ignore[arg-type]
    forms = {_rows(orders[node], ranks, gathered=True) for node in used}
    rows = forms.pop()
    if forms or rows is None:
        return None
    position = step.positions()
    products.sort(key=position.__getitem__)
    between = tuple(sorted(orders, key=position.__getitem__))
    others = {node: sorted(users, key=position.__getitem__) for node, users in readers.items()}
    return GatheredProducts(launch, wait, rows, tuple(products), between, others)


def _reads_rows(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call is a product of a value's rows with something else, and no gradient of a parameter."""
    if not _is_product(user) or "grad_of" in user.meta:
        return False
    return [index for index, arg in enumerate(user.args) if arg is node] == [_FACTOR[user.target]]


def _is_product(node: fx.Node) -> bool:
    """Whether a call is a product of two matrices, with the same summand for every row, if any."""
    if node.target is aten.addmm.default:
        return tensor_val(first_argument(node)).dim() == 1
    return node.target in _FACTOR


def _orders(wait: fx.Node) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """What a gathered value goes through with whole rows -> the numbers of its rows as they came."""
    shape = tensor_val(wait).shape
    stack = [(wait, torch.arange(shape[:-1].numel()).view(shape[:-1]))]
    while stack:
        node, order = stack.pop()
        yield node, order
        for user in node.users:
            after = _moved(user, order)
            if after is not None:
                stack.append((user, after))


def _moved(node: fx.Node, order: torch.Tensor) -> torch.Tensor | None:
    """Row numbers behind a call that moves whole rows; None for any other call, and for what is saved or returned."""
    if node.op != "call_function" or not yields_tensor(node) or has_symbols(node.meta["val"]):
        return None
    source, shape = node.all_input_nodes[0] if node.all_input_nodes else None, tensor_val(node).shape
    if source is None or not yields_tensor(source) or not shape or tensor_val(source).shape[-1:] != shape[-1:]:
        return None
    if node.target in _VIEWS:
        return order.reshape(shape[:-1])
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        last = len(dims) - 1
        return order.permute(dims[:-1]) if dims[-1] in (last, -1) and min(dims) >= 0 else None
    return order if node.target is aten.clone.default else None


def _rows(order: torch.Tensor, ranks: int, *, gathered: bool) -> Rows | None:
    """How rows lie that stand in this order; None where they lie in no way that has a name here."""
    flat = order.reshape(-1)
    breaks = (flat[1:] - flat[:-1] != 1).nonzero()
    of_a_rank = len(flat) // ranks
    span = int(breaks[0]) + 1 if len(breaks) else of_a_rank
    if of_a_rank % span:
        return None
    lead = of_a_rank // span
    outer = (ranks, lead) if gathered else (lead, ranks)
    expected = torch.arange(len(flat)).view(*outer, span).transpose(0, 1).reshape(-1)
    return Rows(ranks, lead, span) if torch.equal(flat, expected) else None


def _before(launch: fx.Node, step: StepGraph) -> ScatteredProducts | None:
    if launch.args[1] != "sum":
        return None
    way, root = [], first_argument(launch)
    while root.target in (*_VIEWS, aten.permute.default, aten.clone.default) and len(root.users) == 1:
        way.append(root)
        root = first_argument(root)
    summands = _summands(root)
    if not summands or not all(tensor_val(factor_of(product)).is_contiguous() for product in summands):
        return None
    shape = tensor_val(root).shape
    order: torch.Tensor | None = torch.arange(shape[:-1].numel()).view(shape[:-1])
    for node in reversed(way):
        order = None if order is None else _moved(node, order)
    rows = None if order is None else _rows(order, int(launch.args[2]), gathered=False)  # type: ignore[arg-type]
    if rows is None:
        return None
    position = step.positions() if len(summands) > 1 else {}
    products = tuple(sorted(summands, key=lambda node: position.get(node, 0)))
    return ScatteredProducts(launch, next(iter(launch.users)), rows, products, root)


def _summands(node: fx.Node) -> list[fx.Node]:
    """The products whose sum a value is, rows in their order; none where anything else takes part, or reads of it."""
    if len(node.users) != 1 or "grad_of" in node.meta or not yields_tensor(node):
        return []
    if _is_product(node):
        return [node]
    if node.target in _VIEWS:
        source = first_argument(node)
        return _summands(source) if tensor_val(source).shape[-1:] == tensor_val(node).shape[-1:] else []
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return []
    sides = node.all_input_nodes
    if any(not yields_tensor(side) or tensor_val(side).shape != tensor_val(node).shape for side in sides):
        return []
    both = [_summands(side) for side in sides]
    return [*both[0], *both[1]] if all(both) else []
