"""One Triton kernel for a region of a program, as the text of a Python module that a person can read.

[Note: a generated kernel]
A program of the kernel has a tile of rows and columns. `row` [ROWS, 1] and `column` [1, COLUMNS] are its indices, in 64
bits; `exists`, `present` and `inside` say which of them there are. Loads stand first, each with the strides that it
reads by; then one line for each call (c0, c1 .. as in the region's text); stores stand last, so that state is read
before it is written over. A value that is equal in all rows or columns is a tile of one, and is stored by the programs
of the first row or column tile only. Where a call reduces rows, a program has all columns of its rows.

The document is what `fxzero.lower.row_document` writes. Its rows and columns are numbers in the text: a kernel is made
for its shapes, as the text of a region is.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxzero.kernels.region_ops import FLOATS, POINTWISE, ROW_OPS, VIEWS, cast, computes_in, is_select, literal, rounded
from fxzero.kernels.region_tiles import Tile, tiles_of

Document = Mapping[str, Any]

_WITHOUT_CAST = ("condition", "mask")
_WIDTH = 112  # of a line, its indentation aside
_SPANS = {
    "full": frozenset({"row", "column"}),
    "row": frozenset({"row"}),
    "column": frozenset({"column"}),
    "scalar": frozenset[str](),
}
_MASKS = {"full": "inside", "row": "exists", "column": "present"}
_HEAD = '''"""{summary}

{calls}
"""

from __future__ import annotations

import torch

from fxzero.kernels import {modules}
from fxzero.kernels.region_functions import FUNCTIONS
'''


class Unsupported(ValueError):
    """Raised for an op that there is no expression for; names it."""


def triton_source(document: Document, *, autotune: bool = False) -> str:
    """The text of a Python module whose `call(values)` runs a region as one kernel.

    `call` takes a list of the inputs, which it empties, and returns the outputs as a tuple.

    Args:
        document: of `fxzero.lower.row_document`.
        autotune: at its first call on a GPU a few tiles are tried, and the fastest is kept.

    Raises:
        Unsupported: an op is not in the table.
    """
    writer = _Writer(document, tiles_of(*document["space"], by_row=document["by_row"]) if autotune else None)
    return writer.text()


def _index(dims: Sequence[Sequence[int]], name: str) -> str:
    """Where in memory an index points to: its digits by the sizes of the dimensions, each with its stride.

    Args:
        dims: (size, stride), outermost first.
        name: of the index.
    """
    terms, inner = [], 1
    for place, (size, stride) in enumerate(reversed(dims)):
        digit = name if inner == 1 else f"{name} // {inner}"
        if place < len(dims) - 1:
            digit = f"{digit} % {size}"
        if stride:
            terms.append(digit if stride == 1 else f"{f'({digit})' if digit != name else digit} * {stride}")
        inner *= size
    return " + ".join(reversed(terms))


def _offset(where: Document, offset: int) -> str:
    """What is added to a pointer to find elements: nothing for the first, 64 bits wide otherwise."""
    named = ((where["rows"], "row"), (where["columns"], "column"), (where["places"], "place"))
    text = " + ".join(_index(dims, name) for dims, name in named if dims)
    if not text:
        return f" + tl.cast({offset}, tl.int64)" if offset else ""
    text = f"{offset} + {text}" if offset else text
    return f" + {text}" if text in ("row", "column", "place") else f" + ({text})"


def _wrapped(head: str, items: Sequence[str], tail: str) -> Iterator[str]:
    """A list between `head` and `tail`, on several lines where one is too long."""
    line = f"{head}{', '.join(items)}{tail}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield head
    yield from (f"    {part}" for part in textwrap.wrap(", ".join(items) + ",", _WIDTH - 4, break_long_words=False))
    yield tail.lstrip(",")


class _Writer:
    """Writes the text of one region.

    Attributes:
        values: name of a call -> (what names it in the kernel, dtype).
        spans: what names a value in the kernel -> the indices that its tile runs over; it broadcasts along the others.
    """

    def __init__(self, document: Document, tiles: Sequence[Tile] | None) -> None:
        self.document = document
        self.rows, self.columns = document["space"]
        self.tiles = tiles
        self.values: dict[str, tuple[str, str]] = {}
        self.loads = self._named_loads()
        parts = (load["positions"]["part"] for load in document["loads"])
        self.spans = {name: _SPANS[part] for name, part in zip(self.loads, parts, strict=True)}
        self.kernel = f"region_{hashlib.sha256(json.dumps(document).encode()).hexdigest()[:8]}"
        self.numbers = [f"i{i}" for i, (*_, device) in enumerate(document["inputs"]) if device == "number"]
        self.runs = bool(document["calls"]) and bool(document["buffers"]) and self.rows * self.columns > 0

    def text(self) -> str:
        """The module."""
        shapes = f"{self.rows} rows of {self.columns} columns" if self.runs else "nothing to compute"
        summary = f"A region of {len(self.document['calls'])} calls on {shapes}."
        modules = "launch" if self.tiles is None else "launch, region_tiles"
        parts = [_HEAD.format(summary=summary, calls="\n".join(self._listing()), modules=modules)]
        if self.runs and self.tiles is not None:
            parts.append(f"TILES = region_tiles.Tiles({list(map(tuple, self.tiles))!r})\n")
        if self.runs:
            parts.append("\n".join(self._kernel()) + "\n")
        parts.append("\n".join(self._call()) + "\n")
        return "\n\n".join(part.rstrip("\n") + "\n" for part in parts)

    def _listing(self) -> Iterator[str]:
        """What comes in, what is computed, what goes out, for the docstring."""
        for i, (dtype, shape, strides, device) in enumerate(self.document["inputs"]):
            yield f"    i{i}: {dtype} {shape} strides {strides} on {device}"
        for call in self.document["calls"]:
            yield f"    {call['name']}: {call['dtype']} {call['shape']} = {call['op']}({self._shown(call['args'])})"
        for name, buffer in self.document["buffers"].items():
            if buffer["over"] is not None:
                yield f"    {buffer['over']} is written over by {name}"

    def _shown(self, args: Document) -> str:
        """A call's arguments as a person reads them."""
        shown = []
        for key, value in args.items():
            if isinstance(value, dict):
                name = self.loads[value["load"]] if "load" in value else next(iter(value.values()))
                shown.append(name)
            elif value is not None and value is not False and (key, value) != ("alpha", 1):
                shown.append(f"{key}={value!r}" if isinstance(value, (int, float)) else f"{key}={json.dumps(value)}")
        return ", ".join(shown)

    # ---- the kernel

    def _named_loads(self) -> list[str]:
        """Names of the loads: that of the input, with a number where it is read in several ways."""
        seen: dict[str, int] = {}
        names = []
        for load in self.document["loads"]:
            count = seen[load["input"]] = seen.get(load["input"], 0) + 1
            names.append(load["input"] if count == 1 else f"{load['input']}_{count}")
        return names

    def _pointers(self) -> list[str]:
        """The tensors that the kernel is given: what it loads, and what it stores to."""
        read = [load["input"] for load in self.document["loads"]]
        buffers = self.document["buffers"].items()
        return list(dict.fromkeys([*read, *(self._buffer_name(name, buffer) for name, buffer in buffers)]))

    def _buffer_name(self, name: str, buffer: Document) -> str:
        return buffer["over"] if buffer["direct"] else name

    def _kernel(self) -> Iterator[str]:
        arguments = [f"{name}_ptr" for name in self._pointers()] + [f"{name}_number" for name in self.numbers]
        yield from _wrapped(f"def {self.kernel}(", [*arguments, "ROWS: tl.constexpr", "COLUMNS: tl.constexpr"], "):")
        what = "whole rows" if self.document["by_row"] else "a tile"
        yield f'    """Each program has {what} of [{self.rows}, {self.columns}]."""'
        yield from (f"    {line}" for line in self._indices())
        yield from (f"    {line}" for line in self._loads_and_numbers())
        for call in self.document["calls"]:
            yield from (f"    {line}" for line in self._computed(call))
        yield from (f"    {line}" for line in self._stores())

    def _indices(self) -> Iterator[str]:
        if self.document["by_row"]:
            yield "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]"
            yield "column = tl.arange(0, COLUMNS)[None, :].to(tl.int64)"
        else:
            yield f"across = ({self.columns} + COLUMNS - 1) // COLUMNS  # tiles"
            yield "row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]"
            yield "column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]"
        yield f"exists, present = row < {self.rows}, column < {self.columns}"
        yield "inside = exists & present"
        used = [*self.document["loads"], *self.document["buffers"].values()]
        if any(one["positions"]["places"] for one in used):
            yield f"place = row * {self.columns} + column"

    def _loads_and_numbers(self) -> Iterator[str]:
        for name in self.numbers:
            dtype = self.document["inputs"][int(name[1:])][0]
            kept = "float32" if dtype == "float64" else "int64"
            yield f"{name} = tl.cast({name}_number, tl.{kept})"
        for name, load in zip(self.loads, self.document["loads"], strict=True):
            where = load["positions"]
            place = f"{load['input']}_ptr{_offset(where, load['offset'])}"
            mask = "" if where["part"] == "scalar" else f", mask={_MASKS[where['part']]}, other=0"
            wide = ".to(tl.float32)" if load["dtype"] in FLOATS[1:] else ""
            yield f"{name} = tl.load({place}{mask}){wide}"

    def _computed(self, call: Document) -> Iterator[str]:
        """The lines of a call."""
        name, op = call["name"], call["op"]
        if op == "getitem":
            text = f"{call['args']['of']['call']}_{call['args']['index']}"
            self.values[name] = (text, call["dtype"])
            self.spans[text] = _SPANS[call["part"]]
            return
        self.values[name] = (name, call["dtype"])
        if op in ROW_OPS:
            self.spans[name] = _SPANS[call["part"]]
            yield from self._row_op(call)
        elif op in POINTWISE:
            taken = (value for value in call["args"].values() if isinstance(value, dict))
            self.spans[name] = frozenset().union(*(self.spans.get(self._value(value)[0], ()) for value in taken))
            yield f"{name} = {self._pointwise(call)}  # {op.removeprefix('aten::')}"
        elif op in VIEWS:
            self.values[name] = self._value(call["args"]["self"])
        else:
            raise Unsupported(
                f"fxzero.kernels.region_source: expected an op of region_ops, got {op} of {call['shape']}"
            )

    def _value(self, reference: Document) -> tuple[str, str]:
        """What names a tensor or number of the host in the kernel, and its dtype."""
        if "load" in reference:
            return self.loads[reference["load"]], self.document["loads"][reference["load"]]["dtype"]
        if "number" in reference:
            dtype = self.document["inputs"][int(reference["number"][1:])][0]
            return reference["number"], "int64" if dtype == "int64" else "float32"
        return self.values[reference["call"]]

    def _operand(self, value: Any, dtype: str) -> str:
        if isinstance(value, dict):
            text, source = self._value(value)
            return cast(text, source, dtype)
        return literal(value, dtype)

    def _pointwise(self, call: Document) -> str:
        op, args = call["op"], call["args"]
        taken = [*call["taken"].values()]
        taken += ["float32" for value in args.values() if isinstance(value, float)]
        taken += [self._value(value)[1] for value in args.values() if isinstance(value, dict) and "number" in value]
        dtype = computes_in(op, call["dtype"], taken)
        texts = {"zero": literal(0, dtype), "one": literal(1, dtype)}
        for key, value in args.items():
            if isinstance(value, dict) and is_select(op) and key in _WITHOUT_CAST:
                texts[key] = self._value(value)[0]
            elif isinstance(value, (dict, int, float)):
                texts[key] = self._operand(value, dtype)
        kept = "float32" if call["dtype"] in FLOATS else {"bool": "int1"}.get(call["dtype"], call["dtype"])
        text = POINTWISE[op](texts, {**args, "kept": kept})
        return rounded(text, call["dtype"]) if op.startswith("aten::_to_copy") and call["dtype"] in FLOATS else text

    def _row_op(self, call: Document) -> Iterator[str]:
        texts = {"columns": str(self.columns)}
        for key, value in call["args"].items():
            if isinstance(value, dict):
                text = self._operand(value, "float32")
                wide = key in ("self", "input", "grad_output", "grad_out", "output")
                texts[key] = f"tl.broadcast_to({text}, (ROWS, COLUMNS))" if wide and self._is_narrow(value) else text
            elif isinstance(value, float):
                texts[key] = literal(value, "float32")
        for index, (name, text) in enumerate(ROW_OPS[call["op"]](texts, call["args"], call["name"])):
            yield f"{name} = {text}" + (f"  # {call['op'].removeprefix('aten::')}" if index == 0 else "")

    def _is_narrow(self, reference: Document) -> bool:
        """Whether a value may be a tile of one row or column, where a row op needs whole rows."""
        sizes = {"row": self.rows, "column": self.columns}
        needed = {index for index, size in sizes.items() if size != 1}
        return not needed or not needed <= self.spans[self._value(reference)[0]]

    def _stores(self) -> Iterator[str]:
        for name, buffer in self.document["buffers"].items():
            where = buffer["positions"]
            place, mask = f"{self._buffer_name(name, buffer)}_ptr{_offset(where, 0)}", _MASKS.get(where["part"], "")
            for index, parts, several in (
                ("row", ("column", "scalar"), self.rows > 1),
                ("column", ("row", "scalar"), self.columns > 1 and not self.document["by_row"]),
            ):
                if where["part"] in parts and (several or not mask):  # by the first row or column alone
                    place, mask = f"{place} + 0 * {index}", f"{mask} & ({index} == 0)" if mask else f"{index} == 0"
            text = self.values[name][0]
            stored = {"float32": "", "bool": ".to(tl.int1)"}.get(buffer["dtype"], f".to(tl.{buffer['dtype']})")
            yield f"tl.store({place}, {text}{stored}, mask={mask})"

    # ---- the function

    def _call(self) -> Iterator[str]:
        names = [f"i{i}" for i in range(len(self.document["inputs"]))]
        yield "def call(values):"
        yield '    """The kernel has run on `values`, which are gone from the list; its outputs."""'
        if names:
            yield from (
                f"    {line}" for line in _wrapped("(", names, ",) = values" if len(names) == 1 else ") = values")
            )
        yield "    values.clear()"
        yield from (f"    {name} = {name}.item()" for name in self.numbers)
        tensors = [name for name in names if name not in self.numbers]
        for name, buffer in self.document["buffers"].items():
            if not buffer["direct"]:
                size, strides = tuple(buffer["shape"]), tuple(buffer["strides"])
                like = f"dtype=torch.{buffer['dtype']}, device={tensors[0]}.device"
                yield f"    {name} = torch.empty_strided({size}, {strides}, {like})"
        if self.runs:
            yield from (f"    {line}" for line in self._launch(tensors[0]))
        for name, buffer in self.document["buffers"].items():
            if buffer["over"] is not None and not buffer["direct"]:
                yield f"    {buffer['over']}.copy_({name})"
        outputs = [self._output(one) for one in self.document["returned"]]
        yield from (f"    {line}" for line in _wrapped("return (", outputs, ",)" if len(outputs) == 1 else ")"))

    def _launch(self, first: str) -> Iterator[str]:
        given = [*self._pointers(), *self.numbers]
        over = [buffer["over"] for buffer in self.document["buffers"].values() if buffer["direct"]]
        by_row = self.document["by_row"]
        if self.tiles is None:
            height, width, warps = tiles_of(self.rows, self.columns, by_row=by_row)[0]
            programs = math.ceil(self.rows / height) * math.ceil(self.columns / width)
            yield f"with torch.cuda.device_of({first}):"
            yield f"    kernel = launch.jit({self.kernel}, *FUNCTIONS)[({programs},)]"
            sizes = [f"ROWS={height}", f"COLUMNS={width}", f"num_warps={warps}"]
            yield from (f"    {line}" for line in _wrapped("kernel(", [*given, *sizes], ")"))
            return
        yield f"def run({', '.join(['tile', *over])}):"
        yield f"    programs = launch.ceil_div({self.rows}, tile[0]) * launch.ceil_div({self.columns}, tile[1])"
        yield f"    kernel = launch.jit({self.kernel}, *FUNCTIONS)[(programs,)]"
        sizes = ["ROWS=tile[0]", "COLUMNS=tile[1]", "num_warps=tile[2]"]
        yield from (f"    {line}" for line in _wrapped("kernel(", [*given, *sizes], ")"))
        yield f"with torch.cuda.device_of({first}):"
        fastest = f"TILES.fastest(run, {first}, [{', '.join(over)}])"
        yield f"    run({', '.join([fastest, *over])})"

    def _output(self, one: Document) -> str:
        name, buffer = one["of"], self.document["buffers"].get(one["of"])
        held = name if buffer is None else self._buffer_name(name, buffer)
        if one["shape"] is None:
            return held
        start = f"{held}.storage_offset()" + (f" + {one['offset']}" if one["offset"] else "")
        return f"{held}.as_strided({tuple(one['shape'])}, {tuple(one['strides'])}, {start})"
