"""Forward and backward of one graph become two, and what passes between them is as little as backward needs.

[Note: what is saved]
Saved is what backward reads and cannot make by itself: a view is made there again from what it views, so that no memory
is saved under two names. An input is saved as it lies, unless it is written to after forward: then as a copy. Of a
sharded parameter that is its rows, which backward gathers; where it stays gathered, that tensor is saved, and its
release is left out: it goes with the last reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxzero.backend.joint import Key
from fxzero.graph import Result, StateEntry, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import SAVED, TANGENT, is_getitem, is_view
from fxzero.graph.swap_ops import OPS

aten = torch.ops.aten

_FIXED = ("constant", "coordinate")  # inputs that both halves have by themselves


@dataclass(frozen=True)
class Halves:
    """Forward and backward of one graph.

    Args:
        forward: its results are the outputs, then what is saved.
        backward: its inputs are what is saved, in that order, then gradients of outputs, constants and coordinates.
        saved: keys of forward's results that it saves, in order.
    """

    forward: StepGraph
    backward: StepGraph
    saved: tuple[Key, ...]


def halves_of(step: StepGraph, *, mutated: Iterable[Key]) -> Halves:
    """Split a graph by phase.

    Args:
        step: forward and backward.
        mutated: keys of the inputs that are written to after forward.
    """
    _keep_parts_in_forward(step)
    saved = _saved(step)
    forward, keys = _forward(step, saved, set(mutated))
    backward = _backward(step, saved, [forward.results[key].meta["val"] for key in keys])
    return Halves(forward, backward, keys)


def _is_part(node: fx.Node) -> bool:
    """Whether a call names memory of its first input."""
    if node.op != "call_function" or node.target in OPS:
        return False
    return is_view(node) or (is_getitem(node) and is_view(node.all_input_nodes[0]))


def _keep_parts_in_forward(step: StepGraph) -> None:
    """One of several values that forward yields is forward's, too: only tensors can be saved."""
    for node in step.phase("backward"):
        if is_getitem(node) and node.all_input_nodes[0].meta["phase"] == "forward":
            node.meta["phase"] = "forward"


def _in_backward(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta["phase"] == "backward"


def _saved(step: StepGraph) -> list[fx.Node]:
    """What backward reads of inputs and forward, in program order."""
    wanted = [node for node in step.calls() if _in_backward(node) and not c10d.is_release(node)]
    read = [source for node in wanted for source in node.all_input_nodes]
    read += [node for (kind, _), node in step.results.items() if kind == "gradient"]
    found: set[fx.Node] = set()
    for node in read:
        while _is_part(node) and not _in_backward(node):
            node = node.all_input_nodes[0]
        if not _in_backward(node):
            found.add(node)
    given = (*_FIXED, TANGENT)
    return [n for n in step.graph.nodes if n in found and (n.op != "placeholder" or n.meta["entry"].kind not in given)]


def _forward(step: StepGraph, saved: list[fx.Node], mutated: set[Key]) -> tuple[StepGraph, tuple[Key, ...]]:
    half = _Half(step, title="forward")
    for node in step.placeholders:
        if node.meta["entry"].kind != TANGENT:
            half.copy(node)
    for node in step.phase("forward"):
        half.copy(node)
    results = {key: half.mapping[node] for key, node in step.results.items() if key[0] == "output"}
    keys = tuple((SAVED, _saved_name(node)) for node in saved)
    results |= {key: half.mapping[node] for key, node in zip(keys, saved, strict=True)}
    forward = half.finish(results)
    for key, node in zip(keys, saved, strict=True):
        if node.op == "placeholder" and node.meta["entry"].key in mutated:
            with Editor(forward, phase="forward").before(forward.output) as editor:
                forward.set_result(*key, editor.call(aten.clone.default, half.mapping[node]))
    return forward, keys


def _saved_name(node: fx.Node) -> str:
    return node.meta["entry"].label if node.op == "placeholder" else node.name


def _backward(step: StepGraph, saved: list[fx.Node], vals: list[torch.Tensor]) -> StepGraph:
    half = _Half(step, title="backward")
    for node, val in zip(saved, vals, strict=True):
        entry = node.meta["entry"] if node.op == "placeholder" else StateEntry(SAVED, node.name, tuple(val.shape))
        half.take(node, entry, val)
    for node in step.inputs(TANGENT):
        half.copy(node)
    read = {source for node in step.calls() if _in_backward(node) for source in _origins(node)}
    read |= {root for (kind, _), node in step.results.items() if kind == "gradient" for root in _origins(node)}
    for node in step.inputs(*_FIXED):
        if node in read:
            half.copy(node)
    for node in step.phase("backward"):
        if not (c10d.is_release(node) and any(source in saved for source in node.all_input_nodes)):
            half.copy(node)
    results = {key: half.value(node) for key, node in step.results.items() if key[0] == "gradient"}
    return half.finish(results)


def _origins(node: fx.Node) -> list[fx.Node]:
    """What a call reads, and what that is a part of."""
    found = [*node.all_input_nodes, node]
    for source in found:
        if _is_part(source):
            found.append(source.all_input_nodes[0])
    return found


class _Half:
    """A new graph, into which nodes of another are copied in order."""

    def __init__(self, step: StepGraph, *, title: str) -> None:
        self.step = step
        self.title = title
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, fx.Node] = {}

    def take(self, node: fx.Node, entry: StateEntry, val: torch.Tensor) -> None:
        """What the other half has made is an input here."""
        taken = self.graph.placeholder(node.name)
        taken.meta = {"phase": "forward", "module": "", "val": val, "entry": entry}
        taken.meta |= {key: node.meta[key] for key in ("tier", "sharding") if key in node.meta}
        self.mapping[node] = taken

    def copy(self, node: fx.Node) -> fx.Node:
        """A node, and before it the views that it reads and that are not here yet."""
        copied = self.graph.node_copy(node, self.value)
        copied.meta = dict(node.meta)
        if self.title == "backward" and node.op == "call_function":
            copied.meta["phase"] = "backward"
        self.mapping[node] = copied
        return copied

    def value(self, node: fx.Node) -> fx.Node:
        """The copy of a node; a part of a tensor is made where it is first read."""
        assert node in self.mapping or _is_part(node), f"{self.title} has no %{node.name}"
        return self.mapping[node] if node in self.mapping else self.copy(node)

    def finish(self, results: dict[Key, fx.Node]) -> StepGraph:
        """The graph with these results."""
        self.graph.output(tuple(results.values())).meta["results"] = tuple(Result(*key) for key in results)
        step = self.step
        return StepGraph(self.graph, dict(step.mesh), self.title, step.facts, {}, step.evaluated, step.made)
