"""Asynchronous tensor parallelism: products are cut into pieces of rows that overlap with the collective beside them.

Where values lie in parts, a product waits for a gather of its rows, or a reduce-scatter waits for a product; nothing
else is there to be computed meanwhile. In pieces, the first product begins when the first piece of every rank's rows
has come, and what the first piece's product has made is on its way while the next one is computed.
Source: Wang et al., Overlap communication with dependent computation via decomposition in large deep learning models
(2023); asynchronous tensor parallelism of PyTorch (2024); Flux (Chang et al., 2024).

[Note: pieces of rows]
Piece i is the i-th of equal parts of each rank's rows, so that each is a gather, or a reduce-scatter, of its own.
Results of pieces are brought into order by one copy, a concatenation that writes strided rows; what a product reads for
a reduce-scatter is selected by one copy of its rows. Both are of the side of a weight that is in parts: the narrow one.
A gradient of a weight is a sum over all rows: in pieces it would be rounded once a piece, so it stays whole, and what
it reads of a gather is joined from the pieces where it is first read. What backward keeps is the pieces, which take the
memory of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxzero.cost.hardware import hardware_of
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.blocks import with_stars
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, erase_dead, replace_uses
from fxzero.graph.products_beside import (
    GatheredProducts,
    Rows,
    ScatteredProducts,
    factor_of,
    gathered_products,
    scattered_products,
    with_factor,
)
from fxzero.graph.step_graph import first_argument, is_view, tensor_val
from fxzero.schedule.piece_counts import Estimate, fewest_seconds

aten = torch.ops.aten

Pair = GatheredProducts | ScatteredProducts
Kind = tuple[str, str, str, Rows, tuple[str, ...]]
COUNTS = (2, 4, 8)  # pieces that "auto" tries
ALL_CALLS = 400_000  # of all steps that it looks at


@graph_pass(
    requires=("captured",),
    provides=("products-chunked",),
    numerics="a product of fewer rows, and a sum of fewer over ranks, may add up in another order: within 1e-5",
)
def chunk_products(
    step: StepGraph,
    *,
    chunks: int | str,
    by_cost: bool = False,
    hardware: str = "auto",
    backend: str = "",
    memory_bytes: int | None = None,
) -> int:
    """Cut products beside gathers and reduce-scatters of values in parts into pieces that overlap with these.

    Args:
        step: the graph, split over its axes.
        chunks: pieces of each, and a product whose rows they do not divide stays whole; or "auto".
        by_cost: the order of the step will be found by cost; else it is the one of the passes.
        hardware: for "auto": name or path of a machine's description; "auto": by the graph's device.
        backend: what carries collectives, for that.
        memory_bytes: that the order may take; None: as much as that of the passes.

    Raises:
        PlanError: if there are such products, and so many pieces divide the rows of none.
    """
    pairs = pairs_of(step)
    if chunks == "auto":
        machine = hardware_of(step, backend=backend, named=hardware)
        counts, told = _decided(step, pairs, Estimate(machine, by_cost=by_cost, memory_bytes=memory_bytes))
    else:
        counts, told = {pair.launch.name: int(chunks) for pair in pairs if pair.rows.cut(int(chunks))}, ""
        if pairs and not counts:
            _refuse(pairs, int(chunks))
    step.remarks["chunk_products"] = _told(pairs, counts) + told
    return rewrite(step, counts)


def pairs_of(step: StepGraph) -> list[Pair]:
    """The collectives of values in parts that products stand beside."""
    return [*gathered_products(step), *scattered_products(step)]


def rewrite(step: StepGraph, counts: Mapping[str, int]) -> int:
    """Cut products into pieces.

    Args:
        step: the graph; it is changed.
        counts: name of the launch of the collective beside them -> number of pieces, which divides its rows.

    Returns:
        How many collectives were cut.
    """
    edits = 0
    for gathered in gathered_products(step):
        if counts.get(gathered.launch.name, 1) > 1:
            _cut_gather(step, gathered, counts[gathered.launch.name])
            edits += 1
    for scattered in scattered_products(step):
        if counts.get(scattered.launch.name, 1) > 1:
            _cut_scatter(step, scattered, counts[scattered.launch.name])
            edits += 1
    return edits


def _decided(step: StepGraph, pairs: list[Pair], estimate: Estimate) -> tuple[dict[str, int], str]:
    """Launch -> number of pieces with which the step is predicted to take least time, and what to say of it."""
    kinds: dict[Kind, list[Pair]] = {}
    for pair in pairs:
        kinds.setdefault(_kind(pair), []).append(pair)

    def named(chosen: Mapping[Kind, int]) -> dict[str, int]:
        return {pair.launch.name: chosen[kind] for kind, alike in kinds.items() if kind in chosen for pair in alike}

    def seconds(chosen: Mapping[Kind, int]) -> float:
        trial = step.copy()
        rewrite(trial, named(chosen))
        return estimate.seconds(trial)

    options = {kind: [n for n in COUNTS if alike[0].rows.cut(n)] for kind, alike in kinds.items()}
    found = fewest_seconds(options, seconds, most=max(len(COUNTS), ALL_CALLS // len(step.calls())))
    times = f"; {found.seconds * 1e3:.3f} ms a step by the model of costs, {found.whole_s * 1e3:.3f} ms with none"
    lines = [f"  {len(kinds[kind])} x {kind[2]}, {kind[1]}: {count}" for kind, count in found.chosen.items()]
    return named(found.chosen), "\n".join([times, *lines])


def _kind(pair: Pair) -> Kind:
    """What collectives have in common that are cut alike: those at the same place of equal blocks."""
    last, shapes = pair.products[-1].meta, tuple(str(tuple(tensor_val(node).shape)) for node in pair.products)
    return type(pair).__name__, last["phase"], with_stars(last["module"]), pair.rows, shapes


def _cut_gather(step: StepGraph, pair: GatheredProducts, count: int) -> None:
    """Launch the gathers of all pieces, then wait for one and make its products, one piece after the other."""
    cut = pair.rows.cut(count)
    assert cut is not None
    piece, dim = cut
    launches = _gather_pieces(step, pair, count, piece, dim)
    products, others = _at_once(step, pair)
    first = min((*products, *itertools.chain(*others.values())), key=step.positions().__getitem__)
    pieces = []
    made: dict[fx.Node, list[fx.Node]] = {product: [] for product in products}
    for number, launch in enumerate(launches):
        with _editor(step, pair.wait).before(first) as editor:
            pieces.append(editor.call(c10d.wait, launch, name=f"{pair.wait.name}_piece_{number}"))
            factor = editor.viewed(pieces[-1], [piece.total, _width(pieces[-1])])
        for product in products:
            with _editor(step, product).before(first) as editor:
                made[product].append(_piece_of(editor, product, factor, number))
    for product in products:
        with _editor(step, product).before(product) as editor:
            _stand_for(editor, product, _joined(editor, made[product], piece, dim), count)
    if others:
        _join_whole(step, pieces, others, piece, dim)
    for node in (*reversed(pair.between), pair.launch):
        step.graph.erase_node(node)


def _gather_pieces(step: StepGraph, pair: GatheredProducts, count: int, piece: Rows, dim: int) -> list[fx.Node]:
    launches = []
    with _editor(step, pair.launch).before(pair.launch) as editor:
        source, rows = first_argument(pair.launch), pair.rows
        width = _width(source)
        part = editor.viewed(source, [rows.lead, rows.span, width])
        size = (piece.lead, piece.span)[dim]
        for number in range(count):
            own = editor.call(aten.slice.Tensor, part, dim, number * size, (number + 1) * size)
            own = editor.viewed(editor.contiguous(own), [piece.of_a_rank, width])
            name = f"{pair.launch.name}_piece_{number}"
            launches.append(editor.call(c10d.all_gather, own, *pair.launch.args[1:], name=name))
            told = f"piece {number + 1} of {count}: the products of one beside the next"
            launches[-1].meta |= {"because": told, "piece": number}
    return launches


def _at_once(step: StepGraph, pair: GatheredProducts) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
    """The products that can all be made where the first reader stands, and what other calls read, with these."""
    position = step.positions()
    readers = [*pair.products, *itertools.chain(*pair.others.values())]
    first = min(readers, key=position.__getitem__)
    products, others = [], {node: list(users) for node, users in pair.others.items()}
    for product in pair.products:
        factors = [node for node in product.all_input_nodes if node is not factor_of(product)]
        late = [node for node in factors if position[node] > position[first]]
        if all(map(_is_of_input, late)):
            products.append(product)
            for node in late:
                _move_before(node, first, position)
        else:
            others.setdefault(factor_of(product), []).append(product)
    return products, others


def _is_of_input(node: fx.Node) -> bool:
    """Whether a value is an input, or one in another form: the weight of a product, transposed or cast."""
    while is_view(node) or node.target is aten._to_copy.default:
        node = first_argument(node)
    return node.op == "placeholder"


def _move_before(node: fx.Node, first: fx.Node, position: Mapping[fx.Node, int]) -> None:
    if node.op == "placeholder" or position[node] < position[first]:
        return
    _move_before(first_argument(node), first, position)
    first.prepend(node)


def _piece_of(editor: Editor, product: fx.Node, factor: fx.Node, number: int) -> fx.Node:
    """The same product of other rows."""
    target: Any = product.target
    options: dict[str, Any] = product.kwargs
    made = editor.call(target, *with_factor(product, factor), name=f"{product.name}_piece_{number}", **options)
    kept = _of_columns(product)
    if kept is not None:
        made.meta["placements"] = kept
    return made


def _of_columns(product: fx.Node) -> dict[str, Any] | None:
    """How pieces of a product's rows lie, as it does; None where an axis splits rows, which a piece has parts of."""
    found = product.meta.get("placements")
    if found is None or any(lies.is_shard and lies.dim == 0 for lies in found.values()):
        return None
    return dict(found)


def _joined(editor: Editor, pieces: list[fx.Node], piece: Rows, dim: int) -> fx.Node:
    """The rows of all pieces in the order of one device: [lead, ranks, span, width]."""
    parts = []
    for made in pieces:
        part = editor.viewed(made, [piece.ranks, piece.lead, piece.span, _width(made)])
        parts.append(editor.call(aten.permute.default, part, [1, 0, 2, 3]))
    return editor.contiguous(editor.call(aten.cat.default, parts, 2 * dim))


def _stand_for(editor: Editor, old: fx.Node, joined: fx.Node, count: int) -> None:
    """What was joined is read in place of a value, of which nothing is left."""
    new = editor.call(aten.view.default, joined, list(tensor_val(old).shape), name=f"{old.name}_joined")
    _inherit(new, old)
    told = f"rows of {count} pieces in order"
    new.meta["because"] = f"{old.meta['because']}; {told}" if "because" in old.meta else told
    old.replace_all_uses_with(new)
    editor.graph.erase_node(old)


def _inherit(new: fx.Node, old: fx.Node) -> None:
    if "placements" in old.meta:
        new.meta["placements"] = dict(old.meta["placements"])


def _join_whole(
    step: StepGraph, pieces: list[fx.Node], others: dict[fx.Node, list[fx.Node]], piece: Rows, dim: int
) -> None:
    """What else reads the gathered value reads what is joined from the pieces, from the first such call on."""
    position = step.positions()
    first = min(itertools.chain(*others.values()), key=position.__getitem__)
    with _editor(step, first).before(first) as editor:
        whole = _joined(editor, pieces, piece, dim)
        for old, users in others.items():
            new = editor.call(aten.view.default, whole, list(tensor_val(old).shape), name=f"{old.name}_joined")
            _inherit(new, old)
            new.meta["because"] = f"{first.name} reads it whole: rows of {len(pieces)} pieces in order"
            replace_uses(old, new, users)


def _cut_scatter(step: StepGraph, pair: ScatteredProducts, count: int) -> None:
    """Make the products of one piece and launch its reduce-scatter, one piece after the other, then wait for all."""
    cut = pair.rows.cut(count)
    assert cut is not None
    piece, dim = cut
    launches = []
    width = _width(pair.root)
    for number in range(count):
        with _editor(step, pair.launch).before(pair.launch) as editor:
            summed = _Sum(editor, pair, piece, dim, number).of(pair.root)
            sent = editor.viewed(editor.contiguous(summed), [piece.total, width])
            name = f"{pair.launch.name}_piece_{number}"
            launches.append(editor.call(c10d.reduce_scatter, sent, *pair.launch.args[1:], name=name))
            told = f"piece {number + 1} of {count}: one beside the products of the next"
            launches[-1].meta |= {"because": told, "piece": number}
    with _editor(step, pair.wait).before(pair.wait) as editor:
        waits = [
            editor.call(c10d.wait, launch, name=f"{pair.wait.name}_piece_{n}") for n, launch in enumerate(launches)
        ]
        shape = [piece.lead, piece.span, width]
        parts = [editor.viewed(wait, shape) for wait in waits]
        _stand_for(editor, pair.wait, editor.call(aten.cat.default, parts, dim), count)
    erase_dead(step)


class _Sum:
    """One piece of the sum of some products, each of its rows, with the calls that made the whole sum.

    Args:
        editor: where to.
        pair: whose sum it is.
        piece, dim: the rows of a piece, and what is cut.
        number: of the piece.
    """

    def __init__(self, editor: Editor, pair: ScatteredProducts, piece: Rows, dim: int, number: int) -> None:
        self.editor, self.pair, self.number = editor, pair, number
        self.piece, self.dim = piece, dim
        self.selected: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """The piece's rows of a value, [rows, width] in the order in which they travel."""
        if node in self.pair.products:
            return _piece_of(self.editor, node, self._rows_of(factor_of(node)), self.number)
        if node.target is not aten.add.Tensor:
            return self.of(first_argument(node))
        left, right = (self.of(side) for side in node.all_input_nodes)
        return self.editor.call(aten.add.Tensor, left, right, name=f"{node.name}_{self.number}")

    def _rows_of(self, factor: fx.Node) -> fx.Node:
        if factor not in self.selected:
            rows, piece, editor = self.pair.rows, self.piece, self.editor
            width, size = _width(factor), (piece.lead, piece.span)[self.dim]
            own = editor.viewed(factor, [rows.lead, rows.ranks, rows.span, width])
            begin = self.number * size
            own = editor.call(aten.slice.Tensor, own, 2 * self.dim, begin, begin + size)
            own = editor.contiguous(editor.call(aten.permute.default, own, [1, 0, 2, 3]))
            self.selected[factor] = editor.viewed(own, [piece.total, width])
        return self.selected[factor]


def _editor(step: StepGraph, like: fx.Node) -> Editor:
    return Editor(step, phase=like.meta["phase"], module=like.meta["module"], param=like.meta.get("param"))


def _width(node: fx.Node) -> int:
    return int(tensor_val(node).shape[-1])


def _refuse(pairs: list[Pair], chunks: int) -> None:
    rows = pairs[0].rows
    sizes = sorted({pair.rows.of_a_rank for pair in pairs})
    works = [str(count) for count in range(2, 17) if any(pair.rows.cut(count) for pair in pairs)]
    raise PlanError.of(
        "Plan.tp_chunks",
        expected=f"a number of pieces that divides the rows of a rank ({', '.join(map(str, sizes))})",
        got=str(chunks),
        fix=f"take {' or '.join(works)}" if works else f"leave it out, or make more rows than {rows.of_a_rank}",
    )


def _told(pairs: list[Pair], counts: Mapping[str, int]) -> str:
    if not pairs:
        return "no product stands beside a gather or a reduce-scatter of values in parts"
    cut = [pair for pair in pairs if counts.get(pair.launch.name, 1) > 1]
    kinds = f"{sum(isinstance(pair, GatheredProducts) for pair in cut)} gathers"
    kinds += f" and {sum(isinstance(pair, ScatteredProducts) for pair in cut)} reduce-scatters"
    return f"{kinds} of {len(pairs)} collectives beside products are in pieces"
