"""The rules of a step graph that hold on one rank as on many; `fxzero.graph.verify` has the table of all.

A rule is a function of a Context that yields Violations. Rules run in the order of that table and the first
violation ends the check, so each may rely on the ones before it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.order_rules import late
from fxzero.graph.randomness import is_random
from fxzero.graph.routing_ops import check_room
from fxzero.graph.step_graph import (
    CALL_RESULTS,
    CALLED,
    CARRIED_KINDS,
    INPUT_KINDS,
    LAUNCHED,
    PHASES,
    STATE_KINDS,
    StateEntry,
    StepGraph,
)
from fxzero.graph.synchronisation import synchronisations

_NODE_KINDS = ("placeholder", "call_function", "output")
# the functions of Python that write to their first argument
_WRITES = {operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass(frozen=True)
class Violation:
    """One place where a rule is broken; the parts are those of `FxzeroError.of`.

    Args:
        where: the node, or what else is wrong.
        expected, got, fix: as in an error.
    """

    where: fx.Node | str
    expected: str
    got: str
    fix: str


@dataclass(frozen=True)
class Summary:
    """What the rules that compare must know of the graph that a pass was given.

    Args:
        results: keys of what is returned.
        parameters: keys of the parameter inputs.
        random: the random calls, in order.
        trained: parameters whose next value, or sum of gradients, is computed from their gradient.
        waits: names of the calls at which the host would wait for the device.
        late: names of the pairs of calls that stand the other way round than they should.
    """

    results: frozenset[tuple[str, str]]
    parameters: tuple[tuple[str, str], ...]
    random: tuple[str, ...]
    trained: frozenset[str]
    waits: frozenset[str] = frozenset()
    late: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, step: StepGraph) -> Summary:
        """Sum up a graph."""
        parameters = tuple(node.meta["entry"].key for node in step.inputs("parameter"))
        random = tuple(_random_calls(step.calls()))
        return cls(
            frozenset(step.results),
            parameters,
            random,
            frozenset(_trained(step)),
            frozenset(synchronisations(step)),
            frozenset(late(step, step.positions())),
        )


@dataclass
class Context:
    """A graph under verification, with what several rules look up.

    Args:
        step: the graph.
        before: of the graph that the last pass was given, if any.
    """

    step: StepGraph
    before: Summary | None = None

    @cached_property
    def summary(self) -> Summary:
        """What the next verification will compare with."""
        return Summary.of(self.step)

    @cached_property
    def calls(self) -> list[fx.Node]:
        """The call nodes, in order."""
        return self.step.calls()

    @cached_property
    def positions(self) -> dict[fx.Node, int]:
        """Node -> index in program order."""
        return self.step.positions()

    @cached_property
    def entries(self) -> dict[tuple[str, str], fx.Node]:
        """Key of an entry -> its placeholder."""
        return {node.meta["entry"].key: node for node in self.step.placeholders}

    @cached_property
    def have_state(self) -> set[str | None]:
        """Names of the parameters that have optimizer state among the inputs."""
        return {node.meta["entry"].param for node in self.step.inputs("optimizer")}


def equation(node: fx.Node) -> str:
    """A node as a line of program, cut where it gets long."""
    if node.op != "call_function":
        return f"%{node.name} ({node.op})"
    args = [str(arg) for arg in node.args] + [f"{key}={arg}" for key, arg in node.kwargs.items()]
    text = f"%{node.name} = {getattr(node.target, '__name__', node.target)}({', '.join(args)})"
    return text if len(text) <= 160 else f"{text[:157]}..."


def schema_of(node: fx.Node) -> Any:
    """The schema of the op that a node calls; None for functions of Python."""
    return getattr(node.target, "_schema", None)


def tensors_in(val: Any) -> list[torch.Tensor]:
    """The tensors of a value."""
    if isinstance(val, (list, tuple)):
        return [tensor for item in val for tensor in tensors_in(item)]
    return [val] if isinstance(val, torch.Tensor) else []


def check_structure(context: Context) -> Iterator[Violation]:
    """Inputs stand first, then calls in an order that respects reads, then one output of named values."""
    graph = context.step.graph
    fix = "insert nodes through Editor and return values through StepGraph.set_result"
    kinds = [node.op for node in graph.nodes]
    for node in graph.nodes:
        if node.op not in _NODE_KINDS:
            yield Violation(node, f"one of {', '.join(_NODE_KINDS)}", node.op, fix)
    if kinds.count("output") != 1 or kinds[-1] != "output":
        yield Violation("graph", "one output node, at the end", f"{kinds.count('output')} output nodes", fix)
        return
    if "placeholder" in kinds[kinds.count("placeholder") :]:
        yield Violation("graph", "inputs before the first call", "an input after it", fix)
    try:
        graph.lint()
    except RuntimeError as error:
        yield Violation("graph", "what fx lint accepts", str(error).partition(" graph():")[0], fix)
    yield from _check_output(context.step.output, fix)


def _check_output(output: fx.Node, fix: str) -> Iterator[Violation]:
    returned = output.args[0] if len(output.args) == 1 else None
    if not isinstance(returned, (list, tuple)) or not all(isinstance(value, fx.Node) for value in returned):
        yield Violation("output", "one tuple of nodes", repr(output.args), fix)
        return
    results = output.meta.get("results", ())
    if len(results) != len(returned):
        yield Violation("output", f"{len(returned)} meta['results'], one a value", str(len(results)), fix)
    counts = Counter((result.kind, result.name) for result in results)
    for key, count in counts.items():
        if count > 1:
            yield Violation(f"result {key}", "one value", f"{count} values", fix)


def check_meta(context: Context) -> Iterator[Violation]:
    """Each node says its phase and its value; each input says which entry of the state table it is."""
    seen: dict[tuple[str, str], fx.Node] = {}
    by_editor = "make nodes with Editor"
    for node in context.step.graph.nodes:
        if node.op == "output":
            continue
        if node.meta.get("phase") not in PHASES:
            yield Violation(node, f"meta['phase'] in {PHASES}", repr(node.meta.get("phase")), by_editor)
        if "val" not in node.meta:
            yield Violation(node, "meta['val']", f"only {sorted(node.meta)}", by_editor)
        if any(not compat.is_fake(tensor) for tensor in tensors_in(node.meta.get("val"))):
            yield Violation(node, "a fake tensor in meta['val']", "a real one", by_editor)
        if node.op == "placeholder":
            yield from _check_entry(node, seen)


def _check_entry(node: fx.Node, seen: dict[tuple[str, str], fx.Node]) -> Iterator[Violation]:
    entry = node.meta.get("entry")
    if not isinstance(entry, StateEntry) or entry.kind not in INPUT_KINDS:
        expected = f"a StateEntry of a kind in {INPUT_KINDS}"
        yield Violation(node, expected, repr(entry), "set meta['entry'] where the input is made")
        return
    if entry.key in seen:
        got, fix = f"it also on %{seen[entry.key].name}", "look it up with StepGraph.input first"
        yield Violation(node, f"entry {entry.key} on one input", got, fix)
    seen[entry.key] = node


def check_functional(context: Context) -> Iterator[Violation]:
    """No call writes to an argument: passes need not reason about aliasing."""
    written: dict[Any, str] = {}
    for node in context.calls:
        if node.target not in written:  # schemas are slow to read
            written[node.target] = _written_arguments(node)
        if written[node.target]:
            got = f"a write to {written[node.target]}"
            yield Violation(node, "an op without side effect", got, "use the functional form of the op")


def _written_arguments(node: fx.Node) -> str:
    if node.target in _WRITES:
        return "its first argument"
    schema = schema_of(node)
    arguments = schema.arguments if schema else ()
    return ", ".join(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def check_state(context: Context) -> Iterator[Violation]:
    """What is returned for an entry of the state can be stored there, and no result or parameter is lost."""
    results = context.step.results
    losses = [name for kind, name in results if kind == "loss"]
    is_called = CALLED in context.step.facts or (results and all(kind in CALL_RESULTS for kind, _ in results))
    if not is_called and len(losses) != 1:
        yield Violation("results", "one loss", f"{len(losses)}: {losses}", "keep what capture returns")
    for key, node in results.items():
        yield from _check_result(context, key, node)
    if context.before is None:
        return
    # a pass may begin to keep state of its own, or to launch for the next program
    own = {key for key in results if key[0] in ("auxiliary", LAUNCHED)}
    changed = (set(results) ^ context.before.results) - (own - context.before.results)
    for key in sorted(changed):
        now, then = ("returned", "not returned") if key in results else ("not returned", "returned")
        yield Violation(f"result {key}", f"{then}, as before the pass", now, "keep all results")
    for key in context.before.parameters:
        if key not in context.entries:
            yield Violation(f"input {key}", "an input, as before the pass", "none", "keep all parameters")


def _check_result(context: Context, key: tuple[str, str], node: fx.Node) -> Iterator[Violation]:
    kind = key[0]
    if kind in ("loss", "metric", *CALL_RESULTS):
        return
    where = f"result {key} from {equation(node)}"
    source = context.entries.get(key)
    kinds = (*STATE_KINDS, *CARRIED_KINDS, LAUNCHED)
    if kind not in kinds or (source is None and not _is_new(context, key)):
        fix = "return it under the key of its input"
        yield Violation(where, f"an entry of a kind in {kinds}", "none of that name", fix)
    if source is None:
        return
    for what, expected, got in (
        ("dtype and shape", _dtype_and_shape(source), _dtype_and_shape(node)),
        ("sharding", source.meta.get("sharding"), node.meta.get("sharding")),
    ):
        if expected != got:
            fix = "let the update end with what the entry holds"
            yield Violation(where, f"{what} {expected}, as %{source.name}", str(got), fix)


def _is_new(context: Context, key: tuple[str, str]) -> bool:
    """Whether a step is the first to make a result: the optimizer's first, or the first microbatch's.

    The last microbatch launches gathers that the first one of the next step waits for.
    """
    kind, name = key
    if kind in (*CARRIED_KINDS, LAUNCHED):
        return ("parameter", name) in context.entries
    param = name.rpartition(":")[0]
    known = ("parameter", param) in context.entries
    return kind == "optimizer" and known and param not in context.have_state


def _dtype_and_shape(node: fx.Node) -> str:
    val = node.meta["val"]
    return f"{val.dtype} {list(val.shape)}" if isinstance(val, torch.Tensor) else type(val).__name__


def check_phases(context: Context) -> Iterator[Violation]:
    """Nothing reads a value of a later phase: forward, backward, update. Program order may mix phases."""
    rank = {phase: index for index, phase in enumerate(PHASES)}
    for node in context.calls:
        phase = node.meta["phase"]
        for source in node.all_input_nodes:
            if rank[source.meta["phase"]] > rank[phase]:
                got = f"%{source.name} of phase {source.meta['phase']}"
                yield Violation(node, f"inputs up to {phase}", got, "give each node the phase of its use")


def check_random(context: Context) -> Iterator[Violation]:
    """The same random calls in the same order as before: each draws what it would draw on one device."""
    if context.before is None:
        return
    was, now = context.before.random, context.summary.random
    if was != now:
        shorter = min(len(was), len(now))
        first = next((i for i in range(shorter) if was[i] != now[i]), shorter)
        got = f"{len(now)}, with {_at(now, first)} as number {first}"
        expected = f"{len(was)}, with {_at(was, first)} as number {first}"
        yield Violation("random calls", expected, got, "keep random calls, under their names, in their order")


def _random_calls(calls: Iterable[fx.Node]) -> list[str]:
    return [f"%{node.name} = {node.target}" for node in calls if is_random(node)]


def _at(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else "nothing"


def check_order(context: Context) -> Iterator[Violation]:
    """No parameter is gathered while it is gathered, no state read after its next value is made, unless before."""
    if context.before is None or context.summary.late <= context.before.late:
        return
    for names, (earlier, later) in sorted(late(context.step, context.positions).items()):
        if names not in context.before.late:
            fix = "keep the order that required_order asks for"
            yield Violation(later, f"it after %{earlier.name}", "it before", fix)


def check_synchronisation(context: Context) -> Iterator[Violation]:
    """The host waits for the device nowhere where it did not before the pass: it runs ahead of a step.

    Except for what a plan asks for: whether the rows of experts have room.
    """
    asked = {node.name for node in context.calls if node.target is check_room}
    if context.before is None or context.summary.waits <= context.before.waits | asked:
        return
    reasons = synchronisations(context.step)
    for name in sorted(context.summary.waits - context.before.waits - asked):
        fix = "compute on the device what the device knows, and select there"
        yield Violation(f"%{name}", "no wait of the host for the device, as before the pass", reasons[name], fix)


def check_gradients(context: Context) -> Iterator[Violation]:
    """Each parameter whose next value, or returned gradient, followed from its gradient before the pass has both."""
    if context.before is None:
        return
    for name in sorted(context.before.trained - context.summary.trained):
        where, expected = f"result of parameter {name!r}", "one computed from its gradient, as before"
        fix = "keep meta['grad_of'], and the way from that node to the update"
        yield Violation(where, expected, "one that no node of that meta['grad_of'] leads to", fix)


def _trained(step: StepGraph) -> set[str]:
    """Names of the parameters whose next value, sum of gradients or returned gradient is computed from theirs."""
    bits = {name: 1 << index for index, name in enumerate(step.gradients())}
    reached: dict[fx.Node, int] = {}  # as bit sets: one pass over the graph serves all parameters
    for node in step.calls():
        mask = sum(bits[name] for name in node.meta.get("grad_of", ()))
        for source in node.all_input_nodes:
            mask |= reached.get(source, 0)
        reached[node] = mask
    kinds = ("parameter", "gradient", *CARRIED_KINDS)
    returned = ((name, node) for (kind, name), node in step.results.items() if kind in kinds)
    return {name for name, node in returned if reached.get(node, 0) & bits.get(name, 0)}
