"""Attention by tokens whose keys and values travel: a rank holds its own part and one that has come to it.

[Note: a ring of parts]
At step s a rank asks the part of the rank s places before it. So that messages and products overlap, the part at hand
is passed on before it is asked, and the next one is waited for behind that: the messages of a step take as long as its
product, or cost what they take longer.
In backward, parts of keys and values travel as in forward. With each goes what ranks so far have found of its gradient:
a rank adds its own and passes it on while it works on the next part, and the last one sends it home. The part at hand
at step 0 is the own one, whose gradient need not travel; so all goes n - 1 places. Nothing is whole anywhere, at the
price of messages for three tensors where gathered keys and values take two (one in forward, one in backward).
Where a rank must not see a part, it asks it all the same ([Note: parts of keys] in `token_attention.py`).
Source: Ring Attention with Blockwise Transformers (Liu et al., 2023).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import shard
from fxzero.sharding.strategy import Call, Local, Message, Strategy
from fxzero.sharding.token_attention import (
    OF_KEYS,
    TOKENS,
    Part,
    argument,
    asked,
    by_tokens,
    causal_share,
    gradients_of,
    hidden_unless,
    is_backward,
    is_causal,
    is_of_tokens,
    join_traffic,
    joined_forward,
    keys_bytes,
)

aten = torch.ops.aten


def ring_attention(call: Call) -> Iterator[Strategy]:
    """The way of `_scaled_dot_product_flash_attention*` in which keys and values travel; none for other ops."""
    if not is_of_tokens(call):
        return
    n, part = call.ranks, keys_bytes(call) // call.ranks
    traffic = join_traffic(call) + 2 * part  # keys and values are made contiguous to be sent
    messages = (Message("shift", part // 2, is_beside=True),) * (2 * (n - 1))
    if is_backward(call):
        going_home = (Message("shift", part // 2),) * 2
        messages += ((Message("shift", part // 2, is_beside=True),) * (2 * (n - 2))) + going_home
        traffic += 3.0 * (n - 1) * part
    yield from by_tokens(
        call,
        keys=shard(TOKENS),
        gradients=shard(TOKENS),
        form=_backward if is_backward(call) else _forward,
        messages=messages,
        share=causal_share(n) if is_causal(call) else 1 / n,
        calls=n,
        traffic=traffic,
    )


def _launched(local: Local, values: list[fx.Node]) -> list[fx.Node]:
    """Each value is on its way to the next rank."""
    editor, ranks = local.editor, local.call.ranks
    stem = f"{local.node.name}_{local.axis}_shift"
    sent = [editor.contiguous(value) for value in values]
    return [editor.call(c10d.shift, value, 1, ranks, local.coordinate(), local.axis, name=stem) for value in sent]


def _arrived(local: Local, launches: list[fx.Node]) -> list[fx.Node]:
    return [local.editor.call(c10d.wait, launch, name=f"{launch.name}_part") for launch in launches]


def _coming(local: Local) -> Iterator[Part]:
    """The parts of the other ranks, nearest before first; the first one is on its way when this returns."""
    launches = _launched(local, [argument(local, name) for name in OF_KEYS])
    return _parts_from(local, launches)


def _parts_from(local: Local, launches: list[fx.Node]) -> Iterator[Part]:
    editor, ranks = local.editor, local.call.ranks
    for step in range(1, ranks):
        part = _arrived(local, launches)
        if step < ranks - 1:
            launches = _launched(local, part)
        hidden = None
        if is_causal(local.call):
            reached = editor.call(operator.add, local.coordinate(), ranks - step)
            hidden = hidden_unless(local, editor.call(operator.floordiv, reached, ranks))  # seen from rank `step` on
        yield dict(zip(OF_KEYS, part, strict=True)), hidden


def _forward(local: Local) -> tuple[fx.Node | None, ...]:
    return joined_forward(local, {}, _coming(local))


def _backward(local: Local) -> tuple[fx.Node | None, ...]:
    editor = local.editor
    parts = _coming(local)
    args, kwargs = asked(local)
    with local.made_of(*args, **kwargs) as own:
        queries, *mine = (editor.call(operator.getitem, own, number) for number in range(3))
        travelling: list[fx.Node] = []
        for part in parts:
            of_queries, *found = gradients_of(local, part)
            queries = editor.call(aten.add.Tensor, queries, of_queries)
            travelling = _launched(local, _sums(local, found, travelling))
        return (queries, *_sums(local, mine, travelling))


def _sums(local: Local, found: list[fx.Node], travelling: list[fx.Node]) -> list[fx.Node]:
    """Gradients with what others have found of them, where that is on its way here."""
    arrived = _arrived(local, travelling)
    if not arrived:
        return found
    return [local.editor.call(aten.add.Tensor, one, other) for one, other in zip(found, arrived, strict=True)]
