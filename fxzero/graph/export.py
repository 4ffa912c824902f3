"""A step graph for other programs: JSON for tools, Graphviz for pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import text, type_text
from fxzero.graph.step_graph import PHASES, StepGraph, num_bytes

COLORS = {
    "state": "#e8e8e8",
    "compute": "#ffffff",
    "collective": "#9fc5e8",
    "wait": "#d6e6f5",
    "release": "#f4cccc",
}


def kind_of(node: fx.Node) -> str:
    """What a node is to a reader: "state" (any input), "collective", "wait", "release" or "compute"."""
    if node.op == "placeholder":
        return "state"
    if c10d.is_collective(node):
        return "collective"
    if c10d.is_wait(node):
        return "wait"
    return "release" if c10d.is_release(node) else "compute"


def to_json(step: StepGraph) -> dict[str, Any]:
    """The graph as plain values that `json.dumps` takes.

    Returns:
        title, mesh, facts, device; nodes in program order (inputs first), each with name, op, args as the text
        form shows them, inputs, kind, type, phase, module, bytes, sharding, grad_of, param, and for an input its
        entry; results, each with kind, name and node.
    """
    device = text.default_device(step)
    return {
        "title": step.title,
        "mesh": dict(step.mesh),
        "facts": sorted(step.facts),
        "device": device,
        "nodes": [_node(node, step, device) for node in (*step.placeholders, *step.calls())],
        "results": [{"kind": k, "name": name, "node": node.name} for (k, name), node in step.results.items()],
    }


def _node(node: fx.Node, step: StepGraph, device: str) -> dict[str, Any]:
    meta = node.meta
    sharding, entry = meta.get("sharding"), meta.get("entry")
    is_input = node.op == "placeholder"
    return {
        "name": node.name,
        "op": "input" if is_input else text.op_name(node.target),
        "args": "" if is_input else text.args_text(node, step.mesh),
        "inputs": [source.name for source in node.all_input_nodes],
        "kind": kind_of(node),
        "type": type_text.type_of(node, step, device=device),
        "phase": meta.get("phase"),
        "module": meta.get("module", ""),
        "bytes": num_bytes(meta.get("val")),
        "sharding": None if sharding is None else dataclasses.asdict(sharding),
        "grad_of": list(meta.get("grad_of", ())),
        "param": meta.get("param"),
        "entry": None if entry is None else {**dataclasses.asdict(entry), "shape": list(entry.shape)},
    }


def to_dot(step: StepGraph) -> str:
    """The graph in Graphviz's language: a cluster for inputs, each phase and results; COLORS by kind."""
    device = text.default_device(step)
    clusters: dict[str, list[str]] = {name: [] for name in text.SECTIONS}
    for node in (*step.placeholders, *step.calls()):
        cluster = "inputs" if node.op == "placeholder" else node.meta.get("phase", PHASES[0])
        clusters[cluster].append(_drawn(node, step, device))
    for index, (kind, name) in enumerate(step.results):
        label = _quoted(f"{kind}\n{name}")
        clusters["results"].append(f'"result {index}" [label={label}, fillcolor="{COLORS["state"]}"];')
    lines = [f"digraph {_quoted(step.title)} {{", '  node [shape=box, style=filled, fontname="monospace"];']
    for name, members in clusters.items():
        if members:
            lines += [f"  subgraph cluster_{name} {{", f"    label={_quoted(name)};"]
            lines += [f"    {member}" for member in members]
            lines.append("  }")
    lines += [f"  {edge}" for edge in _edges(step)]
    return "\n".join([*lines, "}"]) + "\n"


def _drawn(node: fx.Node, step: StepGraph, device: str) -> str:
    entry = node.meta.get("entry")
    what = text.op_name(node.target) if entry is None else f"{entry.kind} {entry.name}"
    shown = type_text.type_of(node, step, device=device)
    label = _quoted(f"%{node.name}\n{what}\n{shown}")
    return f'{_quoted(node.name)} [label={label}, fillcolor="{COLORS[kind_of(node)]}"];'


def _edges(step: StepGraph) -> Iterator[str]:
    for node in step.calls():
        for source in node.all_input_nodes:
            yield f"{_quoted(source.name)} -> {_quoted(node.name)};"
    for index, node in enumerate(step.results.values()):
        yield f'{_quoted(node.name)} -> "result {index}";'


def _quoted(label: str) -> str:
    # Graphviz reads \n, \" and \\ in quoted strings as JSON does.
    return json.dumps(label, ensure_ascii=False)
