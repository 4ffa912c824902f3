"""Attention whose queries, outputs and gradients are split on tokens: each rank asks all parts of keys and values.

[Note: parts of keys]
Keys and values are as many parts as there are ranks. The part that stands where this rank's queries do is masked as on
one device; of the others, where the mask is causal, those before it are seen whole and those behind it not at all. What
a rank sees differs, the program does not: every rank asks every part, and what it must not see counts for nothing, by a
logsumexp of nearly nothing in forward and nearly everything in backward.
Parts are joined by their logsumexp. Gradients of a part come of the op's own backward, which is told the output and the
logsumexp of all parts.

    gathered    Keys and values come whole: an all-gather of what is split on tokens, or nothing where they are whole
                already. Without a mask the op itself does the rest, in one call. Gradients of keys and values are
                summands of all ranks. What was gathered in forward is there until backward.
    ring        They come in parts, which travel from rank to rank; a rank holds two of them (`ring_attention.py`).

So a causal op does nearly twice the work of heads that are split: a rank asks n parts, of which all ranks together need
(n + 1) / 2 on average. It is for few heads of keys and values, or heads that ranks do not divide. Work would be even
where each rank has a part from the front of the row and its mirror image from the back ("zigzag"). That is another
order of tokens for all that knows positions, of which no placement tells, or further messages for each call: not done.
Source: gathered keys and values: The Llama 3 Herd of Models (2024), section 3.3.2; beside DeepSpeed-Ulysses (Jacobs et
al., 2023), which is heads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fxzero.graph import ops
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.strategy import Call, Local, Strategy, Tensor, fits

aten = torch.ops.aten

TOKENS = 2
OF_KEYS = ("key", "value")
_OF_QUERIES = ("query", "grad_out", "out", "logsumexp")
_NOTHING = 10**9  # e to the power of minus this is 0, in every dtype

# keys and values of some tokens, with a number: 0 where this rank sees them, else minus _NOTHING; None: all ranks do
Part = tuple[dict[str, fx.Node], fx.Node | None]


def gathered_attention(call: Call) -> Iterator[Strategy]:
    """The way of `_scaled_dot_product_flash_attention*` by tokens that takes keys and values whole; none for others."""
    if not is_of_tokens(call):
        return
    if not is_causal(call):
        yield from by_tokens(call, keys=REPLICATED, gradients=partial(), share=1 / call.ranks)
        return
    traffic = join_traffic(call)
    if is_backward(call):  # each part is put where it belongs among zeros, and all are joined and added up
        traffic += 6 * keys_bytes(call)
    form = _backward if is_backward(call) else _forward
    costs = {"share": causal_share(call.ranks), "calls": call.ranks, "traffic": traffic}
    yield from by_tokens(call, keys=REPLICATED, gradients=partial(), form=form, **costs)


def is_of_tokens(call: Call) -> bool:
    """Whether parts of a call's keys can be asked one by one: those of flash attention, without a mask of its own."""
    named = _named(call)
    is_masked = any(isinstance(named.get(name), Tensor) for name in ("attn_mask", "attn_bias"))
    if "flash_attention" not in str(call.target) or is_masked:
        return False
    return not is_causal(call) or named["key"].shape[TOKENS] == named["query"].shape[TOKENS]


def is_causal(call: Call) -> bool:
    """Whether no query sees keys behind it."""
    return bool(_named(call).get("is_causal", False))


def is_backward(call: Call) -> bool:
    """Whether a call yields gradients."""
    return "backward" in str(call.target)


def causal_share(ranks: int) -> float:
    """Of the work of one device, what a rank does that asks every part: its own at half the work, the others whole."""
    return (2 * ranks - 1) / ranks**2


def join_traffic(call: Call) -> float:
    """Bytes that a rank reads and writes to join what its queries have of all parts: outputs, or their gradients."""
    elements = math.prod(_named(call)["query"].shape)
    if not is_backward(call):
        return 5.0 * 4 * elements  # scaled and added up in float32
    return 3.0 * (1 - 1 / call.ranks) * _named(call)["query"].num_bytes


def keys_bytes(call: Call) -> int:
    """Bytes of all keys and values."""
    return sum(_named(call)[name].num_bytes for name in OF_KEYS)


def by_tokens(call: Call, *, keys: Placement, gradients: Placement, **how: Any) -> Iterator[Strategy]:
    """The way of a call whose queries are split on tokens, if ranks divide them.

    Args:
        call: of flash attention.
        keys: how keys and values lie.
        gradients: how theirs lie, in backward.
        how: further arguments of the strategy.
    """
    lies = shard(TOKENS)
    tensors = [name for name, value in _named(call).items() if isinstance(value, Tensor)]
    inputs = tuple(lies if name in _OF_QUERIES else keys if name in OF_KEYS else REPLICATED for name in tensors)
    first = (lies, gradients, gradients) if is_backward(call) else (lies, lies)
    others = tuple(None if output is None else REPLICATED for output in call.outputs[len(first) :])
    strategy = Strategy(inputs, (*first, *others), **how)
    if fits(call, strategy):
        yield strategy


def argument(local: Local, name: str) -> Any:
    """What this rank has of an argument of the call."""
    return local.args[_names(local.call).index(name)]


def asked(local: Local, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call, with other values for some."""
    args = tuple(changes.get(name, value) for name, value in zip(_names(local.call), local.args, strict=False))
    return args, local.kwargs


def joined_forward(local: Local, own: dict[str, fx.Node], others: Iterable[Part]) -> tuple[fx.Node | None, ...]:
    """Outputs and logsumexp of this rank's queries, of its own part of keys and values and of others."""
    editor = local.editor
    args, kwargs = asked(local, **own)
    with local.made_of(*args, **kwargs) as made:
        outputs = list(local.yielded(made))
        found: list[tuple[Any, Any]] = [(outputs[0], outputs[1])]
        for part, hidden in others:
            args, kwargs = asked(local, **part, is_causal=False)
            of_part = editor.call(local.call.target, *args, **kwargs)
            output, weight = (editor.call(operator.getitem, of_part, number) for number in (0, 1))
            found.append((output, weight if hidden is None else editor.call(aten.add.Tensor, weight, hidden)))
        total = found[0][1]
        for _, weight in found[1:]:
            total = editor.call(aten.logaddexp.default, total, weight)
        outputs[0], outputs[1] = _joined(local, found, total), total
        return tuple(outputs)


def gradients_of(local: Local, part: Part) -> list[fx.Node]:
    """The gradients of queries, keys and values that come of a part of keys and values which is not the own one."""
    editor, (values, hidden) = local.editor, part
    total = argument(local, "logsumexp")
    weight = total if hidden is None else editor.call(aten.sub.Tensor, total, hidden)
    args, kwargs = asked(local, **values, is_causal=False, logsumexp=weight)
    made = editor.call(local.call.target, *args, **kwargs)
    return [editor.call(operator.getitem, made, number) for number in range(3)]


def hidden_unless(local: Local, seen: fx.Node) -> fx.Node:
    """What to add to the logsumexp of a part, of a number that is 1 where this rank sees it, else 0."""
    return local.editor.call(operator.mul, local.editor.call(operator.sub, seen, 1), _NOTHING)


def _named(call: Call) -> dict[str, Any]:
    return dict(zip(_names(call), call.args, strict=False)) | call.kwargs


def _names(call: Call) -> list[str]:
    return [argument.name for argument in call.target._schema.arguments]


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


def _own_part(local: Local) -> dict[str, fx.Node]:
    """Keys and values that stand where this rank's queries do."""
    index, ranks = local.coordinate(), local.call.ranks
    return {name: local.editor.call(ops.local_part, argument(local, name), TOKENS, ranks, index) for name in OF_KEYS}


def _parts_before(local: Local) -> Iterator[Part]:
    """Every part of keys and values but the last, which is before none."""
    editor, ranks = local.editor, local.call.ranks
    size = argument(local, "key").meta["val"].shape[TOKENS] // ranks
    for part in range(ranks - 1):
        cut = {
            name: editor.call(aten.slice.Tensor, argument(local, name), TOKENS, part * size, (part + 1) * size)
            for name in OF_KEYS
        }
        reached = editor.call(operator.add, local.coordinate(), ranks - 1 - part)
        # 1 of a part before the own one, else 0
        yield cut, hidden_unless(local, editor.call(operator.floordiv, reached, ranks))


def _forward(local: Local) -> tuple[fx.Node | None, ...]:
    return joined_forward(local, _own_part(local), _parts_before(local))


def _backward(local: Local) -> tuple[fx.Node | None, ...]:
    editor, ranks = local.editor, local.call.ranks
    args, kwargs = asked(local, **_own_part(local))
    with local.made_of(*args, **kwargs) as own:
        queries, *own_parts = (editor.call(operator.getitem, own, number) for number in range(3))
        before: list[list[fx.Node]] = [[], []]
        for part in _parts_before(local):
            of_queries, *of_part = gradients_of(local, part)
            queries = editor.call(aten.add.Tensor, queries, of_queries)
            for gradients, gradient in zip(before, of_part, strict=True):
                gradients.append(gradient)
        wholes = []
        for mine, gradients in zip(own_parts, before, strict=True):
            put = editor.call(ops.put_part, mine, TOKENS, ranks, local.coordinate())
            last = editor.call(aten.zeros_like.default, gradients[0])
            others = editor.call(aten.cat.default, [*gradients, last], TOKENS)
            wholes.append(editor.call(aten.add.Tensor, put, others))
        return (queries, *wholes)
