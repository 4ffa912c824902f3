"""Editing a step graph: new nodes come with their meta, so that no pass has to think of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import RewriteError
from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.call_signature import call_signature, has_symbols
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import AuxiliaryState, Sharding, StateEntry, StepGraph, identifier, yields_scalar

aten = torch.ops.aten

# what yields its first input in another form, which lies over mesh axes as that does
_KEEP_PLACEMENTS = {
    c10d.all_gather,
    c10d.reduce_scatter,
    c10d.all_reduce,
    c10d.wait,
    ops.local_shard,
    aten._to_copy.default,
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.slice.Tensor,
}


def fake_mode(step: StepGraph) -> Any:
    """The fake tensor mode that the values of a graph live in."""
    for node in step.graph.nodes:
        if compat.is_fake(node.meta.get("val")):
            return compat.fake_mode_of(node.meta["val"])
    return compat.new_fake_mode()


def evaluate(node: fx.Node, mode: Any) -> Any:
    """What a call yields, from the `meta["val"]` of its inputs; scalars keep the value that stands there."""
    if "val" in node.meta and yields_scalar(node):
        return node.meta["val"]
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def value_of(step: StepGraph, node: fx.Node, mode: Any) -> Any:
    """The same as `evaluate`; a call like one of before yields the same fake tensors.

    Args:
        step: the graph of the node.
        node: a call.
        mode: `fake_mode` of the graph.
    """
    inputs = [source.meta["val"] for source in node.all_input_nodes]
    if yields_scalar(node) or not all(map(_holds_known_tensors, inputs)):
        return evaluate(node, mode)
    key = call_signature(node, {})
    if key in step.made:
        return step.made[key]
    found = evaluate(node, mode)
    if _holds_known_tensors(found):
        step.made[key] = found
    return found


def _holds_known_tensors(val: Any) -> bool:
    """Whether a value is a tensor, or some of them, of sizes that are known before the step runs."""
    if isinstance(val, (list, tuple)):
        return all(map(_holds_known_tensors, val))
    return isinstance(val, torch.Tensor) and not has_symbols(val)


class Editor:
    """Inserts calls into a step graph, at one place, for one phase and module.

    Args:
        step: the graph.
        phase, module, param: meta of the nodes to come.
    """

    def __init__(self, step: StepGraph, *, phase: str, module: str = "", param: str | None = None) -> None:
        self.step = step
        self.graph = step.graph
        self.mode = fake_mode(step)
        self._coordinates: dict[str, fx.Node] = {}  # a look-up passes over all inputs
        self.meta: dict[str, Any] = {"phase": phase, "module": module}
        if param is not None:
            self.meta["param"] = param

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[Editor]:
        """Insert before `node`."""
        with self.graph.inserting_before(node):
            yield self

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[Editor]:
        """Insert after `node` (after all inputs, where it is one)."""
        if node.op == "placeholder":
            node = self.step.placeholders[-1]
        following = node.next
        with self.graph.inserting_before(following):
            yield self

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        sharding: Sharding | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert one call."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = dict(self.meta)
        if sharding is not None:
            node.meta["sharding"] = sharding
        node.meta["val"] = value_of(self.step, node, self.mode)
        placements = _kept_placements(node)
        if placements is not None:
            node.meta["placements"] = placements
        return node

    def all_gather(self, shard: fx.Node, sharding: Sharding, *, stem: str) -> tuple[fx.Node, fx.Node]:
        """Gather the rows of all shards of an axis.

        Returns:
            The wait node (what must be released) and the node with exactly the rows of the single-device tensor.
        """
        gathered = self.call(c10d.all_gather, shard, sharding.num_shards, sharding.axis, name=f"{stem}_gather")
        waited = self.call(c10d.wait, gathered, name=f"{stem}_full")
        if sharding.padded_rows == sharding.rows:
            return waited, waited
        return waited, self.call(aten.slice.Tensor, waited, 0, 0, sharding.rows, name=f"{stem}_rows")

    def reduce_scatter(self, full: fx.Node, sharding: Sharding, *, op: str, stem: str) -> fx.Node:
        """Reduce over an axis and keep this rank's rows; pads where the rows do not divide."""
        full = self.contiguous(self.pad_rows(full, sharding))
        reduced = self.call(
            c10d.reduce_scatter,
            full,
            op,
            sharding.num_shards,
            sharding.axis,
            name=f"{stem}_reduce",
            sharding=sharding,
        )
        return self.call(c10d.wait, reduced, name=f"{stem}_shard", sharding=sharding)

    def all_reduce(self, full: fx.Node, axis: str, *, op: str, stem: str, sharding: Sharding | None = None) -> fx.Node:
        """Reduce over an axis; every rank of it has the result."""
        reduced = self.call(c10d.all_reduce, self.contiguous(full), op, axis, name=f"{stem}_reduce", sharding=sharding)
        return self.call(c10d.wait, reduced, name=f"{stem}_{'mean' if op == 'avg' else op}", sharding=sharding)

    def local_shard(self, full: fx.Node, sharding: Sharding, *, stem: str) -> fx.Node:
        """This rank's rows of a replicated value."""
        if sharding.axis not in self._coordinates:
            self._coordinates[sharding.axis] = coordinate(self.step, sharding.axis)
        index = self._coordinates[sharding.axis]
        return self.call(ops.local_shard, full, sharding.num_shards, index, name=f"{stem}_local", sharding=sharding)

    def pad_rows(self, full: fx.Node, sharding: Sharding) -> fx.Node:
        """Append zero rows until every shard has as many."""
        missing = sharding.padded_rows - sharding.rows
        if not missing:
            return full
        padding = [0, 0] * (full.meta["val"].dim() - 1) + [0, missing]
        return self.call(aten.constant_pad_nd.default, full, padding)

    def with_strides(self, node: fx.Node, strides: tuple[int, ...]) -> fx.Node:
        """The node, or a copy of it whose memory has its dims in the order of these strides (without holes)."""
        if node.meta["val"].stride() == strides:
            return node
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        inner = self.contiguous(self.call(aten.permute.default, node, order))
        return self.call(aten.permute.default, inner, [order.index(dim) for dim in range(len(order))])

    def viewed(self, node: fx.Node, shape: list[int]) -> fx.Node:
        """A tensor in this shape, without a call where it has it."""
        return node if list(node.meta["val"].shape) == shape else self.call(aten.view.default, node, shape)

    def contiguous(self, node: fx.Node) -> fx.Node:
        """The node, or a contiguous copy where it is strided otherwise (collectives need it)."""
        if node.meta["val"].is_contiguous():
            return node
        return self.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _kept_placements(node: fx.Node) -> dict[str, Any] | None:
    """How a value lies over mesh axes that is another one's rows, copy, or sum over an axis of batches; else None."""
    source = node.args[0] if node.target in _KEEP_PLACEMENTS else None
    found = source.meta.get("placements") if isinstance(source, fx.Node) else None
    if found is None or (c10d.is_collective(node) and c10d.moves_parts(node)):
        return None
    return dict(found)


def coordinate(step: StepGraph, axis: str) -> fx.Node:
    """The input that holds this rank's index on a mesh axis, made when it is first needed."""
    found = step.input("coordinate", axis)
    if found is not None:
        return found
    with step.graph.inserting_after(step.placeholders[-1]):
        node = step.graph.placeholder(f"{axis}_index")
    node.meta = {"entry": StateEntry("coordinate", axis), "val": 0, "phase": "forward", "module": ""}
    return node


def auxiliary_input(step: StepGraph, state: AuxiliaryState, axis: str) -> fx.Node:
    """The input that holds what a pass keeps from step to step, made when it is first needed.

    Args:
        step: the graph.
        state: what it is; where it is sharded, over `axis`, whose ranks divide its rows.
        axis: a mesh axis.
    """
    found = step.input(*state.entry.key)
    if found is not None:
        return found
    sharding = Sharding(axis, step.mesh[axis], state.shape[0]) if state.sharded else None
    shape = state.shape if sharding is None else (state.shape[0] // sharding.num_shards, *state.shape[1:])
    device = next(node.meta["val"].device for node in step.inputs("parameter"))
    with step.graph.inserting_after(step.placeholders[-1]):
        node = step.graph.placeholder(identifier(state.name))
    with fake_mode(step):
        val = torch.empty(shape, dtype=state.dtype, device=device)
    node.meta = {"entry": state.entry, "val": val, "phase": "forward", "module": ""}
    if sharding is not None:
        node.meta["sharding"] = sharding
    return node


def move_launch(launch: fx.Node, *, before: fx.Node) -> None:
    """Put the launch of a collective elsewhere, together with what makes its messages of inputs, for it alone."""
    for source in launch.all_input_nodes:
        steps = []
        while source.target in c10d.PREPARES and len(source.users) == 1:
            steps.append(source)
            source = source.all_input_nodes[0]
        if source.op == "placeholder":
            for node in reversed(steps):
                before.prepend(node)
    before.prepend(launch)


def reorder(step: StepGraph, order: Sequence[fx.Node]) -> int:
    """Let all calls stand in this order, behind the inputs; returns how many have another place."""
    moved = sum(before is not node for before, node in zip(step.calls(), order, strict=True))
    for anchor, node in itertools.pairwise([*step.placeholders[-1:], *order]):
        if anchor.next is not node:
            anchor.append(node)
    return moved


def replace_uses(old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> int:
    """Let `users` read `new` where they read `old`; returns how many did."""
    count = 0
    for user in list(users):
        if old in user.all_input_nodes:
            user.replace_input_with(old, new)
            count += 1
    return count


def retype(step: StepGraph, start: Iterable[fx.Node]) -> None:
    """Recompute `meta["val"]` of everything computed from `start` (whose own values have changed)."""
    mode = fake_mode(step)
    dirty = set(start)
    for node in step.graph.nodes:
        if node.op != "call_function" or node in dirty or not any(n in dirty for n in node.all_input_nodes):
            continue
        try:
            new = value_of(step, node, mode)
        except Exception as error:
            raise RewriteError.of(
                where=f"{node.name} = {node.target}",
                expected="an op that takes the shapes that its inputs have now",
                got=str(error).splitlines()[0],
                fix="report this graph: the pass placed a shard where a whole tensor is needed",
            ) from error
        if describe(new) != describe(node.meta.get("val")):
            node.meta["val"] = new
            dirty.add(node)


def describe(val: Any) -> Any:
    """What must agree between two evaluations of a node: dtype, shape, strides, device, or the scalar's type."""
    if isinstance(val, torch.Tensor):
        return (val.dtype, tuple(val.shape), tuple(val.stride()), val.device.type)
    if isinstance(val, (list, tuple)):
        return [describe(item) for item in val]
    return type(val).__name__


def erase_dead(step: StepGraph) -> int:
    """Erase calls whose value nobody reads and that have no effect beyond it; returns how many."""
    removed = 0
    for node in reversed(step.calls()):
        if not node.users and not keeps_effect(node):
            step.graph.erase_node(node)
            removed += 1
    return removed


def keeps_effect(node: fx.Node) -> bool:
    """Whether a call matters beyond its value: it draws random numbers, or has no value at all (release)."""
    if not compat.is_op(node.target):
        return False
    return is_random(node) or (not node.target._schema.returns and node.target.namespace != "profiler")
