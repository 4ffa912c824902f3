"""ZeRO-1: each rank keeps and updates its rows of the optimizer state.

The update of a parameter runs on rows wherever its ops are pointwise (torch tags them so); an op that is not, such
as the matrix products of Muon, gets the gathers that it needs and runs whole. No optimizer is known by name.
Source: ZeRO (Rajbhandari et al., 2020), section 5.
"""

from __future__ import annotations

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import Sharding, StepGraph, ops
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, value_of
from fxzero.graph.step_graph import first_argument, identifier, sharding_of, tensor_val, yields_tensor

aten = torch.ops.aten

# pointwise in effect, though torch does not tag them: the output has the input's rows, row by row
_ROW_WISE = {
    aten.clone.default,
    aten.copy.default,
    aten._to_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
}


@graph_pass(requires=("gradients-reduced",), provides=("optimizer-state-sharded",))
def shard_optimizer_state(step: StepGraph, *, axis: str, persist_below: int = 0) -> int:
    """Keep optimizer state (and sums of gradients) as rows of `axis`; update rows, and gather the updated parameter.

    Args:
        step: the graph.
        axis: the mesh axis to shard over.
        persist_below: parameters with fewer elements keep whole state on every rank; of those that another axis
            splits, the elements of this rank's part count.
    """
    size = step.mesh[axis]
    sharded = {
        node.meta["entry"].name: sharding
        for node in step.inputs("parameter")
        if (sharding := sharding_of(node, axis, size, persist_below)) is not None
    }
    updates: dict[str, list[fx.Node]] = {}
    for node in step.phase("update"):
        if "param" in node.meta:
            updates.setdefault(node.meta["param"], []).append(node)
    inputs: dict[str, dict[tuple[str, str], fx.Node]] = {}
    for node in step.inputs("parameter", "optimizer", "accumulated"):
        entry = node.meta["entry"]
        inputs.setdefault(entry.param or entry.name, {})[entry.key] = node
    results = step.results
    edits = 0
    editor = Editor(step, phase="update")
    for name in sharded:
        rewrite = _RowWiseUpdate(editor, name, sharded[name])
        mine = inputs[name]
        for (kind, _), node in mine.items():
            if kind != "parameter" and _lie_alike(node, mine[("parameter", name)]):
                rewrite.shard_input(node)
        for node in updates.get(name, ()):
            rewrite.visit(node)
        rewrite.settle_results(mine, results)
        rewrite.settle_gradient(results)
        edits += rewrite.edits
    step.set_results(results)
    return edits


def _lie_alike(node: fx.Node, parameter: fx.Node) -> bool:
    """Whether an input has its parameter's shape, and a rank has the same part of both."""
    if node.meta["entry"].shape != parameter.meta["entry"].shape or not yields_tensor(node):
        return False
    return tensor_val(node).shape == tensor_val(parameter).shape


class _RowWiseUpdate:
    """Carries a row sharding through the update of one parameter, in program order."""

    def __init__(self, editor: Editor, name: str, sharding: Sharding) -> None:
        self.step = editor.step
        self.name = name
        self.sharding = sharding
        self.editor = editor
        editor.meta = {**editor.meta, "param": name}
        self.rows: set[fx.Node] = set()
        self.gathered: dict[fx.Node, fx.Node] = {}
        self.local: dict[fx.Node, fx.Node] = {}
        self.edits = 0

    def shard_input(self, node: fx.Node) -> None:
        """This rank holds only its rows of an input from now on."""
        shape = (self.sharding.padded_rows // self.sharding.num_shards, *node.meta["val"].shape[1:])
        with self.editor.mode:
            node.meta["val"] = torch.empty(shape, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
        node.meta["sharding"] = self.sharding
        self.rows.add(node)
        self.edits += 1

    def visit(self, node: fx.Node) -> None:
        """Let one update node work on rows where it can."""
        inputs = [n for n in node.all_input_nodes if yields_tensor(n) and n.meta["val"].dim() > 0]
        whole = node.meta["val"]
        row_wise = self._is_row_wise(node, whole)
        if not row_wise:
            for source in inputs:
                if source in self.rows:
                    node.replace_input_with(source, self._gather(source, node))
            return
        aligned = [n for n in inputs if n in self.rows or self._covers_rows(n, whole)]
        if not aligned:
            return
        for source in aligned:
            if source not in self.rows:
                node.replace_input_with(source, self._take_rows(source, node))
        node.meta["val"] = value_of(self.editor.step, node, self.editor.mode)
        node.meta["sharding"] = self.sharding
        self.rows.add(node)
        self.edits += 1

    def settle_results(self, inputs: dict[tuple[str, str], fx.Node], results: dict[tuple[str, str], fx.Node]) -> None:
        """Return rows for inputs that are rows, whole tensors for those that are whole."""
        for key, source in inputs.items():
            node = results.get(key)
            if node is None:
                continue
            if source in self.rows and node not in self.rows:
                results[key] = self._take_rows(node, self.step.output)
            elif source not in self.rows and node in self.rows:
                results[key] = self._gather(node, self.step.output)

    def settle_gradient(self, results: dict[tuple[str, str], fx.Node]) -> None:
        """Hand on rows of a gradient that is returned: of a first microbatch's, as later ones do; to a user's loop."""
        for key in (("accumulated", self.name), ("gradient", self.name)):
            if key in results and results[key] not in self.rows and self.step.input(*key) is None:
                results[key] = self._take_rows(results[key], self.step.output)

    def _is_row_wise(self, node: fx.Node, whole: object) -> bool:
        if not isinstance(whole, torch.Tensor) or not compat.is_op(node.target):
            return False
        if torch.Tag.pointwise not in node.target.tags and node.target not in _ROW_WISE:
            return False
        return all(n.meta["val"].dim() == whole.dim() for n in node.all_input_nodes if n in self.rows)

    def _covers_rows(self, node: fx.Node, whole: torch.Tensor) -> bool:
        val = node.meta["val"]
        return val.dim() == whole.dim() and val.shape[0] == whole.shape[0] == self.sharding.rows

    def _gather(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        if node not in self.gathered:
            with self.editor.before(reader):
                _, self.gathered[node] = self.editor.all_gather(
                    node, self.sharding, stem=f"{identifier(self.name)}_new"
                )
            self.edits += 1
        return self.gathered[node]

    def _take_rows(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        if node not in self.local:
            with self.editor.before(reader):
                self.local[node] = self.editor.local_shard(node, self.sharding, stem=identifier(self.name))
            self.edits += 1
        return self.local[node]


def is_rows_of(node: fx.Node) -> bool:
    """Whether a node takes this rank's rows of a replicated value."""
    return node.op == "call_function" and node.target is ops.local_shard


def rows_for(whole: fx.Node, axis: str, *, only_gathered: bool = False) -> fx.Node | None:
    """This rank's rows of a value of the update, where some node has them: for a reader that can do with rows.

    Args:
        whole: the value.
        axis: the mesh axis of the rows.
        only_gathered: not rows that are taken of a value which is whole anyway, only those that it is gathered from.
    """
    rows = _rows_under_gather(whole)
    if rows is None and not only_gathered:
        rows = next((user for user in whole.users if is_rows_of(user)), None)
        if rows is not None:
            whole.append(rows)  # where every reader of `whole` can read them
    return rows if rows is not None and rows.meta["sharding"].axis == axis else None


def _rows_under_gather(whole: fx.Node) -> fx.Node | None:
    node = first_argument(whole) if whole.target is aten.slice.Tensor else whole
    if not c10d.is_wait(node) or c10d.launched_by(node).target is not c10d.all_gather:
        return None
    rows = first_argument(c10d.launched_by(node))
    return rows if "sharding" in rows.meta else None
