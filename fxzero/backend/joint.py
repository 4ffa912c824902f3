"""From AOTAutograd's graph to a StepGraph of forward and backward.

[Note: what AOTAutograd does]
AOTAutograd has traced forward and backward as one functional graph, and keeps the promises that a functional graph
cannot: it writes the next values of mutated inputs back, makes outputs that alias inputs anew, and calls backward. So
our graph only computes: its results are outputs (next values of inputs among them) and gradients. An input that is
written to afterwards must not be read by backward where it lies: `Joint.mutated` names those.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import compat, compat_dynamo
from fxzero.errors import CaptureError
from fxzero.graph import Result, StateEntry, StepGraph
from fxzero.graph.call_signature import has_symbols
from fxzero.graph.step_graph import CALLED, TANGENT, ancestors, identifier

aten = torch.ops.aten

Key = tuple[str, str]

# the same tensor under another name, where nobody outside gets hold of it
_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
_OWNED = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_ROOT = re.compile(r"^[LG]\['([^']*)'\]")


@dataclass(frozen=True)
class Name:
    """What an input of a captured graph is.

    Args:
        kind: "parameter", "buffer" or "batch".
        name: path in the module whose code runs, or what the code calls it.
    """

    kind: str
    name: str


@dataclass
class Joint:
    """Forward and backward of one captured graph.

    Args:
        step: the graph; of an inference graph without backward.
        outputs: what forward returns, in order: keys of results, and constants as they are.
        gradients: the same for backward; an input without gradient has None.
        constants: tensors that the graph holds itself, by the name of their entry.
        mutated: keys of the inputs that are written to when forward has run.
        again: forward nodes that the model itself wants computed again in backward.
    """

    step: StepGraph
    outputs: tuple[Any, ...]
    gradients: tuple[Any, ...]
    constants: dict[str, torch.Tensor]
    mutated: frozenset[Key]
    again: set[fx.Node]


def names_of(module: fx.GraphModule) -> list[Name]:
    """What the inputs of Dynamo's graph are, in order; no two have one kind and name."""
    names: dict[Name, None] = {}
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        source = compat_dynamo.source_of(node)
        owned = _OWNED.findall(source)
        kind = next((k for k in ("parameter", "buffer") if f"._{k}s[" in source and owned), "batch")
        path = ".".join(owned) if kind != "batch" else _called(source) or str(node.target)
        name = Name(kind, path)
        names[Name(kind, f"{path}#{index}") if name in names else name] = None
    return list(names)


def _called(source: str) -> str:
    """What the code calls a value: args.0, for L['args'][0]."""
    found = _ROOT.match(source)
    return ".".join(filter(None, [found[1] if found else "", module_path(source)]))


def module_path(source: str) -> str:
    """The path of a module below the object whose code runs: layers.0, for L['self']._modules['layers'].0."""
    below = _ROOT.sub("", source, count=1)
    words = re.findall(r"\['?([^'\]]*)'?\]|\.(\w+)", below)
    parts = [word for pair in words for word in pair if word]
    return ".".join(part for part in parts if part not in ("_modules", "_parameters", "_buffers"))


def gradient_name(placeholder: fx.Node) -> str:
    """What the gradient of an input is returned as: a parameter's by its name alone."""
    entry = placeholder.meta["entry"]
    return str(entry.name if entry.kind == "parameter" else entry.label)


def read_joint(module: fx.GraphModule, *, num_outputs: int, names: Sequence[Name]) -> Joint:
    """The step graph of a joint graph, or of an inference graph, of AOTAutograd.

    Args:
        module: its outputs are those of forward, then one gradient an input.
        num_outputs: of forward.
        names: of the inputs of Dynamo's graph.

    Raises:
        CaptureError: for a call that fxzero has no form for: on symbolic sizes, or of other graphs.
    """
    reader = _Reader(module, num_outputs, names)
    reader.run()
    return reader.finish()


class _Reader:
    """Copies AOTAutograd's graph node by node, with our meta."""

    def __init__(self, module: fx.GraphModule, num_outputs: int, names: Sequence[Name]) -> None:
        self.module = module
        self.names = names
        self.graph = fx.Graph()
        self.read: dict[fx.Node, fx.Node] = {}  # raw node -> what its readers read
        self.made: dict[fx.Node, fx.Node] = {}  # raw node -> its own twin
        self.constants: dict[str, torch.Tensor] = {}
        self.kept: dict[str, fx.Node] = {}  # name of a constant -> its placeholder
        self.inputs: list[fx.Node] = []  # of forward
        self.again: set[fx.Node] = set()
        returned = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        self.outputs, self.gradients = returned[:num_outputs], returned[num_outputs:]
        self.returned = {raw for raw in self.outputs if isinstance(raw, fx.Node)}
        self.in_forward = ancestors(raw for raw in self.outputs if isinstance(raw, fx.Node))

    def run(self) -> None:
        raw_nodes = list(self.module.graph.nodes)
        for raw in raw_nodes:
            if raw.op == "placeholder":
                self._placeholder(raw)
        for raw in raw_nodes:
            if raw.op == "get_attr":
                self._constant(raw)
        for raw in raw_nodes:
            if raw.op == "call_function":
                self._call(raw)

    def finish(self) -> Joint:
        mutated = compat_dynamo.mutated(self.module.graph)
        results: dict[Key, fx.Node] = {}
        outputs = tuple(self._result(("output", str(i)), raw, results) for i, raw in enumerate(self.outputs))
        named = zip(self.inputs, self.gradients, strict=False)  # an inference graph has none
        gradients = tuple(self._result(("gradient", gradient_name(node)), raw, results) for node, raw in named)
        output = self.graph.output(tuple(results.values()))
        output.meta["results"] = tuple(Result(*key) for key in results)
        self._mark_gradients(results)
        written = frozenset(self.made[raw].meta["entry"].key for raw in mutated)
        step = StepGraph(self.graph, {"dp": 1}, facts=frozenset({CALLED}))
        return Joint(step, outputs, gradients, self.constants, written, self.again)

    def _result(self, key: Key, raw: Any, results: dict[Key, fx.Node]) -> Any:
        if not isinstance(raw, fx.Node):
            return raw
        results[key] = self.made[raw]
        return key

    def _mark_gradients(self, results: dict[Key, fx.Node]) -> None:
        parameters = {node.meta["entry"].name for node in self.inputs if node.meta["entry"].kind == "parameter"}
        for (kind, name), node in results.items():
            if kind == "gradient" and name in parameters and node.op == "call_function":
                node.meta["grad_of"] = (*node.meta.get("grad_of", ()), name)

    def _placeholder(self, raw: fx.Node) -> None:
        position = compat_dynamo.position_of(raw)
        if compat_dynamo.is_tangent(raw):
            kind, name = TANGENT, str(raw.target)
        elif isinstance(position, int):
            kind, name = self.names[position].kind, self.names[position].name
        else:
            kind, name = ("batch", str(raw.target)) if position is None else ("parameter", position)
        val = raw.meta.get("val")
        self._check_known(raw, val)
        shape = tuple(val.shape) if isinstance(val, torch.Tensor) else ()
        node = self.graph.placeholder(identifier(name))
        phase = "backward" if kind == TANGENT else "forward"
        node.meta = {"entry": StateEntry(kind, name, shape), "val": val, "phase": phase, "module": ""}
        self.made[raw] = self.read[raw] = node
        if kind != TANGENT:
            self.inputs.append(node)

    def _constant(self, raw: fx.Node) -> None:
        value, name = getattr(self.module, str(raw.target), None), str(raw.target).lstrip("_")
        if not isinstance(value, torch.Tensor):
            self._refuse(raw, f"a {type(value).__name__} inside of the graph")
        assert isinstance(value, torch.Tensor)
        if name not in self.constants:
            self.constants[name] = value
            node = self.kept[name] = self.graph.placeholder(name)
            entry = StateEntry("constant", name, tuple(value.shape))
            node.meta = {"entry": entry, "val": raw.meta["val"], "phase": "forward", "module": ""}
        self.made[raw] = self.read[raw] = self.kept[name]

    def _call(self, raw: fx.Node) -> None:
        target: Any = raw.target
        if compat.is_op(target) and target.namespace == "profiler":
            return  # marks for a profiler of the user's, whose ranges a rewritten program has not
        val = raw.meta.get("val")
        self._check_known(raw, val)
        if compat_dynamo.is_higher_order(target):
            self._refuse(raw, f"{target}, a call of other graphs")
        if getattr(target, "namespace", "") in ("_c10d_functional", "c10d"):
            self._refuse(raw, "a collective of the model's own")
        same = self._same(raw)
        if same is not None and raw not in self.returned:
            self.read[raw] = self.made[raw] = same
            return
        node = self.graph.node_copy(raw, lambda n: self.read[n])
        backward = compat_dynamo.belongs_to_backward(raw) and raw not in self.in_forward
        path = module_path(compat_dynamo.module_of(raw))
        node.meta = {"val": val, "phase": "backward" if backward else "forward", "module": path}
        self.made[raw] = node
        self.read[raw] = node if same is None else same
        if compat_dynamo.is_checkpointed(raw) and not backward:
            self.again.add(node)

    def _same(self, raw: fx.Node) -> fx.Node | None:
        """What a call that only gives a tensor another name, or turns it around twice, names."""
        source = self.read[raw.args[0]] if raw.args and isinstance(raw.args[0], fx.Node) else None
        if source is not None and raw.target in _ALIASES:
            return source
        turned = source is not None and raw.target is aten.t.default and source.target is aten.t.default
        return source.args[0] if turned else None  # type: ignore[union-attr, return-value]

    def _check_known(self, raw: fx.Node, val: Any) -> None:
        if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)) or has_symbols(val):
            self._refuse(raw, "a size or number that is known only when it runs")

    @staticmethod
    def _refuse(raw: fx.Node, got: str) -> None:
        place = compat_dynamo.module_of(raw) or "the function"
        raise CaptureError.of(
            where=f"torch.compile(backend='fxzero'), op {raw.target} of {place}",
            expected="ops of one rank on tensors of known sizes",
            got=got,
            fix="let torch.compiler.disable keep that function out of the graph",
        )
