"""Calls of a kernel's ops take the place of those that they compute, and are counted."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero.graph.edit import Editor, value_of
from fxzero.graph.gradient_calls import sum_of
from fxzero.graph.step_graph import StepGraph, tensor_val

aten = torch.ops.aten

_OF_ONE_VALUE = ("val", "grad_of", "placements", "because")  # what is said of a value, not of where it is made
_MOST_TOLD = 2  # reasons, of those that differ


@dataclass
class KernelCalls:
    """How many calls of a kernel a pass has put into a step, and why there are no more.

    Args:
        kernel: its name in a plan.
        what: what it computes, as people call more than one of it.
        found: how many there are.
        fused: how many are calls of the kernel now.
    """

    kernel: str
    what: str
    found: int = 0
    fused: int = 0
    _left: dict[str, str] = field(default_factory=dict)
    _near: str = ""

    def left(self, node: fx.Node, reason: str) -> None:
        """One stays as it is."""
        self._left.setdefault(reason, _where(node))

    def near(self, node: fx.Node, reason: str) -> None:
        """A call begins as one does, but goes on otherwise; the first one is told where there is none."""
        self._near = self._near or f"{_where(node)}: {reason}"

    def told(self) -> str:
        """One line for people."""
        if not self.found:
            return f"{self.kernel}: none found" + (f"; nearest, {self._near}" if self._near else "")
        reasons = [f"{where}: {reason}" for reason, where in self._left.items()]
        return "; ".join([f"{self.kernel}: {self.fused} of {self.found} {self.what}", *reasons[:_MOST_TOLD]])


def _where(node: fx.Node) -> str:
    module = node.meta.get("module")
    return f"%{node} of {module}" if module else f"%{node}"


def put_forward(
    step: StepGraph,
    position: dict[fx.Node, float],
    old: fx.Node,
    op: Any,
    args: Sequence[Any],
    *,
    results: int = 1,
) -> tuple[fx.Node, ...]:
    """A call of an op takes the place of the one that yielded its first result.

    Args:
        step: the graph.
        position: node -> its place in the program; grows.
        old: the call that it replaces.
        op, args: what is called; all of the arguments stand before `old`.
        results: how many it has.

    Returns:
        The nodes that yield the results.
    """
    editor = Editor(step, phase=old.meta["phase"])
    editor.meta = {key: value for key, value in old.meta.items() if key not in _OF_ONE_VALUE}
    with editor.before(old):
        call = editor.call(op, *args)
        made = (call,) if results == 1 else tuple(editor.call(operator.getitem, call, i) for i in range(results))
        first = _laid_out(editor, position, made[0], old)
    position.update(dict.fromkeys((call, *made), position[old]))
    _take_place(editor, old, first)
    return made


def put_backward(
    step: StepGraph,
    position: dict[fx.Node, float],
    replaced: Sequence[Sequence[fx.Node]],
    op: Any,
    args: Sequence[Any],
    *,
    results: int = 2,
) -> fx.Node | None:
    """A call of an op takes the place of those that yield gradients, or the parts of one.

    Args:
        step: the graph.
        position: node -> its place in the program; grows.
        replaced: for each of the op's results, the calls whose sum it is; none where nothing reads it.
        op, args: what is called; all of the arguments stand before the first of `replaced`.
        results: how many the op has.

    Returns:
        The call; None where nothing reads any result.
    """
    first = min((node for parts in replaced for node in parts), key=position.__getitem__, default=None)
    if first is None:
        return None
    editor = Editor(step, phase=first.meta["phase"], module=first.meta["module"])
    with editor.before(first):
        call = editor.call(op, *args)
        read = [place for place, parts in enumerate(replaced) if parts]
        made = [call] if results == 1 else [editor.call(operator.getitem, call, place) for place in read]
        made = [_laid_out(editor, position, new, replaced[place][0]) for new, place in zip(made, read, strict=True)]
    position.update(dict.fromkeys((call, *made), position[first]))
    for new, place in zip(made, read, strict=True):
        if len(replaced[place]) == 1:
            _take_place(editor, replaced[place][0], new)
        else:
            _join(editor, position, replaced[place], new)
    return call


def _laid_out(editor: Editor, position: dict[fx.Node, float], new: fx.Node, old: fx.Node) -> fx.Node:
    """A value with the strides of the one that it replaces, unless all that reads that one copies it anyway."""
    strides = tensor_val(old).stride()
    if tensor_val(new).stride() == strides or _is_copied(old):
        return new
    made = editor.with_strides(new, strides)
    position.update({made: position[old], made.all_input_nodes[0]: position[old]})
    return made


def _is_copied(node: fx.Node) -> bool:
    """Whether all that reads a value turns it and makes a contiguous copy, which has the same strides in any case."""
    turned = list(node.users)
    copies = [user for reader in turned for user in reader.users]
    if not all(reader.target in (aten.transpose.int, aten.permute.default) for reader in turned):
        return False
    return all(
        c.target is aten.clone.default and c.kwargs == {"memory_format": torch.contiguous_format} for c in copies
    )


def _take_place(editor: Editor, old: fx.Node, new: fx.Node) -> None:
    new.meta = {**old.meta, "val": new.meta["val"]}
    old.replace_all_uses_with(new)
    if tensor_val(new).stride() != tensor_val(old).stride():
        for reader in new.users:
            reader.meta["val"] = value_of(editor.step, reader, editor.mode)


def _join(editor: Editor, position: dict[fx.Node, float], parts: Sequence[fx.Node], new: fx.Node) -> None:
    """A gradient goes into the sum that its parts were added to."""
    total = sum_of(parts)
    beside, *others = total.rest
    editor.meta = {key: value for key, value in total.root.meta.items() if key not in _OF_ONE_VALUE}
    with editor.before(total.root):
        for other in others:
            beside = editor.call(aten.add.Tensor, beside, other)
            position[beside] = position[total.root]
    total.root.args = (beside, new)
