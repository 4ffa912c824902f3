"""Tokens that reach the experts of other ranks by all-to-all, and what these yield that comes back.

[Note: two ways to experts]
Where tokens lie in parts, `x[wanted]`, which yields rows of experts, can be made of gathered tokens, of which each rank
takes its own rows; or each rank sends the rows that others ask it for. So can its gradient, which adds rows of experts
to tokens' parts; and the same holds of `rows[wanted]`, in which each assignment asks for its row of experts, and of its
gradient. With T tokens of k assignments over n ranks and room for f times an even load, a gather moves (n - 1) / n of T
rows to a rank, and the messages (n - 1) / n of f k T / n. So these are offered where a plan says how much room there is
([Note: room for rows] in `expert_room.py`), and cost decides. `wanted` and `ends` are whole: a number for each row.
Source: GShard (Lepikhin et al., 2021), section 3.2, for the messages; that they are of one size here, and that nobody
sends counts, is [Note: rows by all-to-all] in graph/row_exchange_ops.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, divides, local_shape, shard
from fxzero.graph.row_exchange_ops import add_rows, pick_rows, places_received, rows_to_send
from fxzero.graph.step_graph import num_bytes
from fxzero.sharding.routing import Routing, adds_to_zeros
from fxzero.sharding.strategy import Local, Message, Strategy

aten = torch.ops.aten

_CALLS = 4  # numbers of rows, what is sent, and what becomes of what comes
_NUMBERS_TRAFFIC = 6 * 16.0  # bytes for each slot: a dozen passes over 8-byte numbers, for a call and its gradient


@dataclass(frozen=True)
class _Asked:
    """A call that asks for rows, or adds to those that one asks for.

    Args:
        tensor: has the rows, or is what slots add to.
        slots: has a row for each slot.
        wanted: which row each slot asks for.
        by_expert: whether slots lie by expert; else the rows do.
    """

    tensor: fx.Node
    slots: fx.Node
    wanted: fx.Node
    by_expert: bool


def by_all_to_all(node: fx.Node, routing: Routing) -> Iterator[Strategy]:
    """The way of a call in which rows are sent to those that ask for them; none for others.

    Args:
        node: the call.
        routing: of the step.
    """
    asked = _asked(node, routing)
    if asked is None:
        return
    room = routing.pair_room(asked.wanted.meta["val"].shape[0])
    val = (asked.tensor if asked.by_expert else asked.slots).meta["val"]  # in equal parts
    if not room or not divides(val.shape, shard(0), routing.ranks) or val.dtype is torch.bool:
        return
    of_experts = routing.lies(asked.slots if asked.by_expert else asked.tensor, 0)
    rows_lie, slots_lie = (shard(0), of_experts) if asked.by_expert else (of_experts, shard(0))
    rows, slots = asked.tensor.meta["val"].shape, asked.slots.meta["val"].shape
    own_rows, own_slots = (
        local_shape(shape, lies, routing.ranks)[0] for shape, lies in ((rows, rows_lie), (slots, slots_lie))
    )
    move = _Move(own_rows, own_slots, rows[0], room, asked.by_expert)
    sent = routing.ranks * room * num_bytes(val) // val.shape[0]
    costs: dict[str, Any] = {
        "messages": (Message("all_to_all", sent),),
        "share": slots_lie.share(routing.ranks),
        "calls": _CALLS,
        "traffic": 2.0 * sent + _NUMBERS_TRAFFIC * slots[0],
    }
    if node.target is aten.index.Tensor:
        yield Strategy((rows_lie, REPLICATED), (slots_lie,), form=move.picks, **costs)
        return
    yield Strategy((REPLICATED, REPLICATED, slots_lie), (rows_lie,), form=move.adds, **costs)


def _asked(node: fx.Node, routing: Routing) -> _Asked | None:
    """Whose rows a call asks for; None of a call that does not, or on one side of which nothing lies by expert."""
    if node.target is not aten.index.Tensor and not adds_to_zeros(node):
        return None
    indices: Any = node.args[1]
    wanted = indices[0]
    if len(indices) != 1 or not isinstance(wanted, fx.Node) or wanted.meta["val"].dtype is not torch.int64:
        return None
    is_index = node.target is aten.index.Tensor
    tensor, slots = (node.args[0], node) if is_index else (node, node.args[2])
    assert isinstance(tensor, fx.Node) and isinstance(slots, fx.Node)
    wanted_shape, row = wanted.meta["val"].shape, tensor.meta["val"].shape[1:]
    by_expert = (slots, 0) in routing.ends
    if by_expert == ((tensor, 0) in routing.ends) or slots.meta["val"].shape != (*wanted_shape, *row):
        return None
    return _Asked(tensor, slots, wanted, by_expert) if len(wanted_shape) == 1 else None


@dataclass(frozen=True)
class _Move:
    """Makes what one rank does of a call whose rows move.

    Args:
        own_rows, own_slots: how many rows and slots a rank has.
        rows: how many all have.
        room: for how many of them there is room from one rank to another.
        by_expert: as of `_Asked`.
    """

    own_rows: int
    own_slots: int
    rows: int
    room: int
    by_expert: bool

    def picks(self, local: Local) -> tuple[fx.Node | None, ...]:
        """The form of `x[wanted]`."""
        x, (wanted,) = local.args
        sends, places = self._numbers(local, wanted, local.node if self.by_expert else local.node.args[0])
        came = self._exchanged(local, local.editor.call(pick_rows, x, sends))
        return (local.editor.call(pick_rows, came, places),)

    def adds(self, local: Local) -> tuple[fx.Node | None, ...]:
        """The form of an `index_put` that adds rows to zeros: its own."""
        _, (wanted,), values, _ = local.args
        sends, places = self._numbers(local, wanted, local.node.args[2] if self.by_expert else local.node)
        sent = local.editor.call(add_rows, values, places, local.call.ranks * self.room)
        return (local.editor.call(add_rows, self._exchanged(local, sent), sends, self.own_rows),)

    def _numbers(self, local: Local, wanted: fx.Node, routed: Any) -> tuple[fx.Node, fx.Node]:
        how = (local.ends(routed), local.call.ranks, local.coordinate(), self.rows, self.room, self.by_expert)
        return _once(local, rows_to_send, wanted, *how), _once(local, places_received, wanted, *how, self.own_slots)

    def _exchanged(self, local: Local, sent: fx.Node) -> fx.Node:
        splits, stem = [self.room] * local.call.ranks, f"{local.node.name}_{local.axis}"
        launch = local.editor.call(c10d.all_to_all, sent, splits, splits, local.axis, name=f"{stem}_exchange")
        to = ("ranks of its experts", "ranks of its tokens")
        forth = self.by_expert == (local.node.target is aten.index.Tensor)
        launch.meta["because"] = f"each row goes to the {to[0] if forth else to[1]}"
        return local.editor.call(c10d.wait, launch, name=f"{stem}_received")


def _once(local: Local, target: Any, wanted: fx.Node, *args: Any) -> fx.Node:
    """A call on row numbers; the one that is there already, if one is: backward moves what forward has moved."""
    known = (user for user in wanted.users if user.target is target and user.args == (wanted, *args))
    return next(known, None) or local.editor.call(target, wanted, *args)
