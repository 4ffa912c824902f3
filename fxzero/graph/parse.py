"""From the text of a step graph back to the graph; see [Note: what a line says] in text.py.

The fake tensors are computed, by evaluating every call from the inputs on. A type that differs from what its
line yields is an error, so a text edited by hand is either consistent or refused.
"""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import math
import operator
import re
import textwrap
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import RewriteError
from fxzero.graph import collectives as c10d
from fxzero.graph import kernel_ops, ops, text, type_text
from fxzero.graph.edit import evaluate
from fxzero.graph.step_graph import ADDED_UP, INPUT_KINDS, PHASES, TANGENT, Result, StateEntry, StepGraph

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_HEADER = re.compile(
    r"# (?P<title>.*) \| (?P<mesh>no mesh|mesh(?: \w+=\d+)+) \| (?P<device>\w+)"
    r"(?: \| (?P<inputs>[\d,]+) inputs?, (?P<nodes>[\d,]+) nodes?, (?P<results>[\d,]+) results?,[^|]*)?"
    r"(?P<partial> \| (?:only|cut) .*)?"
)
_REST = rf"""(?P<code>(?:{_QUOTED}|[^'"#])*?)\s*(?:# *(?P<comment>.*))?"""
_CALL = re.compile(
    rf"(?P<mark>[fbu ]) +(?:%(?P<name>\w+) {{2,}}(?P<type>\S.*?) {{2,}})?(?P<op>[^\s%]\S*)(?: {{2,}}{_REST})?"
)
_INPUT = re.compile(rf"  %(?P<name>\w+) {{2,}}(?P<type>\S.*?) {{2,}}(?P<kind>\w+) {{2,}}{_REST}")
_RESULT = re.compile(rf"  %(?P<name>\w+) +-> (?P<kind>\w+) +(?P<of>{_QUOTED}|[^\s'\"]+)")
_LIES = re.compile(rf" *lies (?P<how>\(.*\)|\S+(?: \d+(?: of \d+)?\))?) over (?P<axis>{_QUOTED}|[^\s,]+) *")

# What a scalar's line yields while shapes are computed; nothing but its type matters.
_SCALARS: dict[str, Any] = {"float": 0.5, "int": 1, "bool": True}
# Whose functions a text may call, besides ops; `op_name` keeps it to those that a trace can hold.
_PYTHON: dict[str, Any] = {"": operator, "math": math, "torch": torch}
# Python reads the arguments; for that, a letter that no name has stands for each % that is in no quotes.
_PERCENT = "\u01c2"
_PERCENTS = re.compile(rf"({_QUOTED})|%")
_PLAIN = "names, numbers, words and lists"


def from_text(source: str) -> StepGraph:
    """The step graph that `to_text` printed.

    Args:
        source: the text, whole; terminal colors may be in it.

    Raises:
        RewriteError: naming the line that cannot be read, or that does not yield the type that it says.
    """
    lines = [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", source).split("\n")]
    reader = _Reader(lines)
    for number, line in enumerate(lines, start=1):
        try:
            reader.read(line)
        except RewriteError as error:
            shown = textwrap.shorten(line, 80, placeholder="...")
            raise error.at(f"line {number} {shown!r}") from error.__cause__
    return reader.finish()


@functools.cache
def find_op(name: str) -> Any:
    """The op that the text calls `name`; the inverse of `op_name`."""
    named = {short: target for target, short in text.SHORT_NAMES.items()}
    found: Any = named.get(name)
    if found is None and name.startswith("py."):
        module, _, function = name.removeprefix("py.").rpartition(".")
        found = getattr(_PYTHON.get(module), function, None)
    elif found is None:
        namespace, _, rest = name.rpartition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops, namespace or "aten"), packet, None)
        found = getattr(found, overload or "default", None)
    if found is None or text.op_name(found) != name:
        close = difflib.get_close_matches(name, [*named, *kernel_ops.NAMES, *dir(torch.ops.aten)], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "import what registers it"
        _fail("op", "an op that torch or fxzero knows", repr(name), hint)
    return found


def _fail(where: str, expected: str, got: str, fix: str, cause: Exception | None = None) -> NoReturn:
    raise RewriteError.of(where, expected=expected, got=got, fix=fix) from cause


def _unquoted(word: str) -> str:
    if not re.fullmatch(_QUOTED, word):
        return word
    try:
        return str(ast.literal_eval(word))
    except (SyntaxError, ValueError) as error:
        _fail("quotes", "a Python string", word, "correct the escapes", error)


def _placement(how: str) -> Any:
    try:
        return type_text.read_placement(how)
    except ValueError as error:
        _fail("comment", "R, S(0), S(0, 2), P(sum), P(max) or P(norm2)", repr(how), "correct it", error)


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    return {name: dtype for dtype, name in type_text.dtype_names().items()}


def _constant(word: str) -> Any:
    """What a bare word among arguments means."""
    if word in _dtypes():
        return _dtypes()[word]
    if isinstance(getattr(torch, word, None), (torch.memory_format, torch.layout)):
        return getattr(torch, word)
    if word in ("inf", "nan"):
        return float(word)
    try:
        return torch.device(word)
    except RuntimeError:
        _fail("arguments", "a dtype, memory format, layout or device", repr(word), "quote it, if a string")


class _Reader:
    """Builds the graph, line by line."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.step = StepGraph(fx.Graph())
        self.mode = compat.new_fake_mode()
        self.header: re.Match[str] | None = None
        self.section = ""
        self.nodes: dict[str, fx.Node] = {}
        self.results: dict[Result, fx.Node] = {}
        self.reserved = {match[1] for match in (re.match(r"[fbu ] +%(\w+)", line) for line in lines) if match}

    def read(self, line: str) -> None:
        if not line:
            return
        if self.header is None:
            self._header(line)
        elif line.startswith("# facts: "):
            words = re.findall(rf"{_QUOTED}|[^\s,]+", line.removeprefix("# facts: "))
            self.step.facts = frozenset(map(_unquoted, words))
        elif line in text.SECTIONS:
            if self.section == "results" or (line == "inputs" and self.nodes):
                expected = f"the order {', '.join(text.SECTIONS)}"
                _fail("heading", expected, f"{line!r} after {self.section!r}", "move the section")
            self.section = line
        elif not line.startswith("#"):
            readers = {"inputs": self._input, "results": self._result}
            readers.get(self.section, self._call)(line)

    def finish(self) -> StepGraph:
        """The whole graph, once every line is read."""
        if self.header is None or self.section != "results":
            missing = "a header" if self.header is None else "a section 'results'"
            _fail("end of text", missing, "the last line", "give the whole text, as to_text(step) returns it")
        found = {"inputs": self.step.placeholders, "nodes": self.step.calls(), "results": self.results}
        for noun, items in found.items():
            said = self.header[noun]
            if said is not None and int(said.replace(",", "")) != len(items):
                fix = "restore the lines that are missing, or remove the counts from the header"
                _fail("end of text", f"{said} {noun}, as the header says", str(len(items)), fix)
        self.step.graph.output(tuple(self.results.values())).meta["results"] = tuple(self.results)
        return self.step

    def _header(self, line: str) -> None:
        self.header = _HEADER.fullmatch(line)
        if self.header is None:
            expected = "one such as '# captured | mesh dp=4 | cpu'"
            _fail("header", expected, repr(line[:40]), "give the whole text, from its first line on")
        if self.header["partial"]:
            mark = self.header["partial"].strip(" |")
            _fail("header", "a whole text", f"one marked {mark!r}", "print it without phases= and width=")
        self.device = self.header["device"]
        self.step.title = _unquoted(self.header["title"])
        self.step.mesh = {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", self.header["mesh"])}

    def _input(self, line: str) -> None:
        match = _INPUT.fullmatch(line)
        if match is None or match["kind"] not in INPUT_KINDS:
            got = "another form" if match is None else f"kind {match['kind']!r}"
            _fail("input", "'  %name  type  kind  name'", got, f"kinds: {', '.join(INPUT_KINDS)}")
        node = self._add(match["name"], "placeholder", match["name"])
        kind, name = match["kind"], _unquoted(match["code"])
        stated = self._describe(node, "backward" if kind == TANGENT else "forward", match["type"], match["comment"])
        node.meta["val"] = self._input_val(match["type"], kind)
        shape = stated.get("whole", type_text.whole_shape(node, self.step.mesh))
        owner = stated.get("state of", text.default_owner(kind, name))
        node.meta["entry"] = StateEntry(kind, name, shape, owner)
        self._check_type(node, match["type"])

    def _input_val(self, shown: str, kind: str) -> Any:
        if shown in _SCALARS:
            return 0 if kind == "coordinate" else _SCALARS[shown]
        found = type_text.read_type(shown, self._axis_size)
        if found.dtype not in _dtypes() or not all(size.isdigit() for size in found.sizes):
            _fail("type", f"one such as f32[62/dp, 16], {', '.join(_SCALARS)}", repr(shown), "correct it")
        shape = tuple(map(int, found.sizes))
        strides = type_text.contiguous_strides(shape) if found.strides is None else found.strides
        try:
            with self.mode:
                device, dtype = found.device or self.device, _dtypes()[found.dtype]
                return torch.empty_strided(shape, strides, dtype=dtype, device=device)
        except RuntimeError as error:
            _fail("type", "a tensor that torch can make", repr(shown), "correct strides or device", error)

    def _axis_size(self, axis: str) -> int:
        if axis not in self.step.mesh:
            axes = ", ".join(self.step.mesh) or "none"
            _fail("mesh", f"an axis of the header's ({axes})", repr(axis), "correct it, here or there")
        return self.step.mesh[axis]

    def _call(self, line: str) -> None:
        match = _CALL.fullmatch(line)
        if match is None or self.section not in PHASES:
            got = "another form" if match is None else f"the heading {self.section!r}"
            expected = "'  %name  type  op  arguments  # comment' under a heading"
            _fail("line", expected, got, f"headings: {', '.join(text.SECTIONS)}")
        target = find_op(match["op"])
        code = match["code"] or ""
        args, kwargs = self._collective(code, target) if target in c10d.TABLE else self._arguments(code)
        args = (list(args),) if target is ops.release else args
        node = self._add(match["name"] or self._free_name(target), "call_function", target, args, kwargs)
        phase = next((phase for phase in PHASES if phase[0] == match["mark"]), self.section)
        shown = match["type"] or "None"
        self._describe(node, phase, shown, match["comment"])
        returned = target._schema.returns if isinstance(target, text.OpOverload) else ()
        scalar = shown in _SCALARS and not any("Tensor" in str(item.type) for item in returned)
        try:
            node.meta["val"] = _SCALARS[shown] if scalar else evaluate(node, self.mode)
        except Exception as error:
            got = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            _fail("arguments", "what the op takes", got, "correct the op or its arguments", error)
        self._check_type(node, shown)

    def _check_type(self, node: fx.Node, shown: str) -> None:
        found = type_text.type_of(node, self.step, device=self.device)
        if found != shown:
            _fail("type", f"{found}, which the line yields", shown, "correct the type or the arguments")

    def _add(self, name: str, op: str, target: Any, args: Any = None, kwargs: Any = None) -> fx.Node:
        if name in self.nodes:
            _fail("name", "each name once", f"%{name} again", "rename one of the two")
        node = self.step.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            _fail("name", "a name that FX keeps", f"%{name}", f"write %{node.name}, here and below")
        self.nodes[name] = node
        return node

    def _free_name(self, target: Any) -> str:
        """A name for a node whose line has none, since nothing reads it."""
        stem = text.op_name(target).rpartition(":")[2].partition(".")[0]
        if not text.returns_nothing(target):
            _fail("line", "a name and a type", f"neither for {stem!r}", "give both")
        numbered = (f"{stem}_{number}" for number in itertools.count(len(self.nodes)))
        return next(name for name in numbered if name not in self.reserved)

    def _arguments(self, code: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            call = ast.parse(f"f({_PERCENTS.sub(lambda m: m[1] or _PERCENT, code)})", mode="eval").body
        except (SyntaxError, ValueError) as error:
            fix = "complete them; a value in <> is one that a text cannot hold"
            _fail("arguments", _PLAIN, repr(code), fix, error)
        if not isinstance(call, ast.Call):
            _fail("arguments", _PLAIN, repr(code), "remove the ) too many")
        args = tuple(map(self._value, call.args))
        return args, {str(keyword.arg): self._value(keyword.value) for keyword in call.keywords}

    def _value(self, item: ast.expr) -> Any:
        if isinstance(item, ast.Name) and item.id.startswith(_PERCENT):
            name = item.id.removeprefix(_PERCENT)
            if name not in self.nodes:
                _fail("arguments", "a node of a line above", f"%{name}", "correct the name, or define it first")
            return self.nodes[name]
        if isinstance(item, ast.Name):
            return _constant(item.id)
        if isinstance(item, (ast.List, ast.Tuple)):
            values = map(self._value, item.elts)
            return list(values) if isinstance(item, ast.List) else tuple(values)
        try:
            return -math.inf if ast.unparse(item) == "-inf" else ast.literal_eval(item)
        except (ValueError, TypeError) as error:
            got = repr(ast.unparse(item).replace(_PERCENT, "%"))
            _fail("arguments", _PLAIN, got, "write plain values", error)

    def _collective(self, code: str, target: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`%x avg dp, 3.0 MiB`: the bytes are computed, and so is the group's size where not given."""
        given = re.search(r" group_size=(\d+)", code)
        shown = re.sub(r" group_size=\d+|, [\d.]+ \w*B$", "", code)
        words = re.findall(rf"{_QUOTED}|\[[^]]*\]|[^\s,=*[\]]+", shown)
        names = [argument.name for argument in target._schema.arguments]
        wanted = [name for name in names if name != "group_size"]
        if len(words) != len(wanted):
            _fail("arguments", f"{' '.join(wanted)}, bytes", repr(code), "complete them")
        size = self._axis_size(_unquoted(words[-1]))
        found: dict[str, Any] = {"group_size": int(given[1]) if given else size}
        for name, word in zip(wanted, words, strict=True):
            plain = name in ("reduce_op", "group_name")
            found[name] = _unquoted(word) if plain else self._arguments(word)[0][0]
        return tuple(found[name] for name in names), {}

    def _describe(self, node: fx.Node, phase: str, shown: str, comment: str | None) -> dict[str, Any]:
        """Fill the node's meta from type and comment; returns what is said about an input's entry."""
        node.meta = {"phase": phase, "module": ""}
        told = type_text.read_type(shown, self._axis_size)
        placements = dict(told.placements)
        if told.sharding is not None:
            node.meta["sharding"] = told.sharding
        stated: dict[str, Any] = {}
        for part in re.findall(rf"""(?:{_QUOTED}|[^;'"])+""", comment or ""):
            if lies := _LIES.fullmatch(part):
                placements[_unquoted(lies["axis"])] = _placement(lies["how"])
                continue
            match re.findall(rf"{_QUOTED}|[^\s,]+", part):
                case ["d", module] if phase == "backward":
                    node.meta["module"] = _unquoted(module)
                case [module] if phase != "backward":
                    node.meta["module"] = _unquoted(module)
                case ["grad", "of", *names]:
                    node.meta["grad_of"] = tuple(map(_unquoted, names))
                case ["update", "of", name] | ["for", name]:
                    node.meta["param"] = _unquoted(name)
                case ["shard", rows] if (read := type_text.read_size(rows, self._axis_size)).sharding is not None:
                    node.meta["sharding"] = read.sharding
                case ["on", tier]:
                    node.meta["tier"] = _unquoted(tier)
                case ["by", name]:
                    node.meta["algorithm"] = _unquoted(name)
                case ["region", number] if number.isdecimal():
                    node.meta["region"] = int(number)
                case ["chunk", number] if number.isdecimal():
                    node.meta["chunk"] = int(number)
                case ["added", "up"]:
                    node.meta["chunk"] = ADDED_UP
                case ["because", *words] if words:
                    node.meta["because"] = " ".join(map(_unquoted, words))
                case ["whole", *sizes] if re.fullmatch(r"\[[\d, ]*\]", ", ".join(sizes)):
                    stated["whole"] = tuple(ast.literal_eval(", ".join(sizes)))
                case ["state", "of", name]:
                    stated["state of"] = _unquoted(name)
                case _:
                    expected = (
                        "a module, grad of, update of, for, shard, lies, on, by, region, because, whole or state of"
                    )
                    _fail("comment", expected, repr(part.strip()), "correct it; quote names that have spaces")
        if placements:
            node.meta["placements"] = placements
        return stated

    def _result(self, line: str) -> None:
        match = _RESULT.fullmatch(line)
        if match is None or match["name"] not in self.nodes:
            got = "another form" if match is None else f"%{match['name']}, which no line defines"
            _fail("result", "'  %name  -> kind  name'", got, "correct the line")
        result = Result(match["kind"], _unquoted(match["of"]))
        if result in self.results:
            _fail("result", "each result once", f"{result.kind} {result.name} again", "remove one of the two")
        self.results[result] = self.nodes[match["name"]]
