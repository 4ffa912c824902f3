"""Linear and cross entropy by some rows after the other, so that the logits of a large vocabulary are never whole.

[Note: chunks of a loss]
Logits [N, V] and their gradients are often the largest values of a step, and die where they are made. So backward
begins with the product: for a chunk of rows it computes logits, loss, the logits' gradient and what follows from that,
and its logits die before the next chunk's are made. The loss is a value of backward then; nothing is computed twice,
and a gathered weight serves all chunks. That needs the gradient of the loss before its value, which holds unless the
loss is squared, say. Chunks of equal size are equal calls, so that a compiler compiles one of them. Gradients of weight
and bias add up in their own dtype, those of fewer than four bytes in fp32; the mean divides by the number of all
labels that count, known beforehand.
Source: Liger Kernel (Hsu et al., 2024), section 3.2, whose forward computes gradients too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph import loss_rows as by_rows
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, erase_dead
from fxzero.graph.loss_rows import LossRows, NotByRows
from fxzero.graph.step_graph import ADDED_UP, is_view, num_bytes, tensor_val
from fxzero.graph.text import size_text

aten = torch.ops.aten

AUTO = "auto"
_MULTIPLE = 64  # of rows, and the fewest: below, a chunk's products read the weight more than they compute
_FEWEST_TIMES = 2  # of the hidden's elements: logits that are smaller stay whole


@graph_pass(
    requires=("captured",),
    provides=("losses-chunked",),
    numerics="1e-5 relative in fp32: sums over rows are taken chunk by chunk; bitwise with one chunk",
)
def chunk_losses(step: StepGraph, *, rows: int | str = AUTO) -> int:
    """Compute each cross entropy of a matrix product, and its gradients, for a chunk of rows after the other.

    Args:
        step: the graph, as captured.
        rows: of a chunk; "auto": so many that its logits are as large as the whole hidden, where that pays.

    Returns:
        The number of chunks, of all losses together.

    Raises:
        PlanError: if a number is asked for and a loss needs its logits whole, or there is none.
    """
    found = by_rows.losses(step)
    told = [] if found else ["logits stay whole: the step has no cross entropy of labels"]
    edits = 0
    for number, loss in enumerate(found):
        name = "the loss" if len(found) == 1 else f"loss {number + 1} of {len(found)}"
        try:
            of_loss = by_rows.loss_rows(step, loss)
        except NotByRows as reason:
            told.append(f"logits of {name} stay whole: {reason}")
            _refuse(rows, told[-1])
            continue
        chunk = _rows_of(of_loss) if rows == AUTO else int(rows)
        told.append(_told(of_loss, chunk, name))
        if chunk is not None:
            edits += _Chunks(step, of_loss, chunk).write()
    if not found:
        _refuse(rows, told[0])
    step.remarks["chunk_losses"] = "\n".join(told)
    return edits


def _refuse(rows: int | str, got: str) -> None:
    """Raise the error where a number of rows was asked for."""
    if rows != AUTO:
        expected = "a cross entropy of a matrix product whose rows nothing else reads"
        raise PlanError.of("Plan.chunk_loss", expected=expected, got=got, fix="set chunk_loss='auto', or leave it out")


def _rows_of(found: LossRows) -> int | None:
    """Rows of a chunk whose logits are about as large as the hidden; None where whole ones are not much larger.

    Source: Liger Kernel, which takes the power of two next to it.
    """
    count, width, columns = _sizes(found)
    chunk = max(1, round(count * width / columns / _MULTIPLE)) * _MULTIPLE
    return chunk if chunk < count and columns >= _FEWEST_TIMES * width else None


def _sizes(found: LossRows) -> tuple[int, int, int]:
    """Rows that the loss reads, columns of the hidden, columns of the logits."""
    count, columns = tensor_val(found.log_probabilities).shape
    return count, tensor_val(found.hidden).shape[1], columns


def _told(found: LossRows, chunk: int | None, name: str) -> str:
    count, width, columns = _sizes(found)
    whole = num_bytes(found.log_probabilities.meta["val"])
    what = f"logits of {name} [{count}, {columns}], {size_text(whole)}"
    if chunk is None:
        return f"{what}, stay whole: too small beside the hidden [{count}, {width}], or too few rows"
    chunk = min(chunk, count)
    return f"{what}: in {-(-count // chunk)} chunks of {chunk} rows, {size_text(whole * chunk // count)} each"


class _Chunks:
    """Writes the chunks of one loss where backward begins with it."""

    def __init__(self, step: StepGraph, found: LossRows, rows: int) -> None:
        self._step, self._found = step, found
        self._editor = Editor(step, phase="backward")
        self._rows = min(rows, _sizes(found)[0])
        self._num_chunks = -(-_sizes(found)[0] // self._rows)
        self._operands: dict[fx.Node, fx.Node] = {}  # what all chunks read -> as backward has it
        self._sums: dict[fx.Node, fx.Node] = {}  # a sum over all rows -> what has been added up so far
        self._parts: dict[fx.Node, list[fx.Node]] = {}  # what is made of rows -> its part of each chunk
        self._num_labels = self._count_labels()

    def write(self) -> int:
        """Replace the calls on rows; returns the number of chunks."""
        found, anchor = self._found, self._found.backward
        self._free_gradient()
        follows = self._following()
        with self._editor.before(anchor):
            for source in by_rows.beside(found):
                self._operands[source] = self._operand(source)
            hidden, labels = self._split(self._hidden()), self._split(found.labels)
            for number in range(self._num_chunks):
                self._write_chunk(number, hidden[number], labels[number])
            self._join_parts()
            self._settle_sums()
        for node in follows:
            node.meta["phase"] = "backward"
            anchor.prepend(node)
        erase_dead(self._step)
        return self._num_chunks

    # ---- before the chunks

    def _count_labels(self) -> fx.Node:
        """How many labels count, as a tensor of the loss's dtype."""
        labels, ignored = self._found.labels, self._found.loss.args[4]
        editor = Editor(self._step, phase="forward", module=self._found.loss.meta["module"])
        with editor.after(labels):
            number = editor.call(aten.sum.default, editor.call(aten.ne.Scalar, labels, ignored))
            return editor.call(aten._to_copy.default, number, dtype=tensor_val(self._found.log_probabilities).dtype)

    def _free_gradient(self) -> None:
        """What needs only the shape of the loss, a number, is made without its value."""
        value = self._value()
        for node in filter(by_rows.says_shape, [*value, *self._following()]):
            with self._editor.before(node) as editor:
                editor.meta = {**node.meta}
                options = {"dtype": tensor_val(node).dtype, "pin_memory": False}
                made = editor.call(node.target, self._num_labels, *node.args[1:], **options)  # type: ignore[arg-type]
            node.replace_all_uses_with(made)

    def _value(self) -> list[fx.Node]:
        return [user for user in self._found.loss.users if user.args[1] == 0]

    def _following(self) -> list[fx.Node]:
        """What follows from the loss's value and stands before backward begins, in order."""
        reached = set(self._value())
        follows = []
        for node in self._step.calls():
            if node is self._found.backward:
                break
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
                follows.append(node)
        return follows

    def _operand(self, node: fx.Node) -> fx.Node:
        """A value that all chunks read: views of it, and casts that nothing else reads, are made in backward."""
        if node in self._operands:
            return self._operands[node]
        if not by_rows.rebuilt(node) or not (is_view(node) or self._is_alone(node)):
            return node
        source = self._operand(node.all_input_nodes[0])
        self._editor.meta = {"phase": "backward", "module": node.meta["module"]}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: source)
        self._operands[node] = self._editor.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
        return self._operands[node]

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether only the calls on rows read a value, or views of it."""
        roles = self._found.roles
        return all(user in roles or (is_view(user) and self._is_alone(user)) for user in node.users)

    def _hidden(self) -> fx.Node:
        """The rows of the hidden that the loss reads: the logits' slices, taken of the hidden."""
        hidden = self._found.hidden
        width = tensor_val(hidden).shape[1]
        self._editor.meta = {"phase": "backward", "module": self._found.module}
        for node in self._found.slices:
            shape = [*node.args[0].meta["val"].shape[:-1], width]  # type: ignore[union-attr]
            hidden = self._editor.call(aten.view.default, hidden, shape)
            hidden = self._editor.contiguous(self._editor.call(aten.slice.Tensor, hidden, *node.args[1:]))
        return self._editor.call(aten.view.default, hidden, [-1, width]) if self._found.slices else hidden

    def _split(self, whole: fx.Node) -> list[fx.Node]:
        if self._num_chunks == 1:
            return [whole]
        self._editor.meta = {"phase": "backward", "module": self._found.module}
        parts = self._editor.call(aten.split.Tensor, whole, self._rows)
        return [self._editor.call(operator.getitem, parts, number) for number in range(self._num_chunks)]

    # ---- a chunk

    def _write_chunk(self, number: int, hidden: fx.Node, labels: fx.Node) -> None:
        """All calls for some rows; what adds up comes last, so that the rest stands together."""
        made: dict[fx.Node, fx.Node] = {}
        added = [node for node, role in self._found.roles.items() if role in (by_rows.TURNED, by_rows.ADDED)]
        for node, role in self._found.roles.items():
            if node in added:
                continue
            if role == by_rows.SAME:
                made[node] = made[node.args[0]]  # type: ignore[index]
                continue
            self._editor.meta = {"phase": "backward", "module": node.meta["module"], "chunk": number}
            made[node] = self._call(node, role, made, hidden, labels)
            if role in (by_rows.ROWS, by_rows.LOSS):
                self._parts.setdefault(node, []).append(made[node])
        for node in added:
            self._editor.meta = {"phase": "backward", "module": node.meta["module"], "chunk": ADDED_UP}
            if self._found.roles[node] == by_rows.TURNED:
                made[node] = self._editor.call(aten.t.default, made[node.args[0]])  # type: ignore[index]
            else:
                self._add(node, made, hidden)

    def _call(
        self, node: fx.Node, role: str, made: dict[fx.Node, fx.Node], hidden: fx.Node, labels: fx.Node
    ) -> fx.Node:
        """A call for the rows of one chunk."""
        call, target = self._editor.call, node.target
        assert callable(target)
        known = {**self._operands, **made}
        if role == by_rows.PRODUCT:
            known[node.args[-2]] = hidden  # type: ignore[index]
        args: Any = fx.map_arg(node.args, lambda n: known.get(n, n))
        if role in (by_rows.SOFTMAX, by_rows.SOFTMAX_BACKWARD):
            place = 1 if role == by_rows.SOFTMAX else 2
            return call(target, *args[:place], 1, *args[place + 1 :])
        if role == by_rows.LOSS:
            sums = call(target, args[0], labels, None, by_rows.SUM, *args[4:])
            return call(operator.getitem, sums, 0)
        if role == by_rows.LOSS_BACKWARD:
            return call(target, *args[:2], labels, *args[3:6], self._num_labels)
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: known.get(n, n))
        return call(target, *args, **kwargs)

    def _add(self, node: fx.Node, made: dict[fx.Node, fx.Node], hidden: fx.Node) -> None:
        """Add what a chunk gives to a sum over all rows: a product of a matrix is added where the sum stands."""
        call, dtype, before = self._editor.call, tensor_val(node).dtype, self._sums.get(node)
        is_short = dtype.itemsize < 4 and self._num_chunks > 1
        if node.target is not aten.mm.default:
            part = call(aten.sum.dim_IntList, made[node.args[0]], [0])  # type: ignore[index]
        else:
            a, b = node.args
            factors = (made[a], hidden) if a in made else (call(aten.t.default, hidden), made[b])  # type: ignore[index]
            if before is not None and not is_short:
                self._sums[node] = call(aten.addmm.default, before, *factors)
                return
            part = call(aten.mm.default, *factors)
        if before is not None:
            self._sums[node] = call(aten.add.Tensor, before, part)
        else:
            self._sums[node] = call(aten._to_copy.default, part, dtype=torch.float32) if is_short else part

    # ---- behind the chunks

    def _join_parts(self) -> None:
        """The loss, its number of labels, and rows that were made chunk by chunk are whole."""
        for node, parts in self._parts.items():
            self._editor.meta = {"phase": "backward", "module": node.meta["module"]}
            if node is self._found.loss:
                self._replace_loss(parts)
            else:
                node.replace_all_uses_with(self._joined(node, parts))

    def _joined(self, node: fx.Node, parts: list[fx.Node]) -> fx.Node:
        """The rows of all chunks, with zeros where the loss leaves out rows."""
        call = self._editor.call
        whole = call(aten.cat.default, parts) if len(parts) > 1 else parts[0]
        width = tensor_val(whole).shape[1]
        for cut in reversed(self._found.slices):
            whole = call(aten.view.default, whole, [*tensor_val(cut).shape[:-1], width])
            dim, start, end, every = by_rows.how_sliced(cut)
            shape = [*cut.args[0].meta["val"].shape[:-1], width]  # type: ignore[union-attr]
            end = shape[dim] if end is None else end
            whole = call(aten.slice_backward.default, whole, shape, dim, start or 0, end, every)
        return call(aten.view.default, whole, list(tensor_val(node).shape)) if self._found.slices else whole

    def _replace_loss(self, parts: list[fx.Node]) -> None:
        call, loss = self._editor.call, self._found.loss
        dtype = tensor_val(parts[0]).dtype
        total, number = parts[0], self._num_labels
        if len(parts) > 1:
            wide: dict[str, Any] = {"dtype": torch.float32} if dtype.itemsize < 4 else {}
            total = call(aten.sum.default, call(aten.stack.default, parts), **wide)
        if loss.args[3] == by_rows.MEAN:
            total = call(aten.div.Tensor, total, number)
        if tensor_val(total).dtype != dtype:
            total = call(aten._to_copy.default, total, dtype=dtype)
        for user in list(loss.users):
            user.replace_all_uses_with(total if user.args[1] == 0 else number)

    def _settle_sums(self) -> None:
        """What is added up takes the place of what was computed at once, without a cast back and forth."""
        for node, total in self._sums.items():
            self._editor.meta = {"phase": "backward", "module": node.meta["module"]}
            for user in list(node.users):
                if user.target is aten._to_copy.default and tensor_val(user).dtype == tensor_val(total).dtype:
                    self._take_place(user, self._shaped(user, total))
            if tensor_val(node).dtype != tensor_val(total).dtype and node.users:
                total = self._editor.call(aten._to_copy.default, total, dtype=tensor_val(node).dtype)
            self._take_place(node, self._shaped(node, total))

    def _shaped(self, node: fx.Node, total: fx.Node) -> fx.Node:
        shape = list(tensor_val(node).shape)
        return total if list(tensor_val(total).shape) == shape else self._editor.call(aten.view.default, total, shape)

    def _take_place(self, node: fx.Node, other: fx.Node) -> None:
        node.replace_all_uses_with(other)
        if "grad_of" in node.meta:
            other.meta["grad_of"] = node.meta["grad_of"]
