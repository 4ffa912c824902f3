"""Which ways of a step's calls fit together, and what they cost: the problem that is solved for an axis.

[Note: equal calls of equal blocks]
Calls that stand at the same place of the blocks of a model (layers.0, layers.1, ..) and are alike have one answer: they
are one unit. So the problem is as large for 80 blocks as for two. A unit's count says how often its costs are paid.

[Note: calls that follow]
Some calls have no answer of their own: a view of a value that nobody else reads lies as that lies, because to convert
it before or after the view costs the same; and what an update computes element by element lies as its parameter does.
Such a unit has a leader, and as many ways as that has, in the same order.

[Note: values and what is asked of them]
A value is what a unit yields, together with who reads it: blocks may end in a value that the next block reads, and the
last one's is read by another call. Each (value, reader, argument) that is different counts once. A value lies as its
unit's way says; each other placement that a reader asks is made once by a conversion, however many ask for it. What is
made for forward is there until backward, where that reads the value, too: it costs what keeping the value costs, as
much of it as a rank has.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxzero import compat
from fxzero.cost.communication import Layout, collective_seconds, layout_of, message_seconds
from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, divides, shard
from fxzero.graph.step_graph import CARRIED_KINDS, StepGraph, num_bytes, yields_tensor
from fxzero.sharding.blocks import Blocks
from fxzero.sharding.conversions import ALGORITHMS, conversion, copied_bytes, route
from fxzero.sharding.places import Places
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Message, Strategy
from fxzero.sharding.taken import is_alias, tensors_taken, value_taken

_LIES_AS_PARAMETER = ("optimizer", *CARRIED_KINDS)


@dataclass
class Unit:
    """Calls (or inputs) that have one answer.

    Args:
        key: what makes them alike.
        strategies: of which one is chosen.
        seconds: of each, for one call.
        leader: number of the unit that it follows; -1: none.
        count: how many they are.
    """

    key: Hashable
    strategies: tuple[Strategy, ...]
    seconds: tuple[float, ...]
    leader: int = -1
    count: int = 0


@dataclass
class Value:
    """What a unit yields, as some readers read it.

    Args:
        unit: number of the unit.
        output: which of its outputs.
        shape, itemsize: of the whole.
        kept: bytes that wait for backward, of the whole.
        readers: (number of a unit, number of its tensor).
        count: how many they are.
        is_kept_as_made: what is made of it waits for backward, too, since forward reads it.
    """

    unit: int
    output: int
    shape: tuple[int, ...]
    itemsize: int
    kept: int
    readers: tuple[tuple[int, int], ...]
    count: int = 0
    is_kept_as_made: bool = False


@dataclass
class Problem:
    """Units and values of a step for one axis.

    Args:
        ranks: of the axis.
        layout: where they stand.
        hardware: the machine.

    Attributes:
        units, values: of the step.
        of_node: the unit of each call and input that yields tensors, or takes them.
        results: (number of the unit that goes out, its output, number of the unit that it has to lie as): state in is
            state out; -1: it has to be whole.
        result_shapes: (unit, output) of these -> (shape of the whole, bytes of an element).
    """

    ranks: int
    layout: Layout
    hardware: Hardware
    units: list[Unit] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    of_node: dict[fx.Node, int] = field(default_factory=dict)
    results: set[tuple[int, int, int]] = field(default_factory=set)
    result_shapes: dict[tuple[int, int], tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def conversion_seconds(self, value: Value, before: Placement, after: Placement) -> float:
        """Seconds of what makes a value lie in another way; infinite where nothing does."""
        steps = route(value.shape, before, after, self.ranks)
        pairs = itertools.pairwise((before, *steps))
        return sum(self._step_seconds(value, *pair) for pair in pairs) if steps else math.inf

    def _step_seconds(self, value: Value, before: Placement, after: Placement) -> float:
        done = conversion(before, after)
        assert done is not None
        algorithm, size = ALGORITHMS[done], value.itemsize * math.prod(value.shape)
        if algorithm == "all_to_all":  # each rank has parts of its own part for the others
            size //= self.ranks
        travels = 0.0 if algorithm is None else message_seconds(algorithm, size, self.layout, self.hardware)
        copied = copied_bytes(value.shape, value.itemsize, before, after, self.ranks)
        kept = self.kept_bytes(value, after) if value.is_kept_as_made else 0.0
        return travels + (2 * copied + kept) / self.hardware.memory_bytes_s + self.hardware.op_overhead_s

    def kept_bytes(self, value: Value, lies: Placement) -> float:
        """What a rank keeps of a value for backward, where it lies so."""
        return value.kept * lies.share(self.ranks)


def placements_of_state(shape: tuple[int, ...], ranks: int) -> list[Placement]:
    """The ways in which a parameter may rest: whole, or equal parts of one dim."""
    dims = [shard(dim) for dim in range(len(shape))]
    return [REPLICATED, *(placement for placement in dims if divides(shape, placement, ranks))]


def problem_of(step: StepGraph, axis: str, rules: Rules, hardware: Hardware) -> Problem:
    """The problem of a step.

    Args:
        step: captured, whole on every rank of the axis.
        axis: of its mesh.
        rules: for that many ranks.
        hardware: the machine.
    """
    return _Builder(step, axis, rules, hardware).build()


class _Builder:
    def __init__(self, step: StepGraph, axis: str, rules: Rules, hardware: Hardware) -> None:
        self.step, self.axis, self.rules, self.hardware = step, axis, rules, hardware
        self.blocks, self.places = Blocks(step, rules), Places(step)
        layout = layout_of(axis, step.mesh, hardware.ranks_per_node)
        self.problem = Problem(rules.ranks, layout, hardware)
        self.known: dict[Hashable, int] = {}
        self.ordinals: Counter[Hashable] = Counter()
        self.parameters: dict[str, int] = {}
        self.of_parameters: set[int] = set()
        self.shapes = {n.meta["entry"].name: tuple(n.meta["entry"].shape) for n in step.inputs("parameter")}
        self.going_out = set(step.results.values())

    def build(self) -> Problem:
        for node in self.step.graph.nodes:
            if node.op == "placeholder" and yields_tensor(node):
                self._add_input(node)
            elif node.op == "call_function" and not is_alias(node) and self._has_tensors(node):
                self._add_call(node)
        self._add_values()
        self._add_results()
        return self.problem

    def _has_tensors(self, node: fx.Node) -> bool:
        val = node.meta["val"]
        yields = isinstance(val, torch.Tensor) or isinstance(val, (list, tuple))
        return yields or any(yields_tensor(source) for source in node.all_input_nodes)

    def _unit(
        self, key: Hashable, strategies: tuple[Strategy, ...], seconds: tuple[float, ...], leader: int = -1
    ) -> int:
        if key not in self.known:
            self.known[key] = len(self.problem.units)
            self.problem.units.append(Unit(key, strategies, seconds, leader))
        number = self.known[key]
        self.problem.units[number].count += 1
        return number

    def _add_input(self, node: fx.Node) -> None:
        entry, shape = node.meta["entry"], tuple(node.meta["val"].shape)
        owner = entry.name if entry.kind == "parameter" else entry.param or entry.name
        follows = entry.kind in _LIES_AS_PARAMETER and self.shapes.get(owner) == shape
        if follows and owner in self.parameters:
            self.problem.of_node[node] = self.parameters[owner]
            return
        lies = [REPLICATED]
        if entry.kind == "parameter":
            pinned = node.meta.get("pinned", {}).get(self.axis)
            lies = placements_of_state(shape, self.rules.ranks) if pinned is None else [pinned]
        name = self.places.starred(entry.name) if entry.kind == "parameter" else ""
        key = ("input", entry.kind, name, shape, node.meta["val"].dtype, tuple(lies))
        strategies = tuple(Strategy((), (placement,)) for placement in lies)
        per_byte = num_bytes(node.meta["val"]) / self.hardware.memory_bytes_s
        seconds = tuple(per_byte * (1 / self.rules.ranks if p.is_shard else 1.0) for p in lies)
        number = self._unit(key, strategies, seconds)
        self.problem.of_node[node] = number
        if entry.kind == "parameter":
            self.parameters[entry.name] = number
            self.of_parameters.add(number)

    def _add_call(self, node: fx.Node) -> None:
        strategies = self.blocks.ways(node)
        leader = self._leader(node)
        followed = self._aligned(node, leader, strategies)
        leader, strategies = (-1, strategies) if followed is None else (leader, followed)
        ways = tuple((way.inputs, way.outputs) for way in strategies)
        key = (node.meta["phase"], *self._place(node), self.rules.signature(node), leader, ways)
        if key in self.known:
            self.problem.of_node[node] = self._unit(key, (), ())
            return
        whole = self._seconds(node)
        overhead = min(whole, self.hardware.op_overhead_s)
        seconds = tuple(self._strategy_s(strategy, whole - overhead, overhead) for strategy in strategies)
        self.problem.of_node[node] = self._unit(key, strategies, seconds, leader)

    def _seconds(self, node: fx.Node) -> float:
        """Of a call as it is: of a collective over another axis, until what it moves is there."""
        if c10d.is_collective(node):
            return collective_seconds(node, self.step.mesh, self.hardware)
        return compute_seconds(node, self.hardware)

    def _place(self, node: fx.Node) -> tuple[Hashable, Hashable]:
        """Where a call stands in its block: equal for calls at the same place of equal blocks."""
        name = node.meta.get("param") or node.meta["module"]
        if not name:  # where gradients of several readers are added up: told by what is added
            sources = [value_taken(source)[0] for source in node.all_input_nodes]
            placed = [source for source in sources if source in self.problem.of_node]
            return "", tuple(self.problem.of_node[source] if source.meta["module"] else -1 for source in placed)
        exact = (node.meta["phase"], name, node.target)
        self.ordinals[exact] += 1
        return self.places.starred(name), self.ordinals[exact]

    def _leader(self, node: fx.Node) -> int:
        """The unit that a call follows, if it can; see [Note: calls that follow]."""
        taken = tensors_taken(node)
        if not yields_tensor(node) or not taken:
            return -1
        if node.meta["phase"] == "update" and is_pointwise(node):
            shape = node.meta["val"].shape
            alike = [source for source in taken if source.meta["val"].shape == shape]
            leaders = [self._head(self.problem.of_node[value_taken(source)[0]]) for source in alike]
            return next((leader for leader in leaders if leader in self.of_parameters), -1) if shape else -1
        (source, *others) = taken
        read_alone = len(source.users) == 1 and not others and source not in self.going_out
        if not read_alone or source.op == "placeholder" or is_alias(source) or "grad_of" in source.meta:
            return -1
        if num_bytes(node.meta["val"]) > num_bytes(source.meta["val"]):
            return -1
        return self.problem.of_node[source]

    def _head(self, unit: int) -> int:
        leader = self.problem.units[unit].leader
        return unit if leader < 0 else self._head(leader)

    def _aligned(self, node: fx.Node, leader: int, strategies: tuple[Strategy, ...]) -> tuple[Strategy, ...] | None:
        """The way of a call for each way of its leader; None where there is not one for each."""
        if leader < 0:
            return None
        shapes = [source.meta["val"].dim() for source in tensors_taken(node)]
        by_inputs = {strategy.inputs: strategy for strategy in strategies}
        found = []
        for way in self.problem.units[leader].strategies:
            (lies,) = way.outputs
            wanted = tuple(lies if dims else REPLICATED for dims in shapes)
            if wanted not in by_inputs or by_inputs[wanted].messages:  # type: ignore[index]
                return None
            found.append(by_inputs[wanted])  # type: ignore[index]
        return tuple(found)

    def _strategy_s(self, strategy: Strategy, work_s: float, overhead_s: float) -> float:
        """Of a call made in a way: work that one device takes so long for, and what each call costs beside."""
        own_s = work_s * strategy.share
        beside_s = sum(self._message_s(message) for message in strategy.messages if message.is_beside)
        open_s = sum(self._message_s(message) for message in strategy.messages if not message.is_beside)
        longer_s = max(0.0, beside_s - own_s * (1 - 1 / strategy.calls))
        moved_s = strategy.traffic / self.hardware.memory_bytes_s
        return overhead_s * strategy.calls + own_s + moved_s + open_s + longer_s

    def _message_s(self, message: Message) -> float:
        return message_seconds(message.algorithm, message.num_bytes, self.problem.layout, self.hardware)

    def _add_values(self) -> None:
        readers: dict[tuple[fx.Node, int], set[tuple[int, int]]] = {}
        kept: set[tuple[fx.Node, int]] = set()
        in_forward: set[tuple[fx.Node, int]] = set()
        for node, unit in self.problem.of_node.items():
            for index, source in enumerate(tensors_taken(node)):
                value = value_taken(source)
                readers.setdefault(value, set()).add((unit, index))
                if node.meta["phase"] == "forward":
                    in_forward.add(value)
                if value[0].op != "placeholder" and node.meta["phase"] == "backward":
                    if value[0].meta["phase"] == "forward":
                        kept.add(value)
        found: dict[Hashable, Value] = {}
        for (node, output), asked in readers.items():
            val = node.meta["val"]
            tensor = val[output] if isinstance(val, (list, tuple)) else val
            unit, ordered = self.problem.of_node[node], tuple(sorted(asked))
            key = (unit, output, ordered, (node, output) in kept)
            if key not in found:
                held = num_bytes(tensor) if (node, output) in kept else 0
                found[key] = Value(unit, output, tuple(tensor.shape), tensor.element_size(), held, ordered)
                found[key].is_kept_as_made = held > 0 and (node, output) in in_forward
            found[key].count += 1
        self.problem.values = list(found.values())

    def _add_results(self) -> None:
        for node in self.step.graph.nodes:
            for name in node.meta.get("grad_of", ()):
                self._goes_out(node, self.parameters[name])
        inputs = {node.meta["entry"].key: node for node in self.step.placeholders}
        for key, node in self.step.results.items():
            if yields_tensor(node):
                lies_as = lies_as_input(inputs, *key)
                self._goes_out(node, -1 if lies_as is None else self.problem.of_node.get(lies_as, -1))

    def _goes_out(self, node: fx.Node, lies_as: int) -> None:
        source, output = value_taken(node)
        unit, val = self.problem.of_node[source], node.meta["val"]
        self.problem.results.add((unit, output, lies_as))
        self.problem.result_shapes[(unit, output)] = (tuple(val.shape), val.element_size())


def lies_as_input(inputs: Mapping[tuple[str, str], fx.Node], kind: str, name: str) -> fx.Node | None:
    """The input that a result has to lie as; None: it has to be whole.

    Args:
        inputs: of the step, by the keys of their entries.
        kind, name: the key of the result, which is the next value of an input, or a parameter's gradient so far.
    """
    own = inputs.get((kind, name))
    return inputs.get(("parameter", name)) if own is None and kind in CARRIED_KINDS else own


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of what a call yields depends on the elements at its place alone."""
    return compat.is_op(node.target) and torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]
