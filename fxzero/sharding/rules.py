"""All ways in which the ranks of an axis can make a call together: our rules where DTensor has none, else DTensor's.

What neither knows is done by every rank, whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import fx

from fxzero import compat, compat_sharding
from fxzero.graph import routing_ops, row_exchange_ops
from fxzero.graph.call_signature import call_signature
from fxzero.graph.randomness import draws
from fxzero.graph.step_graph import yields_scalar
from fxzero.sharding import (
    attention,
    convolutions,
    elementwise,
    experts,
    group_norms,
    joined,
    losses,
    norms,
    other_axes,
    reductions,
    vocabulary,
)
from fxzero.sharding import draws as random_draws
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.exchanged_rows import by_all_to_all
from fxzero.sharding.routing import Routing
from fxzero.sharding.strategy import Call, Strategy, replicated, with_blocks
from fxzero.sharding.views import VIEWS, views

aten = torch.ops.aten

Rule = Callable[[Call], Iterable[Strategy]]


@functools.cache
def own_rules() -> dict[str, Rule]:
    """Name of an op -> our rule, where DTensor has none or knows fewer ways."""
    rules: dict[str, Rule] = {
        "aten::_log_softmax": vocabulary.log_softmax,
        "aten::_log_softmax_backward_data": vocabulary.log_softmax_backward,
        "aten::nll_loss_forward": vocabulary.nll_loss,
        "aten::nll_loss_backward": vocabulary.nll_loss_backward,
        "aten::mse_loss": losses.loss,
        "aten::smooth_l1_loss": losses.loss,
        "aten::huber_loss": losses.loss,
        "aten::binary_cross_entropy": losses.loss,
        "aten::binary_cross_entropy_with_logits": losses.loss,
        "aten::mse_loss_backward": losses.loss_backward,
        "aten::smooth_l1_loss_backward": losses.loss_backward,
        "aten::huber_loss_backward": losses.loss_backward,
        "aten::binary_cross_entropy_backward": losses.loss_backward,
        "aten::embedding": vocabulary.embedding,
        "aten::embedding_dense_backward": vocabulary.embedding_backward,
        "aten::cat": joined.cat,
        "aten::split": joined.split,
        "aten::split_with_sizes": joined.split,
        "aten::slice": joined.slice_of,
        "aten::slice_backward": joined.slice_backward,
        "aten::clone": elementwise.clone,
        "aten::where.self": elementwise.where,
        "aten::masked_fill.Scalar": elementwise.masked_fill,
        "aten::mean": reductions.mean,
        "aten::amax": reductions.amax,
        "aten::convolution": convolutions.convolution,
        "aten::convolution_backward": convolutions.convolution_backward,
        "aten::native_group_norm": group_norms.group_norm,
        "aten::native_group_norm_backward": group_norms.group_norm_backward,
        "aten::linalg_vector_norm": norms.vector_norm,
        "aten::stack": norms.stack,
        "fxzero::nonfinite": norms.nonfinite,
        "aten::native_dropout": random_draws.dropout,
        "transformers::grouped_mm_fallback": experts.grouped_mm,
        "transformers::grouped_mm_fallback_backward": experts.grouped_mm_backward,
        "aten::_grouped_mm": experts.grouped_mm,
    }
    rules |= {op.name(): random_draws.draws_like for op in random_draws.LIKE}
    rules |= dict.fromkeys(VIEWS, views)
    rules |= {op.name(): elementwise.elementwise for op in elementwise.UNKNOWN_TO_DTENSOR}
    rules |= other_axes.rules()
    rules |= {op.name(): experts.rows_of_experts for op in (*routing_ops.OPS, *row_exchange_ops.OPS)}
    rules["aten::view.dtype"] = by_dtensor  # which is no view in another shape
    return rules


class Rules:
    """What rules say of the calls of a step over one axis; equal calls are asked for once.

    Args:
        ranks: of the axis.
        head_blocks, attention: as of `Call`.

    Attributes:
        routing: which values are rows that are sorted by expert; none until it is set.
        unknown: ops that no rule knows, with how many distinct calls they are.
    """

    def __init__(self, ranks: int, *, head_blocks: int = 1, attention: str = "auto") -> None:
        self.ranks, self.head_blocks, self.attention = ranks, head_blocks, attention
        self.routing = Routing()
        self.unknown: dict[str, int] = {}
        self._known: dict[Hashable, tuple[Strategy, ...]] = {}
        self._signatures: dict[fx.Node, Hashable] = {}

    def signature(self, node: fx.Node) -> Hashable:
        """What the ways of a call depend on."""
        found = call_signature(node, self._signatures)
        return (found, self.routing.key(node)) if self.routing.ends else found

    def of(self, node: fx.Node, blocks: tuple[int, ...] = (1,)) -> tuple[Strategy, ...]:
        """The ways of a call whose inputs and value are whole; the first is that every rank does all of it.

        Attention that has to be made in a form has the ways of that form alone, if it has any.

        Args:
            node: the call.
            blocks: numbers of blocks that shards may have; 1 first.
        """
        of_step = tuple(map(yields_scalar, node.all_input_nodes))
        key = self.signature(node), of_step, blocks
        if key not in self._known:
            call = Call.of(node, self.ranks, blocks=blocks, head_blocks=self.head_blocks, attention=self.attention)
            plain = tuple(self._asked(call))
            self._known[key] = self._with_routed(node, plain) if self.routing.ends else plain
        return self._known[key]

    def _with_routed(self, node: fx.Node, plain: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        return (*self.routing.ways(node, plain), *by_all_to_all(node, self.routing))

    def _asked(self, call: Call) -> Iterator[Strategy]:
        found: dict[Hashable, Strategy] = {}
        told = tuple(_told(call))
        pinned = self.attention != "auto" and attention.is_attention(call.target)
        for strategy in told if pinned and told else (replicated(call), *told):
            found.setdefault((strategy.inputs, strategy.outputs), strategy)
        if call.tensors and call.blocks == (1,) and not _has_rule(call):
            name = str(call.target)
            self.unknown[name] = self.unknown.get(name, 0) + 1
        return iter(found.values())


def _has_rule(call: Call) -> bool:
    return not compat.is_op(call.target) or _rule_of(call) is not None or compat_sharding.knows(call.target)


def _rule_of(call: Call) -> Rule | None:
    name = call.target.name()
    if attention.is_attention(call.target):
        return attention.attention
    rules = own_rules()
    return rules.get(name) or rules.get(name.split(".")[0])


def _told(call: Call) -> Iterator[Strategy]:
    if not compat.is_op(call.target) or not call.tensors:
        return
    found = [_with_share(call, strategy) for strategy in _ways(call) if _adds_up(call, strategy)]
    yield from found
    for blocks in call.blocks[1:]:
        yield from filter(None, (with_blocks(call, strategy, blocks) for strategy in found))


def _ways(call: Call) -> Iterable[Strategy]:
    rule = _rule_of(call)
    if rule is not None:
        return rule(call)
    if draws(call.target, call.args, call.kwargs):
        return ()  # what each rank drew for its part would be other numbers than one device draws
    return by_dtensor(call)


def _adds_up(call: Call, strategy: Strategy) -> bool:
    """Whether what is to be reduced can be: truth values cannot."""
    placed = [*zip(call.tensors, strategy.inputs, strict=True), *zip(call.outputs, strategy.outputs, strict=True)]
    reduced = {tensor.dtype for tensor, lies in placed if tensor is not None and lies is not None and lies.is_partial}
    return torch.bool not in reduced


def _with_share(call: Call, strategy: Strategy) -> Strategy:
    """With the part of the work that a rank has, where it takes or yields parts."""
    split = any(p is not None and p.is_shard for p in (*strategy.inputs, *strategy.outputs))
    return dataclasses.replace(strategy, share=1 / call.ranks) if split and strategy.form is None else strategy
