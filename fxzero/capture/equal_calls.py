"""Calls that are traced once for all arguments of one kind; for further arguments their nodes are copied.

[Note: equal calls]
An optimizer runs the same few ops for each of hundreds of parameters, and tracing an op takes a millisecond. So what is
traced for the first arguments of a kind is recorded, and where tracing would come to others of that kind, its nodes are
created again with their inputs exchanged. That happens in the trace in progress, so that the trace is, node for node,
the one that tracing everything gives: in its order, with its names (nodes that nothing reads are copied too, since
names were spent on them), with symbols of their own for numbers read from tensors, and what is asked of these numbers.

A kind holds all that a trace can depend on: dtype, shape, strides and device of each argument, the present values of
0-dim host tensors (branches depend on them), and what the caller adds. Not copied is what has complex arguments (their
views are written back only at the end of the trace), symbols in its shapes, arguments that share memory, or what
reads anything but its arguments and what the caller names as common to all calls.

What a trace asks about common numbers ("is there weight decay?") it asks once: the answer is a guard, and torch may put
a number for the symbol from then on. So a recording serves only while no such question has come up since it was begun;
else the next call is traced and recorded anew. Guards of a copy's own numbers then are those of the recording, renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeGuard

from fxzero import compat
from fxzero.capture.scalars import Read, ScalarReader, is_literal
from fxzero.capture.specialise import has_symbols, stem_of
from fxzero.capture.traced_values import constant_like, memory_of, node_of, value_like

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class _Recording:
    """What a call has added to a trace.

    Args:
        inputs: the nodes of its arguments.
        nodes: that it made, in order.
        outputs: name -> (node, the tensor that it is).
        reads: numbers read from tensors.
        guards: what was asked of these.
        num_common: how many guards there were then of other numbers, its own among them.
        writes_more: it has written to arguments that it does not return.
    """

    inputs: tuple[fx.Node | None, ...]
    nodes: tuple[fx.Node, ...]
    outputs: dict[Any, tuple[fx.Node | None, torch.Tensor]]
    reads: tuple[Read, ...]
    guards: tuple[ShapeGuard, ...]
    num_common: int
    writes_more: bool

    def can_be_copied(self, common: Iterable[fx.Node | None]) -> bool:
        """Whether it reads only arguments, literals and what is common to all calls, and returns what it writes."""
        if self.writes_more:
            return False
        known = {*self.inputs, *self.nodes, *common}
        if not all(known.issuperset(node.all_input_nodes) for node in self.nodes):
            return False
        if not all(node in known for node, _ in self.outputs.values()):
            return False
        return all(is_literal(node) for node in self.nodes if node.op == "get_attr")


class EqualCalls:
    """Calls within one trace; see [Note: equal calls].

    Args:
        reader: of the trace.
        copies: whether nodes are copied at all; if not, each call is traced.
    """

    def __init__(self, reader: ScalarReader, *, copies: bool = True) -> None:
        self.reader = reader
        self.copies = copies
        self._recorded: dict[Hashable, _Recording | None] = {}
        self._num_own = 0  # guards of numbers that one call has read for itself

    def each(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Mapping[Key, tuple[torch.Tensor, ...]],
        *,
        common: Sequence[torch.Tensor] = (),
    ) -> dict[Key, torch.Tensor]:
        """`function(*own, *common)` for each key, as a loop would have traced it.

        Args:
            function: writes to none of its arguments.
            arguments: key -> its own arguments.
            common: further ones, the same for all keys.
        """

        def one(own: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self.call(lambda: {"": function(*own, *common)}, own, kind=function, common=common)[""]

        return {key: one(own) for key, own in arguments.items()}

    def call(
        self,
        function: Callable[[], dict[Any, torch.Tensor]],
        arguments: Sequence[torch.Tensor],
        *,
        kind: Hashable,
        common: Iterable[Any],
    ) -> dict[Any, torch.Tensor]:
        """What `function()` returns; where a call of this kind has been traced, by copies of its nodes.

        Args:
            function: may write to the arguments, and must then return them; run only where the call is traced.
            arguments: all tensors that are not the same for all calls.
            kind: what the trace depends on beside the arguments.
            common: tensors and symbolic numbers that are the same for all calls of this kind.
        """
        if not self.copies:
            return function()
        with compat.no_function_modes():
            own = self._kind(arguments)
        if own is None:
            return function()
        shared = tuple(map(node_of, common))
        whole = (kind, shared, own)
        known = self._recorded.get(whole)
        if known is None or known.num_common < self._num_common():
            outputs, recording = self._record(function, arguments)
            self._recorded[whole] = recording if recording.can_be_copied(shared) else None
            return outputs
        with compat.no_function_modes():
            return self._copy(known, arguments)

    def _kind(self, arguments: Sequence[torch.Tensor]) -> Hashable:
        """All that a trace can depend on in its arguments; None where it cannot be copied."""
        nodes = {node_of(tensor) for tensor in arguments}
        if None in nodes or any(tensor.is_complex() or has_symbols(tensor) for tensor in arguments):
            return None
        if len(nodes) < len(arguments) or len({memory_of(tensor) for tensor in arguments}) < len(arguments):
            return None
        return tuple(
            (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device, self.reader.present(tensor))
            for tensor in arguments
        )

    def _num_common(self) -> int:
        return len(self.reader.env.guards) - self._num_own

    def _record(
        self, function: Callable[[], dict[Any, torch.Tensor]], arguments: Sequence[torch.Tensor]
    ) -> tuple[dict[Any, torch.Tensor], _Recording]:
        inputs = tuple(map(node_of, arguments))
        last = next(iter(reversed(compat.tracer().graph.nodes)))
        num_reads, num_guards, num_common = len(self.reader.reads), len(self.reader.env.guards), self._num_common()
        outputs = function()
        reads = tuple(self.reader.reads[num_reads:])
        symbols = {read.symbol for read in reads}
        guards = tuple(guard for guard in self.reader.env.guards[num_guards:] if guard.expr.free_symbols & symbols)
        self._num_own += len(guards)
        returned = {id(tensor) for tensor in outputs.values()}
        kept = [(n, t) for n, t in zip(inputs, arguments, strict=True) if id(t) not in returned]
        return outputs, _Recording(
            inputs,
            nodes=_nodes_after(last),
            outputs={name: (node_of(tensor), tensor) for name, tensor in outputs.items()},
            reads=reads,
            guards=guards,
            num_common=num_common,
            writes_more=any(node_of(tensor) is not node for node, tensor in kept),
        )

    def _copy(self, known: _Recording, arguments: Sequence[torch.Tensor]) -> dict[Any, torch.Tensor]:
        own = dict(zip(known.inputs, arguments, strict=True))
        nodes: dict[fx.Node | None, Any] = {node: node_of(tensor) for node, tensor in own.items()}
        for node in known.nodes:
            nodes[node] = _copy_of(node, nodes)
        symbols = {read.symbol: self.reader.read_again(read, nodes[read.node]) for read in known.reads}
        self.reader.env.guards.extend(_guard_of(guard, symbols) for guard in known.guards)
        self._num_own += len(known.guards)
        return {
            name: own[node] if node in own else value_like(tensor, nodes[node])
            for name, (node, tensor) in known.outputs.items()
        }


def _guard_of(guard: ShapeGuard, symbols: Mapping[Any, Any]) -> ShapeGuard:
    """A guard as it would have been recorded of other symbols."""
    expr = guard.expr
    if isinstance(expr, sympy.core.relational.Relational):
        # sympy would look for its truth, which takes several times as long as all else that a copy takes
        sides = (side.xreplace(symbols) for side in expr.args)
        return ShapeGuard(expr.func(*sides, evaluate=False), guard.sloc, guard.size_oblivious)
    return ShapeGuard(expr.xreplace(symbols), guard.sloc, guard.size_oblivious)


def _nodes_after(last: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of a trace in progress behind one, without those that only tell a profiler where it is."""
    nodes = []
    node = last.next
    while node.op != "root":
        if not (compat.is_op(node.target) and node.target.namespace == "profiler"):
            nodes.append(node)
        node = node.next
    return tuple(nodes)


def _copy_of(node: fx.Node, nodes: Mapping[Any, fx.Node]) -> fx.Node:
    """A node at the end of the trace in progress like `node`, that reads `nodes` of what it reads."""
    if node.op == "get_attr":
        return constant_like(getattr(compat.tracer().root, str(node.target)))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: nodes.get(n, n))
    copy = compat.tracer().graph.create_node("call_function", node.target, args, kwargs, name=stem_of(node))
    copy.meta = dict(node.meta)
    return copy
