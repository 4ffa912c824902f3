"""What the generator of kernels is told of a region: its text, and where its values stand in rows and columns.

[Note: a region as rows]
The document is plain JSON, since kernels know nothing of graphs. Beside what the region's text says it has

    space    [rows, columns], and `by_row`: whether a program must hold whole rows
    loads    what calls read of inputs: input, dtype, offset (elements), positions
    calls    name, op, arguments by name (of another call, a load, a number of the host, or plain), dtype, dtypes of
             tensor arguments, shape, part
    buffers  the calls whose values leave the kernel: dtype, shape, strides, positions; the input that they are written
             over, and whether the kernel writes there itself
    returned name of the buffer (or input) that an output is a view of, shape, strides and offset (None: the buffer)

An input is written in place where every call that reads it reads, for each element, the place that the same program
then writes. Where not (a state that is broadcast, or read through a view), its next value is stored beside it first
and copied when the kernel has ended.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import LoweringError
from fxzero.graph.row_ops import arguments, op_name, reads, reduced
from fxzero.graph.row_structure import COLUMN, FULL, ROW, Fit, Positions, computes, joined, positions
from fxzero.graph.step_graph import is_getitem, is_view
from fxzero.lower.region_text import read_calls


class Unsupported(LoweringError):
    """Raised for a region that no kernel over rows can hold: a column reduction, a matrix product, a gather."""


def row_document(text: str) -> dict[str, Any]:
    """The document of a region's text ([Note: a region as rows]).

    Args:
        text: see `fxzero.lower.region_text`.

    Raises:
        Unsupported: with the op and the shape that a kernel over rows cannot hold.
    """
    nodes = read_calls(text, compat.new_fake_mode())
    structure = joined(node for node in nodes.values() if node.op != "placeholder")
    if isinstance(structure, fx.Node):
        raise _unsupported(structure)
    return _Writer(json.loads(text), nodes, structure.best).document()


def _unsupported(node: fx.Node) -> Unsupported:
    shapes = [str(list(n.meta["val"].shape)) for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    target = "getitem" if is_getitem(node) else op_name(node.target)
    return Unsupported.of(
        "a region",
        expected="pointwise ops and reductions of rows that regroup to one [rows, columns]",
        got=f"{target} of {', '.join(shapes) or 'numbers'}",
        fix="cut the region before it (cut_regions with only_rows), or set lowering='inductor'",
    )


class _Writer:
    """Writes the document of one region."""

    def __init__(self, text: Mapping[str, Any], nodes: Mapping[str, fx.Node], fit: Fit | None) -> None:
        self._text, self._nodes, self._fit = text, nodes, fit
        self._names = {node: name for name, node in nodes.items()}
        self._loads: list[dict[str, Any]] = []

    def document(self) -> dict[str, Any]:
        """The document."""
        fit = self._fit
        calls = [self._call(name, node) for name, node in self._nodes.items() if self._is_computed(node)]
        returned = [self._returned(name) for name in self._text["outputs"]]
        kept = dict.fromkeys([*(one["of"] for one in returned), *self._text["written"].values()])
        return {
            "inputs": self._text["inputs"],
            "space": [fit.space.rows, fit.space.columns] if fit else [0, 0],
            "by_row": fit.by_row if fit else False,
            "loads": self._loads,
            "calls": calls,
            "buffers": {name: self._buffer(name) for name in kept if name.startswith("c")},
            "returned": returned,
        }

    def _is_computed(self, node: fx.Node) -> bool:
        return self._fit is not None and node in self._fit.parts

    def _call(self, name: str, node: fx.Node) -> dict[str, Any]:
        assert self._fit is not None
        part, val = self._fit.parts[node], node.meta["val"]
        shown = next(iter(val)) if isinstance(val, (list, tuple)) else val
        call = {"name": name, "part": part, "dtype": _name(shown.dtype), "shape": list(shown.shape)}
        if is_getitem(node):
            return {**call, "op": "getitem", "args": {"of": self._reference(node.args[0], node), "index": node.args[1]}}
        needed = reads(node)
        given = {key: self._reference(value, node) for key, value in arguments(node).items() if value is not None}
        taken = {key: _name(value.meta["val"].dtype) for key, value in arguments(node).items() if value in needed}
        return {**call, "op": op_name(node.target), "args": given, "taken": taken}

    def _reference(self, value: Any, reader: fx.Node) -> Any:
        """An argument of a call: what is computed by name, what comes in by the index of its load."""
        if isinstance(value, (list, tuple)):
            return [self._reference(item, reader) for item in value]
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return None
        if not isinstance(value, fx.Node):
            return value
        if self._is_computed(value):
            return {"call": self._names[value]}
        if not isinstance(value.meta["val"], torch.Tensor):
            return {"number": self._names[value]}
        return {"load": self._load(value, reader)} if value in reads(reader) else None

    def _load(self, node: fx.Node, reader: fx.Node) -> int:
        """The index of the load by which a call reads an input, or a view of one."""
        assert self._fit is not None
        space, source = self._fit.space, reduced(reader)
        at, part = ((source or reader).meta["val"].shape, space.whole if source else self._fit.parts[reader])
        val = node.meta["val"]
        found = positions(val.shape, val.stride(), at=at, part=part, space=space)
        assert found is not None
        load = {"input": self._base(node), "dtype": _name(val.dtype), "offset": val.storage_offset()}
        load |= {"positions": dataclasses.asdict(found)}
        if load not in self._loads:
            self._loads.append(load)
        return self._loads.index(load)

    def _base(self, node: fx.Node) -> str:
        """The input or call whose memory a value lives in."""
        while is_view(node) or (is_getitem(node) and not self._is_computed(node)):
            node = node.all_input_nodes[0]
        return self._names[node]

    def _returned(self, name: str) -> dict[str, Any]:
        node = self._nodes[name]
        base = self._base(node)
        val = node.meta["val"]
        if base == name:
            return {"of": name, "shape": None, "strides": None, "offset": 0}
        return {"of": base, "shape": list(val.shape), "strides": list(val.stride()), "offset": val.storage_offset()}

    def _buffer(self, name: str) -> dict[str, Any]:
        """Where the value of a call goes to."""
        assert self._fit is not None
        node = self._nodes[name]
        val, part = node.meta["val"], self._fit.parts[node]
        found = positions(val.shape, val.stride(), at=val.shape, part=part, space=self._fit.space)
        assert found is not None and (computes(node) or is_getitem(node))
        over = next((source for source, value in self._text["written"].items() if value == name), None)
        return {
            "dtype": _name(val.dtype),
            "shape": list(val.shape),
            "strides": list(val.stride()),
            "positions": dataclasses.asdict(found),
            "over": over,
            "direct": over is not None and self._is_safe(over, found),
        }

    def _is_safe(self, over: str, found: Positions) -> bool:
        """Whether each program reads of an input only what it then writes over."""
        assert self._fit is not None
        space = self._fit.space
        all_rows = found.part in (FULL, ROW) or space.rows == 1
        all_columns = found.part in (FULL, COLUMN) or space.columns == 1 or self._fit.by_row
        same = {"offset": 0, "positions": dataclasses.asdict(found)}
        loads = [load for load in self._loads if load["input"] == over]
        return all_rows and all_columns and all(load.items() >= same.items() for load in loads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
