"""Dropout on the CPU as eager code computes it.

[Note: dropout by its parts]
While it traces, torch takes `native_dropout` for dropout everywhere. On the CPU eager code computes
`x * (bernoulli(1 - p) / (1 - p))` instead, which rounds otherwise for some p, and draws in the order in which a tensor
lies in memory. So the graph gets those ops; what backward keeps of them is the mask, one byte an element. On other
devices eager code calls `native_dropout`, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero.backend.joint import Joint
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import is_getitem, tensor_val

aten = torch.ops.aten


def draw_as_eager(joint: Joint) -> None:
    """Replace each `native_dropout` on the CPU and what differentiates it by the ops of eager code."""
    for node in joint.step.calls(aten.native_dropout.default):
        source, p, training = node.args
        if training and 0 < p < 1 and tensor_val(source).device.type == "cpu":  # type: ignore[arg-type, operator]
            _replace(joint, node, source, 1 - p)  # type: ignore[arg-type, operator]
    joint.step.graph.lint()


def _replace(joint: Joint, node: fx.Node, source: fx.Node, keep: float) -> None:
    made: list[fx.Node] = []
    dtype = tensor_val(source).dtype
    with _editor(joint, node).before(node) as editor:
        drawn = _drawn(editor, source, keep, made)
        noise = editor.call(aten.div.Tensor, drawn, keep)
        product = _laid_out(editor, editor.call(aten.mul.Tensor, source, noise), node.meta["val"][0])
        mask = editor.call(aten._to_copy.default, drawn, dtype=torch.bool)
    made += [drawn, noise, product, mask]
    for part in [user for user in node.users if is_getitem(user)]:
        if part.args[1] == 1:
            for reader in [user for user in part.users if user.target is aten.native_dropout_backward.default]:
                _differentiate(joint, reader, mask, keep, dtype)
        part.replace_all_uses_with(product if part.args[1] == 0 else mask)
        joint.again.discard(part)
        joint.step.graph.erase_node(part)
    if node in joint.again:
        joint.again.remove(node)
        joint.again.update(made)
    joint.step.graph.erase_node(node)


def _drawn(editor: Editor, source: fx.Node, keep: float, made: list[fx.Node]) -> fx.Node:
    """Zeros and ones in the layout of a tensor, drawn in the order of its memory."""
    with editor.mode:
        strides = torch.empty_like(tensor_val(source)).stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    if order == list(range(len(strides))):
        return editor.call(aten.bernoulli.p, source, keep)
    rows = editor.call(aten.permute.default, source, order)
    drawn = editor.call(aten.bernoulli.p, rows, keep)
    made += [rows, drawn]
    return editor.call(aten.permute.default, drawn, [order.index(dim) for dim in range(len(order))])


def _differentiate(joint: Joint, node: fx.Node, mask: fx.Node, keep: float, dtype: torch.dtype) -> None:
    gradient: Any = node.args[0]
    with _editor(joint, node).before(node) as editor:
        noise = editor.call(aten.div.Tensor, editor.call(aten._to_copy.default, mask, dtype=dtype), keep)
        product = _laid_out(editor, editor.call(aten.mul.Tensor, gradient, noise), tensor_val(node))
    product.meta |= {key: node.meta[key] for key in ("grad_of",) if key in node.meta}
    node.replace_all_uses_with(product)
    joint.step.graph.erase_node(node)


def _laid_out(editor: Editor, product: fx.Node, traced: torch.Tensor) -> fx.Node:
    """The product with the strides that what follows was traced for; the same elements."""
    if tensor_val(product).stride() == traced.stride() or not traced.is_contiguous():
        return product
    return editor.call(aten.clone.default, product, memory_format=torch.contiguous_format)


def _editor(joint: Joint, node: fx.Node) -> Editor:
    return Editor(joint.step, phase=node.meta["phase"], module=node.meta["module"])
