"""From the raw trace to a StepGraph: names, phases, table of state; nothing that only tracing needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxzero.graph import Result, StateEntry, StepGraph
from fxzero.graph.edit import erase_dead
from fxzero.graph.step_graph import CARRIED_KINDS, ancestors, identifier, yields_tensor

aten = torch.ops.aten
_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}


def clean(
    module: fx.GraphModule,
    *,
    entries: list[StateEntry],
    results: list[tuple[str, str]],
    boundaries: dict[str, int],
    optimized: list[str],
    mode: Any,
) -> tuple[StepGraph, dict[str, torch.Tensor]]:
    """Rebuild a raw trace as a StepGraph.

    Args:
        module: what make_fx returned; its outputs are `results`, "gradient" among them.
        entries: what each placeholder is.
        boundaries: number of raw nodes before backward and before update.
        optimized: parameters that have an update, in the optimizer's order.
        mode: the fake mode of the trace.

    Returns:
        The step and the constants (real tensors) by entry name.
    """
    rebuild = _Rebuild(module, entries, boundaries, mode)
    rebuild.run()
    step = StepGraph(rebuild.graph)
    raw_output = next(n for n in module.graph.nodes if n.op == "output")
    returned = {key: rebuild.mapping[raw] for key, raw in zip(results, raw_output.args[0], strict=True)}
    gradients = {name: node for (kind, name), node in returned.items() if kind == "gradient"}
    kept = {
        key: node
        for key, node in returned.items()
        if key[0] != "gradient" and (key[0] in CARRIED_KINDS or not _is_state_itself(node, key))
    }
    output = rebuild.graph.output(tuple(kept.values()))
    output.meta["results"] = tuple(Result(*key) for key in kept)
    _mark_gradients(step, gradients)
    erase_dead(step)
    _drop_unused_inputs(step)
    _mark_parameters(step)
    return step, {name: value for name, value in rebuild.constants.items() if step.input("constant", name)}


def _is_state_itself(node: fx.Node, key: tuple[str, str]) -> bool:
    """Whether the step leaves a state as it is."""
    return node.op == "placeholder" and bool(node.meta["entry"].key == key)


class _Rebuild:
    """Copies the raw graph node by node, with readable names and our meta."""

    def __init__(
        self, module: fx.GraphModule, entries: list[StateEntry], boundaries: dict[str, int], mode: Any
    ) -> None:
        self.module = module
        self.entries = iter(entries)
        self.boundaries = boundaries
        self.mode = mode
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, fx.Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.paths = _forward_paths(module.graph, boundaries["backward"])

    def run(self) -> None:
        raw_nodes = list(self.module.graph.nodes)
        for raw in raw_nodes:
            if raw.op == "placeholder":
                self.mapping[raw] = self._placeholder(raw, next(self.entries))
        constants: dict[str, fx.Node] = {}
        for raw in raw_nodes:
            if raw.op == "get_attr":
                target = str(raw.target)
                if target not in constants:
                    constants[target] = self._constant(raw)
                self.mapping[raw] = constants[target]
        for index, raw in enumerate(raw_nodes):
            if raw.op == "call_function":
                self.mapping[raw] = self._replaced(raw) or self._call(raw, self._phase(index))

    def _placeholder(self, raw: fx.Node, entry: StateEntry) -> fx.Node:
        node = self.graph.placeholder(identifier(entry.name))
        node.meta = {
            "entry": entry,
            "val": _representative(raw.meta["val"]),
            "phase": "forward",
            "module": "",
        }
        return node

    def _constant(self, raw: fx.Node) -> fx.Node:
        value = getattr(self.module, str(raw.target))
        name = str(raw.target).lstrip("_")
        self.constants[name] = value
        with self.mode:
            fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        node = self.graph.placeholder(name)
        node.meta = {
            "entry": StateEntry("constant", name, tuple(value.shape)),
            "val": fake,
            "phase": "forward",
            "module": "",
        }
        return node

    def _replaced(self, raw: fx.Node) -> fx.Node | None:
        """The node that an op without effect in a functional graph stands for."""
        source = raw.args[1] if raw.target is aten.copy.default else (raw.args[0] if raw.args else None)
        if not isinstance(source, fx.Node):
            return None
        node = self.mapping[source]
        if raw.target in _ALIASES:
            return node
        if raw.target in (aten.clone.default, aten.copy.default) and _same_layout(raw, node):
            return node
        if raw.target is aten.t.default and node.target is aten.t.default:
            return node.args[0]  # type: ignore[return-value]
        return None

    def _phase(self, index: int) -> str:
        if index < self.boundaries["backward"]:
            return "forward"
        return "backward" if index < self.boundaries["update"] else "update"

    def _call(self, raw: fx.Node, phase: str) -> fx.Node:
        node = self.graph.node_copy(raw, lambda n: self.mapping[n])
        module = raw.meta.get("custom", {}).get("module")
        if phase == "backward":
            module = self.paths.get(raw.meta.get("seq_nr", -1), module)
        node.meta = {"val": _representative(raw.meta.get("val")), "phase": phase, "module": module or ""}
        return node


def _forward_paths(graph: fx.Graph, end: int) -> dict[int, str]:
    """Autograd sequence number -> module path, from the nodes of the forward."""
    paths: dict[int, str] = {}
    for index, node in enumerate(graph.nodes):
        module = node.meta.get("custom", {}).get("module")
        if index < end and module is not None and "seq_nr" in node.meta:
            paths.setdefault(node.meta["seq_nr"], module)  # later ones without a grad_fn repeat the number
    return paths


def _mark_gradients(step: StepGraph, gradients: dict[str, fx.Node]) -> None:
    """Give each parameter a gradient node of its own, contiguous, in the backward phase."""
    taken: set[fx.Node] = set()
    for name, node in gradients.items():
        own = node
        if node in taken or node.op == "placeholder" or node.meta["phase"] != "backward":
            last = max((n for n in step.calls() if n.meta["phase"] != "update"), key=step.positions().__getitem__)
            with step.graph.inserting_after(last):
                own = step.graph.call_function(aten.clone.default, (node,))
            own.meta = {"val": node.meta["val"], "phase": "backward", "module": ""}
            for user in _updates_of(step, name, node):
                user.replace_input_with(node, own)
        taken.add(own)
        own.meta["grad_of"] = (name,)


def _updates_of(step: StepGraph, name: str, gradient: fx.Node) -> list[fx.Node]:
    """The update nodes that read `gradient` for one parameter: those that lead to that parameter's results."""
    mine = ancestors(n for (kind, key), n in step.results.items() if key == name or key.startswith(f"{name}:"))
    return [user for user in gradient.users if user.meta.get("phase") == "update" and user in mine]


def _drop_unused_inputs(step: StepGraph) -> None:
    for node in step.placeholders:
        if not node.users and node.meta["entry"].kind in ("hyperparameter", "constant"):
            step.graph.erase_node(node)


def _mark_parameters(step: StepGraph) -> None:
    """Tag update nodes with the one parameter that they belong to.

    What follows from several (the norm of all gradients) belongs to none, and does not make its readers theirs.
    """
    owners: dict[fx.Node, frozenset[str]] = {}
    for node in step.graph.nodes:
        if node.op == "placeholder":
            entry = node.meta["entry"]
            owner = entry.name if entry.kind == "parameter" else entry.param
            owners[node] = frozenset([owner] if owner else [])
        elif node.op == "call_function" and node.meta["phase"] == "update":
            owners[node] = frozenset().union(*(owners.get(n, frozenset()) for n in node.all_input_nodes))
            if len(owners[node]) == 1:
                node.meta["param"] = next(iter(owners[node]))
            else:
                owners[node] = frozenset()
        elif node.op == "call_function":
            owners[node] = frozenset(node.meta.get("grad_of", ()))


def _same_layout(raw: fx.Node, node: fx.Node) -> bool:
    if not (yields_tensor(raw) and yields_tensor(node)):
        return False
    a, b = raw.meta["val"], node.meta["val"]
    return (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


def _representative(val: Any) -> Any:
    """A symbolic scalar becomes a plain number of its kind: graphs hold no symbols."""
    if isinstance(val, torch.SymFloat):
        return 0.5
    if isinstance(val, torch.SymInt):
        return 1
    if isinstance(val, torch.SymBool):
        return True
    return val
