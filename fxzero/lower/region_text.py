"""A region as text: what a compiler needs to know of it, and nothing else, so that equal regions have equal text.

[Note: canonical form]
Inputs are named i0, i1 .. in the order of their first reading, calls c0, c1 .. in program order. Of an input the text
has dtype, shape, strides and device; numbers of the host are 0-dim inputs, so that their values are no part of it.
Where sizes of the batch are left open ([Note: open sizes] in `symbolic_text`), their names come first among the inputs.
The text is JSON: it is compared, hashed, stored beside what was compiled from it, shown to people, and read back to
compile from; no Python object is ever stored.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.errors import LoweringError
from fxzero.graph.number_arguments import with_tensors
from fxzero.graph.regions import Region
from fxzero.graph.storage import InPlace
from fxzero.lower.symbolic_text import as_text, names_in, terms_of, value_of


@dataclass(frozen=True)
class RegionText:
    """A region's canonical text, and what its inputs and outputs are in the program it comes from.

    Args:
        text: see [Note: canonical form].
        plain: the same with each call's own op, where another one runs some.
        inputs: the nodes that i0, i1 .. stand for.
        outputs: the nodes whose values the compiled function returns.
        written: node of an input -> the node whose value stands in its memory afterwards.
    """

    text: str
    plain: str
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    written: dict[fx.Node, fx.Node]


def region_text(region: Region, in_place: InPlace, *, ops: Mapping[fx.Node, Any] | None = None) -> RegionText:
    """The canonical text of a region.

    Args:
        region: of a program.
        in_place: the memory of that program.
        ops: calls that another op than their own runs.
    """
    ops = ops or {}
    inputs = region.inputs
    names = {node: f"i{index}" for index, node in enumerate(inputs)}
    names |= {node: f"c{index}" for index, node in enumerate(region.calls)}
    written = _written(region, in_place)
    in_memory = set(written.values())
    outputs = tuple(node for node in region.outputs if node not in in_memory)
    calls = [_call(node, node.target, names) for node in region.calls]
    document = {
        "inputs": [_type(node) for node in inputs],
        "calls": calls,
        "outputs": [names[node] for node in outputs],
        "written": {names[source]: names[node] for source, node in written.items()},
    }
    text = plain = as_text(document)
    if any(node in ops for node in region.calls):
        run = [
            {**call, "op": _name(ops.get(node, node.target))} for call, node in zip(calls, region.calls, strict=True)
        ]
        text = as_text({**document, "calls": run})
    return RegionText(text, plain, inputs, outputs, written)


def _written(region: Region, in_place: InPlace) -> dict[fx.Node, fx.Node]:
    """Input -> the last call whose value the program wants in its memory."""
    inside = set(region.calls)
    written: dict[fx.Node, fx.Node] = {}
    source_of: dict[fx.Node, fx.Node] = {}
    for node in region.calls:
        first = node.args[0] if node.args else None
        if node not in in_place.forms or not isinstance(first, fx.Node):
            continue
        source = source_of.get(first) if first in inside else first
        if source is not None:
            source_of[node] = source
            written[source] = node
    return written


def _type(node: fx.Node) -> list[Any]:
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return [str(val.dtype).removeprefix("torch."), list(val.shape), list(val.stride()), val.device.type]
    dtype = "int64" if isinstance(val, int) else "float64"
    return [dtype, [], [], "number"]


def _call(node: fx.Node, target: Any, names: dict[fx.Node, str]) -> dict[str, Any]:
    call: dict[str, Any] = {"op": _name(target), "args": _plain(node.args, names)}
    if node.kwargs:
        call["kwargs"] = {key: _plain(value, names) for key, value in node.kwargs.items()}
    return call


def _name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    return target.name() + ("" if "." in target.name() else ".default")


def _plain(value: Any, names: dict[fx.Node, str]) -> Any:
    """An argument in JSON: objects of torch as one-element objects, floats by `repr` where JSON has none."""
    if isinstance(value, fx.Node):
        return {"node": names[value]}
    if isinstance(value, (list, tuple)):
        return [_plain(item, names) for item in value]
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise LoweringError.of(
        where="a region",
        expected="arguments that are tensors, numbers, dtypes or devices",
        got=f"{type(value).__name__} {value!r}",
        fix="set lowering='eager'",
    )


def read_region(text: str, mode: Any, sizes: Mapping[str, Any] | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """The region of a text as a module that returns its outputs and then what is written, with fake inputs.

    Args:
        text: of a `RegionText` or a `SymbolicText`.
        mode: fake mode in which the inputs are made.
        sizes: name -> size, a number or a symbol, of those that the text leaves open.
    """
    document = json.loads(text)
    graph, nodes, fakes = _graph_of(document, mode, sizes or {})
    for name, call in zip(_call_names(document), document["calls"], strict=True):
        node = nodes[name]
        node.target = with_tensors(node) if call["op"] != "getitem" else node.target  # type: ignore[assignment]
    returned = [*document["outputs"], *document["written"].values()]
    graph.output(tuple(nodes[name] for name in returned))
    return fx.GraphModule(torch.nn.Module(), graph), [*((sizes or {})[name] for name in names_in(document)), *fakes]


def read_calls(text: str, mode: Any) -> dict[str, fx.Node]:
    """The inputs and calls of a text as nodes, by name, in order; `meta["val"]` has their fake values.

    Numbers of the host have a number there, as in the program that the region comes from.

    Args:
        text: of a `RegionText`.
        mode: fake mode in which the inputs are made.
    """
    document = json.loads(text)
    _, nodes, _ = _graph_of(document, mode, {})
    for name, (dtype, *_, device) in zip(_input_names(document), document["inputs"], strict=True):
        if device == "number":
            nodes[name].meta["val"] = 1 if dtype == "int64" else 0.5
    for name in _call_names(document):
        node = nodes[name]
        with mode:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return nodes


def written_inputs(text: str) -> list[int]:
    """Indices of the inputs that a region writes over, in the order in which `read_region` returns their values."""
    document = json.loads(text)
    return [len(names_in(document)) + int(name.removeprefix("i")) for name in document["written"]]


def _input_names(document: Mapping[str, Any]) -> list[str]:
    return [f"i{index}" for index in range(len(document["inputs"]))]


def _call_names(document: Mapping[str, Any]) -> list[str]:
    return [f"c{index}" for index in range(len(document["calls"]))]


def _graph_of(
    document: Mapping[str, Any], mode: Any, sizes: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, fx.Node], list[torch.Tensor]]:
    """The graph of a document without its output, its nodes by name, and fake inputs."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    fakes: list[torch.Tensor] = []
    nodes |= {f"size {name}": graph.placeholder(name) for name in names_in(document)}
    for name, (dtype, shape, strides, device) in zip(_input_names(document), document["inputs"], strict=True):
        node = nodes[name] = graph.placeholder(name)
        place = "cpu" if device == "number" else device
        shape, strides = ([_number(item, sizes) for item in items] for items in (shape, strides))
        with mode:
            fakes.append(torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=place))
        # what tells a call with a number of the host from one with a tensor of no dimensions
        node.meta["val"] = 0.5 if device == "number" else fakes[-1]
    for name, call in zip(_call_names(document), document["calls"], strict=True):
        args, kwargs = (_argument(call.get(part, empty), nodes) for part, empty in (("args", []), ("kwargs", {})))
        nodes[name] = graph.call_function(_op(call["op"]), tuple(args), kwargs)
    return graph, nodes, fakes


def _number(value: Any, sizes: Mapping[str, Any]) -> Any:
    terms = terms_of(value)
    return value if terms is None else value_of(terms, sizes)


def _argument(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_argument(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    terms = terms_of(value)
    if terms is not None:
        proxies = {name: fx.Proxy(nodes[f"size {name}"]) for _, *names in terms for name in names}
        return value_of(terms, proxies).node
    read: dict[str, Callable[[Any], Any]] = {
        "node": nodes.__getitem__,
        "torch": lambda name: getattr(torch, name),
        "device": torch.device,
        "float": float,
    }
    if len(value) == 1 and (kind := next(iter(value))) in read:
        return read[kind](value[kind])
    return {key: _argument(item, nodes) for key, item in value.items()}


def _op(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
