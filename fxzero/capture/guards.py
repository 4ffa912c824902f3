"""The conditions on scalars under which a captured graph is the right one; see [Note: scalars]."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxzero.capture.scalars import Read
from fxzero.graph import StateEntry, StepGraph
from fxzero.graph.step_graph import ancestors

# how sympy functions that torch puts into guards are computed on Python numbers
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "FloatPow": operator.pow,
    "PowByNatural": operator.pow,
    "FloatTrueDiv": operator.truediv,
    "IntTrueDiv": operator.truediv,
    "FloorDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "Mod": operator.mod,
    "ToFloat": float,
    "TruncToInt": math.trunc,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "RoundToInt": round,
    "Max": max,
    "Min": min,
    "OpaqueUnaryFn_sqrt": math.sqrt,
    "OpaqueUnaryFn_exp": math.exp,
    "OpaqueUnaryFn_log": math.log,
}


@dataclass
class Guards:
    """The conditions on scalars under which a captured graph is the right one.

    Args:
        conditions: (text, compiled condition, names of the scalars that it takes).
        readers: scalar name -> function of the current inputs that yields it (hyperparameters and state scalars by
            name, reads of 0-dim tensors by a small program cut from the graph).
        frozen: hyperparameters that left no node in the graph, with the value that they had: they may have shaped it.
        attributes: plain attributes of modules, likewise.
        irrelevant: attributes that were seen not to shape the graph.
    """

    conditions: list[tuple[str, Callable[..., Any], tuple[str, ...]]] = field(default_factory=list)
    readers: dict[str, Callable[[Callable[[str, str], Any]], Any]] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    irrelevant: set[tuple[str, str]] = field(default_factory=set)
    _seen: dict[tuple[Any, ...], bool] = field(default_factory=dict)

    def hold(self, lookup: Callable[[str, str], Any], attributes: dict[tuple[str, str], Any]) -> bool:
        """Whether every condition is true now.

        Args:
            lookup: (kind, name) of a state entry -> its current value.
            attributes: the modules' current ones, see `Inventory.attributes`.
        """
        if self._relevant(attributes) != self.attributes:
            return False
        if any(lookup("hyperparameter", name) != value for name, value in self.frozen.items()):
            return False
        if not self.conditions:
            return True
        values = {name: read(lookup) for name, read in self.readers.items()}
        key = tuple(values.values())
        if key not in self._seen:
            if len(self._seen) > 4096:
                self._seen.clear()
            self._seen[key] = all(test(*(values[n] for n in names)) for _, test, names in self.conditions)
        return self._seen[key]

    def relax(self, lookup: Callable[[str, str], Any], attributes: dict[tuple[str, str], Any]) -> None:
        """Forget numbers and attributes that have changed since: capturing again gave the same graph."""
        self.frozen = {k: v for k, v in self.frozen.items() if lookup("hyperparameter", k) == v}
        known = {*attributes, *self.attributes}
        self.irrelevant = self.irrelevant | {
            k for k in known if attributes.get(k, known) != self.attributes.get(k, known)
        }
        self.attributes = self._relevant(self.attributes)

    def _relevant(self, attributes: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
        if not self.irrelevant:
            return attributes
        return {key: value for key, value in attributes.items() if key not in self.irrelevant}

    def __str__(self) -> str:
        return "; ".join(text for text, _, _ in self.conditions) or "none"


def compile_condition(expr: Any, names: dict[Any, str]) -> tuple[str, Callable[..., Any], tuple[str, ...]]:
    """A guard expression as text, as a Python function of its scalars, and the names of those."""
    symbols = sorted(expr.free_symbols, key=str)
    test = sympy.lambdify(symbols, expr, modules=[_FUNCTIONS, "math"])
    text = str(expr)
    for symbol in symbols:
        text = text.replace(str(symbol), names[symbol])
    return text, test, tuple(names[symbol] for symbol in symbols)


def collect_guards(
    env: Any,
    graph: fx.Graph,
    *,
    entries: list[StateEntry],
    symbols: dict[Any, tuple[str, str]],
    reads: Sequence[Read],
    sizes: Mapping[Any, Any] | None = None,
) -> Guards:
    """The conditions that a trace met.

    Args:
        env: the symbol environment, with what was asked of its symbols.
        graph: the raw trace.
        entries: what its placeholders are.
        symbols: symbol -> key of the entry that it stands for.
        reads: the numbers read from tensors.
        sizes: symbol of a size of the batch -> its number; what is asked about these alone is no condition on scalars.
    """
    guards = Guards()
    asked = [guard.expr.xreplace(sizes or {}) for guard in env.guards]
    conditions = [expr for expr in asked if expr.free_symbols]
    used = set().union(*(expr.free_symbols for expr in conditions)) if conditions else set()
    names: dict[Any, str] = {}
    for symbol in used:
        if symbol in symbols:
            kind, name = symbols[symbol]
            names[symbol] = name
            guards.readers[name] = functools.partial(_look_up, kind, name)
    programs: dict[str, Callable[..., Any]] = {}
    placeholders = {n: e for n, e in zip(graph.find_nodes(op="placeholder"), entries, strict=True)}
    order = {node: index for index, node in enumerate(graph.nodes)}
    for read in reads:
        if read.symbol in used:
            names[read.symbol] = read.node.name
            guards.readers[read.node.name] = _reader(read.node, placeholders, order, programs)
    for expr in conditions:
        if expr.free_symbols <= set(names):
            guards.conditions.append(compile_condition(expr, names))
    return guards


def freeze_unused(guards: Guards, step: StepGraph, entries: list[StateEntry], values: list[Any]) -> None:
    """A number that left no trace in the graph may still have shaped it: its value becomes a condition."""
    for entry, value in zip(entries, values, strict=True):
        if entry.kind == "hyperparameter" and step.input(*entry.key) is None and not isinstance(value, torch.Tensor):
            now = value.node.hint if isinstance(value, (torch.SymFloat, torch.SymInt)) else value
            guards.frozen[entry.name] = now


def _look_up(kind: str, name: str, lookup: Callable[[str, str], Any]) -> Any:
    return lookup(kind, name)


def _reader(
    node: fx.Node,
    placeholders: dict[fx.Node, StateEntry],
    order: dict[fx.Node, int],
    programs: dict[str, Callable[..., Any]],
) -> Callable[..., Any]:
    """The few ops that lead from state to one number, cut from the graph.

    Args:
        node: that yields the number.
        placeholders: what inputs are.
        order: node -> position in the graph.
        programs: those of before, by their text; equal ones are compiled once.
    """
    needed = sorted(ancestors([node]), key=order.__getitem__)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    keys: list[tuple[str, str]] = []
    for old in needed:
        if old.op == "placeholder":
            mapping[old] = graph.placeholder(f"x{len(keys)}")
            keys.append(placeholders[old].key)
        else:
            mapping[old] = graph.create_node(
                old.op, old.target, *fx.map_arg((old.args, old.kwargs), lambda n: mapping[n]), name=f"n{len(mapping)}"
            )
    graph.output(mapping[node])
    text = str(graph)
    if text not in programs:
        programs[text] = fx.GraphModule(nn.Module(), graph).forward  # not by __call__, which costs more than the ops
    program = programs[text]
    if len(keys) == 1:
        ((kind, name),) = keys
        return lambda lookup: program(lookup(kind, name))
    return lambda lookup: program(*(lookup(*key) for key in keys))
