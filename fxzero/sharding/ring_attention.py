"""Attention whose queries, outputs and gradients are split on tokens: each rank asks all keys and values.

[Note: parts of keys]
Keys and values come whole: an all-gather of what is split on tokens, or nothing where they are whole already. Without
a mask the op itself does the rest. With a causal one, keys are as many parts as there are ranks: the part that stands
where this rank's queries do is masked as before, of the others those before it are seen whole and those behind it not
at all. What a rank sees differs, the program does not: every rank asks every part, and what it must not see counts for
nothing, by a logsumexp of nearly nothing in forward and nearly everything in backward. The last part is before
none.
Parts are joined by their logsumexp. Gradients of a part come of the op's own backward, which is told the output and the
logsumexp of all parts; those of keys and values are summands of all ranks.
So a causal op does nearly twice the work of heads that are split, in place of messages for queries and outputs: it is
for few heads of keys and values, or heads that ranks do not divide.
A ring would pass parts on instead of gathering them: as many bytes, and two parts in memory in place of all.
Source: Ring Attention (Liu et al., 2023); gathered keys and values: The Llama 3 Herd of Models (2024), section 3.3.2;
beside DeepSpeed-Ulysses (Jacobs et al., 2023), which is heads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero.graph import ops
from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding.strategy import Call, Local, Strategy, Tensor, fits

aten = torch.ops.aten

_TOKENS = 2
_OF_QUERIES = ("query", "grad_out", "out", "logsumexp")
_NOTHING = 10**9  # e to the power of minus this is 0, in every dtype


def ring_attention(call: Call) -> Iterator[Strategy]:
    """The way of `_scaled_dot_product_flash_attention*` without dropout and mask, by tokens; none for other ops."""
    named = dict(zip(_names(call), call.args, strict=False)) | call.kwargs
    query, key = named["query"], named["key"]
    causal = named.get("is_causal", False)
    is_masked = any(isinstance(named.get(name), Tensor) for name in ("attn_mask", "attn_bias"))
    tokens = query.shape[_TOKENS]
    if "flash_attention" not in str(call.target) or is_masked or (causal and key.shape[_TOKENS] != tokens):
        return
    lies = shard(_TOKENS)
    tensors = [name for name, value in named.items() if isinstance(value, Tensor)]
    inputs = tuple(lies if name in _OF_QUERIES else REPLICATED for name in tensors)
    backward = "backward" in str(call.target)
    first = (lies, partial(), partial()) if backward else (lies, lies)
    others = tuple(None if output is None else REPLICATED for output in call.outputs[len(first) :])
    form = None if not causal else _backward if backward else _forward
    share = (2 * call.ranks - 1) / call.ranks**2 if causal else 1 / call.ranks
    strategy = Strategy(inputs, (*first, *others), form, share=share)
    if fits(call, strategy):
        yield strategy


def _names(call: Call) -> list[str]:
    return [argument.name for argument in call.target._schema.arguments]


def _asked(local: Local, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call, with other values for some."""
    args = tuple(changes.get(name, value) for name, value in zip(_names(local.call), local.args, strict=False))
    return args, local.kwargs


def _argument(local: Local, name: str) -> Any:
    return local.args[_names(local.call).index(name)]


def _own_part(local: Local) -> dict[str, fx.Node]:
    """Keys and values that stand where this rank's queries do."""
    index, ranks = local.coordinate(), local.call.ranks
    return {
        name: local.editor.call(ops.local_part, _argument(local, name), _TOKENS, ranks, index)
        for name in ("key", "value")
    }


def _parts_before(local: Local) -> Iterator[tuple[dict[str, fx.Node], fx.Node]]:
    """Every part of keys and values but the last, with a number: 0 where this rank sees it, else minus _NOTHING."""
    editor, ranks = local.editor, local.call.ranks
    for part in range(ranks - 1):
        names = ("key", "value")
        size = _argument(local, "key").meta["val"].shape[_TOKENS] // ranks
        cut = {
            name: editor.call(aten.slice.Tensor, _argument(local, name), _TOKENS, part * size, (part + 1) * size)
            for name in names
        }
        reached = editor.call(operator.add, local.coordinate(), ranks - 1 - part)
        seen = editor.call(operator.floordiv, reached, ranks)  # 1 of a part before the own one, else 0
        yield cut, editor.call(operator.mul, editor.call(operator.sub, seen, 1), _NOTHING)


def _forward(local: Local) -> tuple[fx.Node | None, ...]:
    editor = local.editor
    args, kwargs = _asked(local, **_own_part(local))
    with local.made_of(*args, **kwargs) as own:
        outputs = list(local.yielded(own))
        found: list[tuple[Any, Any]] = [(outputs[0], outputs[1])]
        for part, hidden in _parts_before(local):
            args, kwargs = _asked(local, **part, is_causal=False)
            asked = editor.call(local.call.target, *args, **kwargs)
            output, weight = (editor.call(operator.getitem, asked, number) for number in (0, 1))
            found.append((output, editor.call(aten.add.Tensor, weight, hidden)))
        total = found[0][1]
        for _, weight in found[1:]:
            total = editor.call(aten.logaddexp.default, total, weight)
        outputs[0], outputs[1] = _joined(local, found, total), total
        return tuple(outputs)


def _joined(local: Local, found: list[tuple[Any, Any]], total: Any) -> fx.Node:
    """Outputs of parts, each times its part of the sum of exponentials; in the dtype that outputs have."""
    editor, sum_of = local.editor, None
    for output, weight in found:
        scale = editor.call(aten.exp.default, editor.call(aten.sub.Tensor, weight, total))
        scaled = editor.call(aten.mul.Tensor, output, editor.call(aten.unsqueeze.default, scale, -1))
        sum_of = scaled if sum_of is None else editor.call(aten.add.Tensor, sum_of, scaled)
    assert sum_of is not None
    dtype = found[0][0].meta["val"].dtype
    return sum_of if sum_of.meta["val"].dtype == dtype else editor.call(aten._to_copy.default, sum_of, dtype=dtype)


def _backward(local: Local) -> tuple[fx.Node | None, ...]:
    editor, ranks = local.editor, local.call.ranks
    total = _argument(local, "logsumexp")
    args, kwargs = _asked(local, **_own_part(local))
    with local.made_of(*args, **kwargs) as own:
        queries, *own_parts = (editor.call(operator.getitem, own, number) for number in range(3))
        before: list[list[fx.Node]] = [[], []]
        for part, hidden in _parts_before(local):
            weight = editor.call(aten.sub.Tensor, total, hidden)
            args, kwargs = _asked(local, **part, is_causal=False, logsumexp=weight)
            asked = editor.call(local.call.target, *args, **kwargs)
            of_queries, *of_parts = (editor.call(operator.getitem, asked, number) for number in range(3))
            queries = editor.call(aten.add.Tensor, queries, of_queries)
            for gradients, gradient in zip(before, of_parts, strict=True):
                gradients.append(gradient)
        wholes = []
        for mine, gradients in zip(own_parts, before, strict=True):
            put = editor.call(ops.put_part, mine, _TOKENS, ranks, local.coordinate())
            last = editor.call(aten.zeros_like.default, gradients[0])
            others = editor.call(aten.cat.default, [*gradients, last], _TOKENS)
            wholes.append(editor.call(aten.add.Tensor, put, others))
        return (queries, *wholes)
