"""Attention: each rank has some rows of the batch, some heads, or some tokens (`token_attention.py`).

Heads may be blocks that another axis takes apart later: each rank then has a part of every block.
Grouped queries keep their group: ranks that divide the heads of keys and values have whole groups. Where there are
fewer of those than ranks, each rank takes the one that its queries ask.
Source: Megatron-LM (Shoeybi et al., 2019), section 3; GQA (Ainslie et al., 2023).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fxzero import compat
from fxzero.graph import ops
from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.ring_attention import ring_attention
from fxzero.sharding.strategy import Call, Local, Strategy, Tensor, fits, replicated
from fxzero.sharding.token_attention import gathered_attention

_BATCH, _HEADS = 0, 1
_MASKS = ("attn_mask", "attn_bias")
_KEYS = ("key", "value")


def is_attention(target: Any) -> bool:
    """Whether an op is attention, forward or backward."""
    return compat.is_op(target) and "scaled_dot_product" in target.name()


def attention(call: Call) -> Iterator[Strategy]:
    """The ways of `_scaled_dot_product_*_attention*`, forward and backward; with dropout all ranks do all."""
    if call.attention == "auto":
        yield replicated(call)
    if call.argument("dropout_p", 0.0):
        return
    if call.attention != "auto":
        yield from FORMS[call.attention](call)
        return
    rows = _split(call, _BATCH)
    if fits(call, rows):
        yield rows
    for form in FORMS.values():
        yield from form(call)


def _by_heads(call: Call) -> Iterator[Strategy]:
    by_heads = (_split(call, _HEADS, blocks) for blocks in (call.head_blocks, 1))
    heads = next((strategy for strategy in by_heads if fits(call, strategy)), None)
    if heads is not None:
        yield heads
    shared = _shared_heads(call)
    if shared is not None:
        yield shared


# how a row that is split on tokens is attended, as a plan names it
FORMS: dict[str, Callable[[Call], Iterator[Strategy]]] = {
    "heads": _by_heads,
    "gather": gathered_attention,
    "ring": ring_attention,
}


def _named(call: Call) -> list[tuple[str, Tensor]]:
    """(name of the argument, tensor) of all tensors."""
    names = [argument.name for argument in call.target._schema.arguments]
    pairs = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return [(name, value) for name, value in pairs if isinstance(value, Tensor)]


def _lies(name: str, tensor: Tensor, dim: int, whole: tuple[int, ...], blocks: int) -> Placement:
    """How one of the tensors lies where queries are split on a dim of so many blocks."""
    if len(tensor.shape) < 3:
        return REPLICATED  # state of a generator, lengths
    if name in _MASKS:
        at = len(tensor.shape) - 4 + dim
        return shard(at, blocks) if at >= 0 and tensor.shape[at] == whole[dim] > 1 else REPLICATED
    return shard(dim, blocks)


def _split(call: Call, dim: int, blocks: int = 1) -> Strategy:
    named = _named(call)
    whole = next(tensor.shape for name, tensor in named if name == "query")
    inputs = tuple(_lies(name, tensor, dim, whole, blocks) for name, tensor in named)
    outputs = tuple(
        None if tensor is None else _lies("", tensor, dim, whole, blocks) if len(tensor.shape) >= 3 else REPLICATED
        for tensor in call.outputs
    )
    return Strategy(inputs, outputs, share=1 / call.ranks)


def _shared_heads(call: Call) -> Strategy | None:
    """Ranks that share a head of keys and values: each has it whole, and a part of its gradient."""
    named = _named(call)
    heads = {name: tensor.shape[_HEADS] for name, tensor in named if name in ("query", *_KEYS)}
    few = heads["key"]
    if heads["query"] % call.ranks or heads["value"] != few or few >= call.ranks or call.ranks % few:
        return None
    split = _split(call, _HEADS)
    inputs = tuple(
        REPLICATED if name in _KEYS else placement for (name, _), placement in zip(named, split.inputs, strict=True)
    )
    outputs = list(split.outputs)
    backward = "backward" in str(call.target)
    if backward and any(output is None or output.shape[_HEADS] != few for output in call.outputs[1:3]):
        return None  # an op that knows no groups of queries
    if backward:
        outputs[1] = outputs[2] = partial()

    def form(local: Local) -> tuple[fx.Node | None, ...]:
        editor = local.editor
        index = editor.call(operator.floordiv, local.coordinate(), call.ranks // few)
        named_args = [argument.name for argument in call.target._schema.arguments]
        args = list(local.args)
        for name in _KEYS:
            at = named_args.index(name)
            args[at] = editor.call(ops.local_part, args[at], _HEADS, few, index)
        found = editor.call(call.target, *args, **local.kwargs)
        parts = list(local.yielded(found))
        for number in (1, 2) if backward else ():
            parts[number] = editor.call(ops.put_part, parts[number], _HEADS, few, index)
        return tuple(parts)

    strategy = Strategy(inputs, tuple(outputs), form, share=1 / call.ranks)
    return strategy if fits(call, strategy) else None
