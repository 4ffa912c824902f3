"""From the text of a step graph back to the graph; see [Note: what a line says] in text.py.

What the text leaves out is computed: the fake tensors, by evaluating every call from the inputs on. A type that
disagrees with what its line yields is an error, so a text edited by hand is either consistent or refused.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import functools
import itertools
import math
import operator
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import RewriteError
from fxzero.graph import collectives as c10d
from fxzero.graph import ops, text
from fxzero.graph.edit import evaluate
from fxzero.graph.step_graph import INPUT_KINDS, PHASES, Result, Sharding, StateEntry, StepGraph

_HEADER = re.compile(
    r"# (?P<title>.*) \| (?P<mesh>no mesh|mesh(?: \w+=\d+)+) \| (?P<device>\w+)"
    r"(?: \| (?P<inputs>[\d,]+) inputs?, (?P<nodes>[\d,]+) nodes?, (?P<results>[\d,]+) results?,[^|]*)?"
    r"(?P<partial> \| (?:only|cut) .*)?"
)
_CALL = re.compile(
    r"(?P<mark>[fbu ]) +(?:%(?P<name>\w+) {2,}(?P<type>\S.*?) {2,})?(?P<op>[^\s%]\S*)(?: {2,}(?P<rest>.*))?"
)
_INPUT = re.compile(r"  %(?P<name>\w+) +(?P<type>\S.*?) {2,}(?P<kind>\w+) +(?P<rest>.*)")
_RESULT = re.compile(r"  %(?P<name>\w+) +-> (?P<kind>\w+) +(?P<rest>.*)")
_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<sizes>[^]]*)\](?:\{(?P<strides>[\d,]*)\})?(?:@(?P<device>\w+))?")
_ROWS = re.compile(r"(?P<rows>\d+)/(?P<axis>\w+)(?::(?P<count>\d+))?")
_TOKEN = re.compile(
    r"""\s*(?:(?P<node>%\w+) | (?P<string>'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*") | (?P<mark>[][(),=;#])
    | (?P<bare>[^][(),=;#%'"\s]+))""",
    re.VERBOSE,
)
_SCALARS: dict[str, Any] = {"float": 0.5, "int": 1, "bool": True}
_PYTHON = {"": operator, "math": math, "builtins": builtins, "torch": torch}


def from_text(source: str) -> StepGraph:
    """The step graph that `to_text` printed.

    Args:
        source: the text, whole; terminal colors may be in it.

    Raises:
        RewriteError: naming the line that cannot be read, or that does not yield the type that it says.
    """
    lines = re.sub(r"\x1b\[\d*m", "", source).splitlines()
    reader = _Reader(source)
    for number, line in enumerate(lines, start=1):
        try:
            reader.read(line.rstrip())
        except RewriteError as error:
            shown = " ".join(line.split())
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise error.at(f"line {number} {shown!r}") from error.__cause__
    return reader.finish()


def find_op(name: str) -> Any:
    """The op that the text calls `name`; the inverse of `op_name`."""
    named = {short: target for target, short in text.SHORT_NAMES.items()}
    if name in named:
        return named[name]
    found: Any = None
    if name.startswith("py."):
        module, _, function = name.removeprefix("py.").rpartition(".")
        found = getattr(_PYTHON.get(module), function, None)
    else:
        namespace, _, rest = name.rpartition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops, namespace or "aten"), packet, None)
        found = getattr(found, overload or "default", None)
    if found is None or text.op_name(found) != name:
        close = difflib.get_close_matches(name, [*named, *dir(torch.ops.aten)], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "import what registers it"
        _fail("op", expected="an op that torch or fxzero knows", got=repr(name), fix=hint)
    return found


def _fail(where: str, *, expected: str, got: str, fix: str, cause: Exception | None = None) -> NoReturn:
    raise RewriteError.of(where, expected=expected, got=got, fix=fix) from cause


@dataclass
class _Tokens:
    """The tokens of arguments and comment, read from the left."""

    items: list[tuple[str, str]]
    position: int = 0

    @classmethod
    def of(cls, source: str) -> _Tokens:
        items, position = [], 0
        while position < len(source.rstrip()):
            match = _TOKEN.match(source, position)
            if match is None:
                got = repr(source[position:].strip()[:20])
                _fail("arguments", expected="names, numbers, words, lists", got=got, fix="close the quotes")
            items.append((str(match.lastgroup), match[match.lastgroup or 0]))
            position = match.end()
        return cls(items)

    def peek(self, ahead: int = 0) -> str:
        """A token to come, "" after the last."""
        index = self.position + ahead
        return self.items[index][1] if index < len(self.items) else ""

    def take(self, *expected: str) -> tuple[str, str]:
        """The next token; it must be one of `expected`, where any are named."""
        found = (
            self.items[self.position] if self.position < len(self.items) else ("end", "the end of the line")
        )
        if found[0] == "end" or (expected and found[1] not in expected):
            wanted = " or ".join(map(repr, expected)) or "an argument"
            _fail("arguments", expected=wanted, got=found[1], fix="complete the list, or remove the comma")
        self.position += 1
        return found

    def at_comment(self) -> bool:
        """Whether the arguments are over."""
        return self.peek() in ("", "#")

    def word(self) -> str:
        """The next token as a name; quotes off."""
        kind, token = self.take()
        if kind not in ("string", "bare"):
            _fail("name", expected="a word or a quoted string", got=repr(token), fix="quote it")
        return str(ast.literal_eval(token)) if kind == "string" else token

    def words(self) -> list[str]:
        """Names between commas."""
        found = [self.word()]
        while self.peek() == ",":
            self.take(",")
            found.append(self.word())
        return found


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    return {name: dtype for dtype, name in text.dtype_names().items()}


def _constant(token: str) -> Any:
    """What a bare word among arguments means."""
    if token in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[token]
    if token in _dtypes():
        return _dtypes()[token]
    if isinstance(getattr(torch, token, None), (torch.memory_format, torch.layout)):
        return getattr(torch, token)
    for number in (int, float, complex, torch.device):
        try:
            return number(token)
        except (ValueError, RuntimeError):
            continue
    fix = "quote it if it is a string; a value in <> was not one that text can hold"
    _fail("arguments", expected="a number, dtype, memory format, layout or device", got=repr(token), fix=fix)


@dataclass
class _Reader:
    """Builds the graph line by line."""

    source: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    results: dict[Result, fx.Node] = field(default_factory=dict)
    header: re.Match[str] | None = None
    facts: frozenset[str] = frozenset()
    unnamed: Counter[str] = field(default_factory=Counter)
    section: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.mode = compat.new_fake_mode()
        self.step = StepGraph(self.graph)
        self.reserved = set(re.findall(r"^[fbu ] +%(\w+)", self.source, re.MULTILINE))

    def read(self, line: str) -> None:
        if not line:
            return
        if self.header is None:
            self._header(line)
        elif line.startswith("#"):
            if line.startswith("# facts: "):
                self.step.facts = frozenset(_Tokens.of(line.removeprefix("# facts: ")).words())
        elif line in text.SECTIONS:
            self._heading(line)
        elif self.section == "inputs":
            self._input(line)
        elif self.section == "results":
            self._result(line)
        else:
            self._call(line)

    def finish(self) -> StepGraph:
        """The whole graph, once every line is read."""
        if self.header is None or self.section != "results":
            missing = "header" if self.header is None else "section 'results'"
            fix = "give the whole text, as to_text(step) returns it"
            _fail("end of text", expected=f"a {missing}", got="the last line", fix=fix)
        found = {
            "inputs": len(self.step.placeholders),
            "nodes": len(self.step.calls()),
            "results": len(self.results),
        }
        for noun, number in found.items():
            if self.header[noun] is not None and int(self.header[noun].replace(",", "")) != number:
                fix = "restore the lines that are missing, or remove the counts from the header"
                _fail(
                    "end of text",
                    expected=f"{self.header[noun]} {noun}, as the header says",
                    got=str(number),
                    fix=fix,
                )
        self.graph.output(tuple(self.results.values())).meta["results"] = tuple(self.results)
        return self.step

    def _header(self, line: str) -> None:
        self.header = _HEADER.fullmatch(line)
        if self.header is None:
            expected = "a header such as '# captured | mesh dp=4 | cpu'"
            _fail(
                "header",
                expected=expected,
                got=repr(line[:40]),
                fix="give the whole text, from its first line on",
            )
        if self.header["partial"]:
            got = f"a text that is {self.header['partial'].strip(' |')}"
            _fail("header", expected="a whole text", got=got, fix="print it without phases= and width=")
        self.device, title = self.header["device"], self.header["title"]
        self.step.title = str(ast.literal_eval(title)) if title[:1] in ("'", '"') else title
        sizes = (axis.split("=") for axis in self.header["mesh"].split()[1:] if "=" in axis)
        self.step.mesh = {axis: int(size) for axis, size in sizes}

    def _heading(self, section: str) -> None:
        if self.section == "results" or (section == "inputs" and self.nodes):
            got = f"{section!r} after {self.section!r}"
            _fail(
                "section", expected=f"the order {', '.join(text.SECTIONS)}", got=got, fix="move the section"
            )
        self.section = section

    def _input(self, line: str) -> None:
        match = _INPUT.fullmatch(line)
        if match is None or match["kind"] not in INPUT_KINDS:
            expected = f"'  %name  type  kind  name' with a kind of {', '.join(INPUT_KINDS)}"
            got = "another form" if match is None else f"kind {match['kind']!r}"
            _fail("input", expected=expected, got=got, fix="correct the line")
        tokens = _Tokens.of(match["rest"])
        kind, name = match["kind"], tokens.word()
        node = self._add(match["name"], "placeholder", match["name"])
        val, sharding = self._input_val(match["type"], kind)
        node.meta = {"val": val, "phase": "forward", "module": ""}
        if sharding is not None:
            node.meta["sharding"] = sharding
        self._comment(tokens, node)
        shape = node.meta.pop("whole", text.whole_shape(val, node.meta.get("sharding")))
        owner = node.meta.pop("owner", text.default_owner(kind, name))
        node.meta["entry"] = StateEntry(kind, name, shape, owner)
        self._check_type(node, match["type"])

    def _input_val(self, shown: str, kind: str) -> tuple[Any, Sharding | None]:
        if shown in _SCALARS:
            return (0 if kind == "coordinate" else _SCALARS[shown]), None
        match = _TENSOR.fullmatch(shown)
        if match is None or match["dtype"] not in _dtypes():
            expected = f"a type such as f32[62/dp, 16], {', '.join(_SCALARS)}"
            _fail("type", expected=expected, got=repr(shown), fix="correct it")
        sharding = self._sharding(match["sizes"].split(", ")[0])
        sizes = [size for size in match["sizes"].split(", ") if size]
        if sharding is not None:
            sizes[0] = str(ops.shard_rows(sharding.rows, sharding.num_shards))
        if not all(size.isdigit() for size in sizes):
            _fail("type", expected="whole numbers as sizes", got=repr(shown), fix="correct it")
        shape = tuple(map(int, sizes))
        strides = text.contiguous_strides(shape)
        if match["strides"] is not None:
            strides = tuple(int(stride) for stride in match["strides"].split(",") if stride)
        if len(strides) != len(shape):
            _fail(
                "type", expected=f"{len(shape)} strides", got=str(len(strides)), fix="give one for each size"
            )
        device = torch.device(match["device"] or self.device)
        with self.mode:
            return torch.empty_strided(
                shape, strides, dtype=_dtypes()[match["dtype"]], device=device
            ), sharding

    def _sharding(self, shown: str) -> Sharding | None:
        match = _ROWS.fullmatch(shown)
        if match is None:
            return None
        size = self._axis_size(match["axis"])
        return Sharding(match["axis"], int(match["count"] or size), int(match["rows"]))

    def _axis_size(self, axis: str) -> int:
        if axis not in self.step.mesh:
            axes = ", ".join(self.step.mesh) or "it has none"
            _fail(
                "mesh",
                expected=f"an axis of the header's mesh ({axes})",
                got=repr(axis),
                fix="name one of them",
            )
        return self.step.mesh[axis]

    def _call(self, line: str) -> None:
        match = _CALL.fullmatch(line)
        if match is None or self.section not in PHASES:
            expected = "'  %name  type  op  arguments  # comment' below a heading"
            got = "another form" if match is None else f"heading {self.section!r}"
            _fail("line", expected=expected, got=got, fix=f"headings: {', '.join(text.SECTIONS)}")
        target = find_op(match["op"])
        tokens = _Tokens.of(match["rest"] or "")
        args, kwargs = self._collective(target, tokens) if target in c10d.TABLE else self._arguments(tokens)
        args = (list(args),) if target is ops.release else args
        node = self._add(match["name"] or self._free_name(target), "call_function", target, args, kwargs)
        phase = next((phase for phase in PHASES if phase[0] == match["mark"]), self.section)
        node.meta = {"phase": phase, "module": ""}
        shown = match["type"] or "None"
        sizes = _TENSOR.fullmatch(shown)
        sharding = self._sharding(sizes["sizes"].split(", ")[0]) if sizes else None
        if sharding is not None:
            node.meta["sharding"] = sharding
        self._comment(tokens, node)
        node.meta["val"] = _SCALARS[shown] if shown in _SCALARS else self._evaluated(node)
        self._check_type(node, shown)

    def _evaluated(self, node: fx.Node) -> Any:
        try:
            return evaluate(node, self.mode)
        except Exception as error:
            got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            _fail(
                "arguments", expected="what the op takes", got=got, fix="correct op or arguments", cause=error
            )

    def _check_type(self, node: fx.Node, shown: str) -> None:
        sharding = node.meta.get("sharding")
        found = text.type_text(node.meta["val"], self.step, device=self.device, sharding=sharding)
        if found != shown:
            _fail(
                "type", expected=f"{found}, which the line yields", got=shown, fix="correct type or arguments"
            )

    def _add(self, name: str, op: str, target: Any, *args: Any) -> fx.Node:
        if name in self.nodes:
            _fail("name", expected="each name once", got=f"%{name} again", fix="rename one of the two")
        node = self.graph.create_node(op, target, *args, name=name)
        if node.name != name:
            _fail(
                "name",
                expected="a name that FX keeps",
                got=f"%{name}",
                fix=f"write %{node.name}, here and below",
            )
        self.nodes[name] = node
        return node

    def _free_name(self, target: Any) -> str:
        """A name for a node whose line has none, since nothing reads it."""
        stem = text.op_name(target).rpartition(":")[2].partition(".")[0]
        if not text.returns_nothing(target):
            fix = "give both; only what yields nothing goes without"
            _fail("line", expected="a name and a type", got=f"neither for {stem!r}", fix=fix)
        names = (stem if index == 0 else f"{stem}_{index}" for index in itertools.count(self.unnamed[stem]))
        for name in names:
            self.unnamed[stem] += 1
            if name not in self.reserved:
                return name
        raise AssertionError("count() does not end")

    def _arguments(self, tokens: _Tokens) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = [], {}
        while not tokens.at_comment():
            if args or kwargs:
                tokens.take(",")
            if tokens.peek(1) == "=":
                name = tokens.word()
                tokens.take("=")
                kwargs[name] = self._value(tokens)
            else:
                args.append(self._value(tokens))
        return tuple(args), kwargs

    def _value(self, tokens: _Tokens) -> Any:
        kind, token = tokens.take()
        if kind == "node":
            if token[1:] not in self.nodes:
                close = difflib.get_close_matches(token[1:], self.nodes, n=1)
                hint = f"did you mean %{close[0]}?" if close else "define it first"
                _fail("arguments", expected="a node of a line above", got=token, fix=hint)
            return self.nodes[token[1:]]
        if kind == "string":
            return ast.literal_eval(token)
        if kind == "bare":
            return _constant(token)
        if token not in "[(":
            _fail("arguments", expected="an argument", got=repr(token), fix="complete the list")
        values, close = [], "]" if token == "[" else ")"
        while tokens.peek() != close:
            values.append(self._value(tokens))
            if tokens.peek() != close:
                tokens.take(",", close)
        tokens.take(close)
        return values if token == "[" else tuple(values)

    def _collective(self, target: Any, tokens: _Tokens) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`%x avg dp, 3.0 MiB`: what follows the comma is computed, the size of the group may be left out."""
        named: dict[str, Any] = {}
        for argument in target._schema.arguments:
            if argument.name == "group_size" and tokens.peek() != "group_size":
                continue
            if argument.name == "group_size":
                tokens.take()
                tokens.take("=")
            named[argument.name] = (
                tokens.word() if argument.name in ("reduce_op", "group_name") else self._value(tokens)
            )
        size = self._axis_size(named["group_name"])
        names = [argument.name for argument in target._schema.arguments]
        if not tokens.at_comment():
            tokens.take(",")
        while not tokens.at_comment():
            tokens.take()
        return tuple(named.get(name, size) for name in names), {}

    def _comment(self, tokens: _Tokens, node: fx.Node) -> None:
        """Put what stands after `#` into the node's meta."""
        while tokens.peek():
            tokens.take("#", ";")
            first = tokens.peek()
            alone = tokens.peek(1) in ("", ";")
            if alone or (first == "d" and node.meta["phase"] == "backward"):
                tokens.position += not alone
                node.meta["module"] = tokens.word()
            elif first in ("grad", "update", "state"):
                tokens.take()
                tokens.take("of")
                words = tuple(tokens.words())
                key, value = {"grad": ("grad_of", words), "update": ("param", words[0])}.get(
                    first, ("owner", words[0])
                )
                node.meta[key] = value
            elif first in ("for", "whole", "shard"):
                tokens.take()
                if first == "for":
                    node.meta["param"] = tokens.word()
                elif first == "whole":
                    node.meta["whole"] = tuple(self._value(tokens))
                else:
                    node.meta["sharding"] = self._sharding(tokens.word())
            else:
                expected = (
                    "a module, 'd MODULE', 'grad of', 'update of', 'for', 'whole', 'shard' or 'state of'"
                )
                _fail("comment", expected=expected, got=repr(first), fix="quote a name that has spaces")

    def _result(self, line: str) -> None:
        match = _RESULT.fullmatch(line)
        if match is None or match["name"] not in self.nodes:
            got = "another form" if match is None else f"%{match['name']}, which no line defines"
            _fail("result", expected="'  %name  -> kind  name'", got=got, fix="correct the line")
        result = Result(match["kind"], _Tokens.of(match["rest"]).word())
        if result in self.results:
            _fail(
                "result",
                expected="each result once",
                got=f"{result.kind} {result.name} again",
                fix="remove one",
            )
        self.results[result] = self.nodes[match["name"]]
