"""Where a functional op may write over its first input: liveness is known here, so memory is used once.

[Note: in place]
The graph is functional; its program need not be. A pointwise op whose first input has the output's layout and is
read by nothing afterwards, under any name that shares its memory, runs as its in-place form; so does a matrix product
that is added to such an input. An updated parameter
or optimizer state so comes to stand in the memory of the old one and needs no copy: the same in-place ops, in the
same order, that eager optimizers run. A tensor that is being moved or sent is read until that is waited for. A
region writes over state that goes into it, and hands out other values in memory of their own. An update of many tensors
by one op (`update_ops`) writes over all of them, or copies all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import collectives as c10d
from fxzero.graph import ops, swap_ops, update_ops
from fxzero.graph.regions import region_of
from fxzero.graph.step_graph import CARRIED_KINDS, STATE_KINDS, StepGraph, is_getitem, is_view, yields_tensor

aten = torch.ops.aten

# outputs of these are memory of their own (pointwise ops aside, which the tag tells)
_FRESH = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mean.dim, aten.sum.dim_IntList}
_FRESH |= {swap_ops.swap_in, swap_ops.swap_out}


class InPlace:
    """The in-place decisions for one graph, in program order.

    Attributes:
        forms: node -> the in-place op to call instead of `node.target`.
        storage: node -> the node whose memory it lives in.
        last_use: storage -> position after which nothing reads that memory.
        written_after: node of `forms` -> the calls that are done with that memory before it writes there.
    """

    def __init__(self, step: StepGraph) -> None:
        self.position = step.positions()
        self.storage: dict[fx.Node, fx.Node] = {}
        self.forms: dict[fx.Node, Any] = {}
        self.written_after: dict[fx.Node, list[fx.Node]] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        returned = step.results
        self._writable = {node for node in step.inputs(*STATE_KINDS) if node.meta["entry"].key in returned}
        self._writable |= {*step.inputs(*CARRIED_KINDS)}  # handed over: nobody else will read them
        self._natural = self._natural_storage(step)
        for node in step.graph.nodes:
            root = self._root(node)
            form = self._form(node)
            if form is not None:
                self.forms[node] = form
            if form is not None and not update_ops.written(node):
                root = self.storage[node.args[0]]  # type: ignore[index]
            self.storage[node] = root
            self.members.setdefault(root, []).append(node)
        self.last_use = {root: self._last(members) for root, members in self.members.items()}

    def last_reading(self, root: fx.Node) -> int:
        """The position after which the program neither reads nor writes a storage, what it returns aside."""
        return max((self.position[node] for node in self.reading(root)), default=0)

    def reading(self, root: fx.Node) -> Iterator[fx.Node]:
        """The nodes at which the program makes or is done with what lives in a storage, what it returns aside."""
        for member in self.members[root]:
            yield member
            yield from (done_with(user) for user in member.users if user.op != "output")

    def read_until(self, user: fx.Node) -> int:
        """The position at which a reader is done with what it reads."""
        return self.position[done_with(user)]

    def _natural_storage(self, step: StepGraph) -> dict[fx.Node, list[fx.Node]]:
        """Root -> every node that shares its memory through views, written or not."""
        groups: dict[fx.Node, list[fx.Node]] = {}
        root: dict[fx.Node, fx.Node] = {}
        for node in step.graph.nodes:
            source = aliased(node)
            root[node] = root[source] if source is not None else node
            groups.setdefault(root[node], []).append(node)
        self._natural_root = root
        return groups

    def _root(self, node: fx.Node) -> fx.Node:
        source = self.written_by(node) or aliased(node)
        return self.storage[source] if source is not None else node

    def written_by(self, node: fx.Node) -> fx.Node | None:
        """The tensor in whose memory a part of what an update of many yields stands, where that runs in place."""
        if not is_getitem(node) or node.args[0] not in self.forms:
            return None
        written, place = update_ops.written(node.args[0]), node.args[1]  # type: ignore[arg-type]
        return written[place] if place < len(written) else None  # type: ignore[operator, index]

    def _last(self, members: list[fx.Node]) -> int:
        return max((self.position[user] for member in members for user in member.users), default=-1)

    def _form(self, node: fx.Node) -> Any:
        """The in-place op for `node`, or None."""
        if written := update_ops.written(node):
            return update_ops.IN_PLACE[node.target][0] if self._may_write(node, written) else None
        form = _in_place_form(node)
        if form is None:
            return None
        first = node.args[0]
        assert isinstance(first, fx.Node)
        if not _same_layout(first, node) or (aliased(first) is not None and not swap_ops.is_wait(first)):
            return None
        root = self.storage[first]
        if root.op == "placeholder" and root not in self._writable:
            return None
        if first is not root and first not in self.forms and not swap_ops.is_wait(first):
            return None
        if root.op != "placeholder" and (not _is_fresh(root) or region_of(root) != region_of(node)):
            return None
        sharing = {*self.members.get(root, ())}
        for member in list(sharing):
            sharing.update(self._natural[self._natural_root[member]])
        here = self.position[node]
        if any(self.read_until(user) > here for member in sharing for user in member.users):
            return None
        if any(n is not first and n in sharing for n in node.all_input_nodes):
            return None
        if region_of(node) is not None and not _is_one_input(sharing, region_of(node)):
            return None
        readers = {done_with(user): None for member in sharing for user in member.users if user is not node}
        self.written_after[node] = [reader for reader in readers if reader is not node]
        return form

    def _may_write(self, node: fx.Node, written: list[fx.Node]) -> bool:
        """Whether a call may write over all of these: state, or rows of it, that nothing reads behind it."""
        roots = [self.storage[source] for source in written]
        sharing = {member for root in roots for member in (*self.members.get(root, ()), *self._natural[root])}
        if len({*roots}) < len(roots) or not all(root is source for root, source in zip(roots, written, strict=True)):
            return False
        if not all(root in self._writable or root.target is ops.local_shard for root in roots):
            return False
        here = self.position[node]
        readers = {done_with(user): None for member in sharing for user in member.users if user is not node}
        self.written_after[node] = list(readers)
        return all(self.position[reader] < here for reader in readers)


def _is_one_input(sharing: set[fx.Node], region: int | None) -> bool:
    """Whether memory goes into a region under one name: a compiler takes inputs for apart."""
    outside = (member for member in sharing if region_of(member) != region)
    return sum(any(region_of(user) == region for user in member.users) for member in outside) <= 1


def done_with(user: fx.Node) -> fx.Node:
    """The node at which a reader is done with what it reads: of a move, its wait; also where a part is passed on."""
    if user.target is c10d.shift:
        return next(filter(c10d.is_wait, user.users), user)
    return swap_ops.wait_of(user) if swap_ops.is_launch(user) else user


def aliased(node: fx.Node) -> fx.Node | None:
    """The input whose memory a node's value lives in: of a view, a wait, or one of several values."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if is_view(node) or c10d.is_wait(node) or is_getitem(node):
        return node.all_input_nodes[0]
    return None


def _is_fresh(node: fx.Node) -> bool:
    target: Any = node.target
    if not compat.is_op(target):
        return False
    return not is_view(node) and (torch.Tag.pointwise in target.tags or target in _FRESH)


def _in_place_form(node: fx.Node) -> Any:
    target: Any = node.target
    if not compat.is_op(target) or target.namespace != "aten" or not node.args:
        return None
    adds = target is aten.addmm.default and node.args[0] not in node.args[1:]  # else it reads what it has written
    if not (adds or torch.Tag.pointwise in target.tags) or not isinstance(node.args[0], fx.Node) or is_view(node):
        return None
    packet = getattr(aten, target._schema.name.removeprefix("aten::") + "_", None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    return getattr(packet, target._overloadname)


def _same_layout(a: object, b: fx.Node) -> bool:
    if not isinstance(a, fx.Node) or not yields_tensor(a) or not yields_tensor(b):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return (x.dtype, x.shape, x.stride(), x.device) == (y.dtype, y.shape, y.stride(), y.device)
