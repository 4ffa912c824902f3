"""The readable form of a step graph: one line a node, equal between runs and ranks; parse.py reads it back.

    # after shard_parameters | mesh dp=4 | cpu | 3 inputs, 4 nodes, 2 results, 1 collective forward
    inputs
      %weight         f32[16/dp, 16]  parameter   embed.weight
    forward
      %weight_gather  f32[64, 16]     all_gather  %weight dp, 4.0 KiB             # embed; for embed.weight
      %weight_full    f32[64, 16]     wait        %weight_gather                  # embed; for embed.weight
                                      release     %weight_full                    # embed

[Note: what a line says]
Types: dtype, shape, strides and device where they are not the usual ones. `62/dp` in front is this rank's part of 62
rows that are sharded over the axis dp; `f32[8, 512/tp]` is a part of dim 1, and `f32[8, 64]+tp` has still to be added
up over tp ([Note: what a type says] in type_text.py). ATen ops go by their own name, without `.default`; Python's
operators as `py.mul`; other namespaces in front, `prims::copy_to`. A collective names the mesh axis and the bytes of
what a rank has before or after it, whichever is more. After `#` come the module (`d module` for what differentiates
it), the parameters whose gradient the node is, the parameter whose update (or gather, or reduction) it belongs to,
the tier that it rests on off the device, the algorithm of a collective, the region that a call is compiled in, and
why a value is made to lie otherwise (`because mm needs all of dim 1`).

[Note: sections and phases]
Each section comes once, in program order: `backward` goes from the first to the last backward node, `update` is what
follows. A node of another phase than its section's, such as an update placed under backward, has the initial of its
phase in the first column. So a node that moves changes one line, not the headings around it.

[Note: one program on all ranks]
Ranks compare this text, so it holds nothing that differs between them: a device is "cuda", never "cuda:3".
"""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import compression_ops, error_feedback_ops, ops, routing_ops, row_exchange_ops, swap_ops
from fxzero.graph.step_graph import ADDED_UP, PHASES, StepGraph, num_bytes
from fxzero.graph.type_text import (
    dtype_names,
    fits,
    placement_text,
    sharding_text,
    type_of,
    unshown_placements,
    whole_shape,
)

SECTIONS = ("inputs", *PHASES, "results")
SHORT_NAMES: dict[Any, str] = {
    **{target: row.name for target, row in c10d.TABLE.items()},
    c10d.wait: "wait",
    ops.release: "release",
    ops.local_shard: "local_shard",
    **{op: op.name().removeprefix("fxzero::") for op in (*compression_ops.OPS, *error_feedback_ops.OPS, *swap_ops.OPS)},
    **{op: op.name().removeprefix("fxzero::") for op in (*routing_ops.OPS, *row_exchange_ops.OPS)},
    ops.local_part: "local_part",
    ops.put_part: "put_part",
    ops.on_rank: "on_rank",
    ops.nonfinite: "nonfinite",
    ops.on_device: "on_device",
    operator.getitem: "getitem",
}
# A column is as wide as its widest cell up to this; wider cells push only their own line out.
_WIDEST = (32, 24, 24, 48)
_WIDTH_STEP = 4
_COLORS = {"heading": "1", "comment": "2", "wait": "34", "release": "35"}
_COLORS |= {"swap_out": "33", "swap_in": "33", "swap_wait": "34"}
_COLORS |= {row.name: "36" for row in c10d.TABLE.values()}
_WORD = re.compile(r"[\w.:/+@-]+")
_SENTENCE = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern})*")

OpOverload = type(ops.release)


@functools.cache
def op_name(target: Any) -> str:
    """What the text calls an op; `find_op` in parse.py is the way back."""
    if target in SHORT_NAMES:
        return SHORT_NAMES[target]
    if isinstance(target, OpOverload):
        return target.name().removeprefix("aten::")
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    if module == "_operator":
        return f"py.{name}"
    if module == "math" or (module == "torch" and "sym_" in str(name)):
        return f"py.{module}.{name}"
    return f"<{name or type(target).__name__}>"


def launch_name(launch: fx.Node) -> str:
    """What people are told that a wait waits for."""
    return "gather of the step before" if c10d.is_ahead(launch) else op_name(launch.target)


def size_text(size_bytes: int) -> str:
    """A number of bytes as people say it: 3.0 MiB."""
    size, units = float(size_bytes), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{size_bytes} B"


def _word(name: str) -> str:
    return name if _WORD.fullmatch(name) else repr(name)


def _sentence(words: str) -> str:
    return words if _SENTENCE.fullmatch(words) else repr(words)


def default_device(step: StepGraph) -> str:
    """The kind of device that the header names: that of the first tensor among the inputs."""
    vals = (node.meta["val"] for node in step.placeholders)
    return next((val.device.type for val in vals if isinstance(val, torch.Tensor)), "cpu")


def value_text(value: Any) -> str:
    """One argument; `<kind>` for what cannot be read back."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, complex):
        return repr(value).strip("()")
    if isinstance(value, torch.dtype):
        return dtype_names()[value]
    if isinstance(value, (torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    return f"<{type(value).__name__}>"


@functools.cache
def _defaults(target: Any) -> dict[str, str]:
    if not isinstance(target, OpOverload):
        return {}
    return {a.name: value_text(a.default_value) for a in target._schema.arguments if a.has_default_value()}


def args_text(node: fx.Node, mesh: dict[str, int]) -> str:
    """The arguments of a call; keyword arguments at their default are left out."""
    if c10d.is_collective(node):
        return _collective_args_text(node, mesh)
    if c10d.is_release(node) and isinstance(node.args[0], (list, tuple)):
        return ", ".join(map(value_text, node.args[0]))
    defaults = _defaults(node.target)
    parts = [value_text(value) for value in node.args]
    for key, value in node.kwargs.items():
        if value_text(value) != defaults.get(key):
            parts.append(f"{key}={value_text(value)}")
    return ", ".join(parts)


def _collective_args_text(node: fx.Node, mesh: dict[str, int]) -> str:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    named: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    parts = []
    for name, value in named.items():
        if name == "group_size" and value == mesh.get(named["group_name"]):
            continue
        shown = _word(value) if isinstance(value, str) else value_text(value)
        parts.append(f"group_size={shown}" if name == "group_size" else shown)
    sources = [n.meta.get("val") for n in node.all_input_nodes]
    whole_bytes = max(num_bytes(sources), num_bytes(node.meta.get("val")))
    return f"{' '.join(parts)}, {size_text(whole_bytes)}"


def comment_text(node: fx.Node, mesh: dict[str, int]) -> str:
    """What the node belongs to; see [Note: what a line says]."""
    meta, parts = node.meta, []
    if node.op == "placeholder":
        entry = meta["entry"]
        if entry.shape != whole_shape(node, mesh):
            parts.append(f"whole {value_text(list(entry.shape))}")
        if entry.param not in (None, default_owner(entry.kind, entry.name)):
            parts.append(f"state of {_word(entry.param)}")
    elif meta.get("module"):
        parts.append(("d " if meta.get("phase") == "backward" else "") + _word(meta["module"]))
    if meta.get("grad_of"):
        parts.append(f"grad of {', '.join(map(_word, meta['grad_of']))}")
    if meta.get("param") is not None:
        parts.append(f"{'update of' if meta.get('phase') == 'update' else 'for'} {_word(meta['param'])}")
    if meta.get("sharding") is not None and not fits(meta["sharding"], meta.get("val")):
        parts.append(f"shard {sharding_text(meta['sharding'], mesh)}")
    for axis, found in unshown_placements(meta.get("val"), meta.get("placements", {}), mesh).items():
        parts.append(f"lies {placement_text(found)} over {_word(axis)}")
    if meta.get("tier") is not None:
        parts.append(f"on {_word(meta['tier'])}")
    if meta.get("algorithm") is not None:
        parts.append(f"by {_word(meta['algorithm'])}")
    if meta.get("region") is not None:
        parts.append(f"region {meta['region']}")
    if meta.get("chunk") is not None:
        parts.append("added up" if meta["chunk"] == ADDED_UP else f"chunk {meta['chunk']}")
    if meta.get("because") is not None:
        parts.append(f"because {_sentence(meta['because'])}")
    return "; ".join(parts)


def default_owner(kind: str, name: str) -> str | None:
    """The parameter that an input belongs to, as far as its name tells."""
    return name.rpartition(":")[0] if kind == "optimizer" else None


@dataclass(frozen=True)
class _Line:
    mark: str
    cells: tuple[str, ...]
    comment: str = ""


def to_text(
    step: StepGraph, *, phases: Collection[str] | None = None, color: bool = False, width: int | None = None
) -> str:
    """The text of a step graph; `from_text` reads it back where `phases` and `width` are left alone.

    Args:
        step: the graph.
        phases: print only these of SECTIONS.
        color: with terminal escapes.
        width: cut comments so that lines have at most this many characters, where the rest of them allows it.
    """
    device = default_device(step)
    wanted = SECTIONS if phases is None else phases
    sections: dict[str, list[_Line]] = {name: [] for name in SECTIONS}
    if "inputs" in wanted:
        sections["inputs"] = [_line(node, step, device, "inputs") for node in step.placeholders]
    for section, node in _sectioned(step.calls()):
        if phases is None or node.meta.get("phase") in phases:
            sections[section].append(_line(node, step, device, section))
    if "results" in wanted:
        for (kind, name), node in step.results.items():
            sections["results"].append(_Line(" ", (f"%{node.name}", f"-> {kind}", _word(name))))
    lines = list(_header(step, device, phases=phases, width=width))
    if any(line.mark != " " for found in sections.values() for line in found):
        lines.append("# first column: f, b, u = a node of forward, backward, update under another heading")
    lines = [_painted(line, "comment", color) for line in lines]
    for name, found in sections.items():
        if found or (name == "results" and name in wanted):
            lines.append(_painted(name, "heading", color))
            lines += _aligned(found, color=color, width=width)
    return "\n".join(lines) + "\n"


def _line(node: fx.Node, step: StepGraph, device: str, section: str) -> _Line:
    phase = node.meta.get("phase", "?")
    cells = [f"%{node.name}", type_of(node, step, device=device)]
    if returns_nothing(node.target) and not node.users:
        cells = ["", ""]
    if node.op == "placeholder":
        cells += [node.meta["entry"].kind, _word(node.meta["entry"].name)]
    else:
        name = op_name(node.target) if node.op == "call_function" else f"<{node.op}>"
        cells += [name, args_text(node, step.mesh)]
    mark = " " if section in (phase, "inputs") else phase[0]
    return _Line(mark, tuple(cells), comment_text(node, step.mesh))


def returns_nothing(target: Any) -> bool:
    """Whether an op yields no value, so that its line needs no name."""
    return isinstance(target, OpOverload) and not target._schema.returns


def _sectioned(calls: list[fx.Node]) -> Iterator[tuple[str, fx.Node]]:
    """(heading, node); see [Note: sections and phases]."""
    phases = [node.meta.get("phase") for node in calls]
    last = {phase: index for index, phase in enumerate(phases)}
    end_of_forward = phases.index("backward") if "backward" in last else last.get("forward", -1) + 1
    end_of_backward = last.get("backward", end_of_forward - 1) + 1
    for index, node in enumerate(calls):
        yield PHASES[(index >= end_of_forward) + (index >= end_of_backward)], node


def _header(step: StepGraph, device: str, *, phases: Collection[str] | None, width: int | None) -> Iterator[str]:
    title, calls = step.title, step.calls()
    if not title.isprintable() or title != title.strip() or title[:1] in ("", "'", '"'):
        title = repr(title)
    mesh = " ".join(["mesh", *(f"{axis}={size}" for axis, size in step.mesh.items())])
    sizes = {"input": len(step.placeholders), "node": len(calls), "result": len(step.results)}
    counts = [f"{number:,} {noun}{'s' * (number != 1)}" for noun, number in sizes.items()]
    launched = Counter(node.meta.get("phase") for node in calls if c10d.is_collective(node))
    for phase in filter(launched.get, PHASES):
        noun = f"collective{'s' * (launched[phase] != 1)} " if len(counts) == len(sizes) else ""
        counts.append(f"{launched[phase]:,} {noun}{phase}")
    if not launched:
        counts.append("no collectives")
    parts = [title, mesh if step.mesh else "no mesh", device, ", ".join(counts)]
    if phases is not None:
        parts.append(f"only {', '.join(section for section in SECTIONS if section in phases)}")
    if width is not None:
        parts.append(f"cut at {width}")
    yield f"# {' | '.join(parts)}"
    if step.facts:
        yield f"# facts: {', '.join(map(_word, sorted(step.facts)))}"


def _aligned(lines: list[_Line], *, color: bool, width: int | None) -> Iterator[str]:
    """The lines of one section, in columns; a cell that is too wide pushes what follows as far as it must."""
    starts = [2]
    for index, widest in enumerate(_WIDEST):
        sizes = [len(line.cells[index]) for line in lines if index < len(line.cells)]
        column = max((size for size in sizes if size <= widest), default=0)
        starts.append(starts[-1] + -(-column // _WIDTH_STEP) * _WIDTH_STEP + 2)
    for line in lines:
        text = plain = line.mark
        comment = f"# {line.comment}" if line.comment else ""
        cells = [*line.cells, *[""] * (len(_WIDEST) - len(line.cells)), comment]
        for index, (start, cell) in enumerate(zip(starts, cells, strict=True)):
            if not cell:
                continue
            gap = " " * max(start - len(plain), 2 if index else 1)
            kind = cell if index == 2 else "comment" if index == 4 else ""
            if index == 4 and width is not None:
                cell = _cut(cell, width - len(plain + gap))
            text, plain = text + gap + _painted(cell, kind, color), plain + gap + cell
        yield text


def _cut(comment: str, room: int) -> str:
    kept = max(room, 14) - 3
    return comment if len(comment) <= kept + 3 else f"{comment[: kept // 3]}...{comment[kept // 3 - kept :]}"


def _painted(text: str, kind: str, color: bool) -> str:
    return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m" if color and kind in _COLORS else text
