"""The Python of a step as files: the program that runs, and what was compiled for each distinct region of it.

    index.md        a table: which function serves how many regions, where, with which inputs and outputs
    program.py      the program of a rank, as it runs: single calls, and regions by name
    region_0.py ..  the module that was compiled for a function: Inductor's with its C++ or Triton kernels, or a
                    generated Triton kernel, under a head that lists the calls

The files are for reading: names in them are bound when a program is loaded, so none of them is run.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import fx

from fxzero.errors import LoweringError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import device_of, yields_tensor
from fxzero.graph.text import op_name
from fxzero.graph.type_text import type_text
from fxzero.lower.lower_regions import Lowered
from fxzero.lower.shared_functions import SharedFunction, shared_functions
from fxzero.lower.store import Store
from fxzero.runtime.emitter import Emitter

PROGRAM, INDEX = "program.py", "index.md"


@dataclass(frozen=True)
class ProgramSource:
    """One program of a step.

    Args:
        step: its graph.
        text: its Python.
        lowered: what its regions became; None: each call runs by itself.
        lowering: what made functions of them.
    """

    step: StepGraph
    text: str
    lowered: Lowered | None
    lowering: str


def unbound_text(step: StepGraph, lowered: Lowered | None) -> str:
    """The Python of a program for ranks that are not here: collectives name their axis.

    Args:
        step: the final graph.
        lowered: its regions.
    """
    return _UnboundEmitter(step, defaultdict(lambda: None), None, lowered).text()


class _UnboundEmitter(Emitter):
    """Writes a program without process groups."""

    def collective(self, node: fx.Node, args: list[str]) -> tuple[Any, list[str]]:
        if c10d.carrier_of(node) is not None:
            return super().collective(node, args)
        args[c10d.TABLE[node.target].axis_arg] = repr(c10d.axis_of(node))
        return node.target, args


def check_folder(folder: Path, *, where: str) -> None:
    """There is nothing in a folder, so that what is read there later belongs together.

    Raises:
        LoweringError: saying what is there.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or not folder.parent.is_dir():
        got = f"{folder}, in a folder that there is not" if not folder.exists() else f"{folder}, which has contents"
        fix = "give another path, or empty it"
        raise LoweringError.of(where, expected="a folder that is new or empty", got=got, fix=fix)


def write_source(folder: Path, programs: Sequence[ProgramSource], *, where: str) -> list[Path]:
    """Write the files of a step; of several programs, each in a folder of its own.

    Args:
        folder: new or empty.
        programs: one a microbatch; equal ones are the same graph.
        where: what errors say first.

    Returns:
        The files.

    Raises:
        LoweringError: if the folder has contents, or a compiled region is gone from disk.
    """
    check_folder(folder, where=where)
    distinct = list({id(program.step): program for program in programs}.values())
    folder.mkdir(exist_ok=True)
    if len(distinct) == 1:
        return _write(folder, distinct[0], where)
    written = []
    for number, program in enumerate(distinct):
        below = folder / f"program_{number}"
        below.mkdir()
        written += _write(below, program, where)
    return written


def _write(folder: Path, program: ProgramSource, where: str) -> list[Path]:
    files = {PROGRAM: f"# {program.step.title}, lowering {program.lowering}; for reading\n\n{program.text}"}
    functions = [] if program.lowered is None else shared_functions(program.step, lowered=program.lowered)
    for function in functions:
        source = _compiled(function, program, where)
        if source is not None:
            files[f"{function.name}.py"] = f"{_head(function, program.step)}\n{source}"
    files[INDEX] = _index(functions, program, files)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def _compiled(function: SharedFunction, program: ProgramSource, where: str) -> str | None:
    """The module that was made of a function's text; None where it runs call by call."""
    assert program.lowered is not None
    if function.regions[0].number in program.lowered.refused:
        return None
    path = Store(lowering=program.lowering).path(function.text)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fix = "compile the step again"
        raise LoweringError.of(where, expected=f"the module of {function.name}", got=str(error), fix=fix) from error


def _head(function: SharedFunction, step: StepGraph) -> str:
    """What stands above a module, as comments: where it is called, and the calls that it stands for."""
    form = function.form
    lines = [
        f"{function.name}: regions {function.numbers}, {function.where}",
        f"inputs   {_types(form.inputs, step)}",
        f"outputs  {_types(form.outputs, step) or 'none'}",
        f"written  {', '.join(f'%{node.name}' for node in form.written) or 'none'}",
        "",
        *(_call(node) for node in function.regions[0].calls),
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n"


def _call(node: fx.Node) -> str:
    args = [str(arg) for arg in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    return f"%{node.name} = {op_name(node.target)}({', '.join(args)})"


def _index(functions: Sequence[SharedFunction], program: ProgramSource, files: Mapping[str, str]) -> str:
    step = program.step
    if not functions:
        return f"# {step.title}\n\nNo regions: lowering {program.lowering} runs each call by itself, see {PROGRAM}.\n"
    rows = [
        [
            function.name,
            len(function.regions),
            function.where,
            len(function.regions[0].calls),
            _types(function.form.inputs, step),
            _types(function.form.outputs, step),
            f"{function.name}.py" if f"{function.name}.py" in files else "none: it runs call by call",
        ]
        for function in functions
    ]
    headers = ["function", "regions", "where", "calls", "inputs", "outputs", "file"]
    count = sum(len(function.regions) for function in functions)
    title = f"# {step.title}\n\n{count} regions of {len(functions)} functions, lowering {program.lowering}."
    return f"{title} The program that calls them: {PROGRAM}.\n\n{tabulate(rows, headers=headers, tablefmt='github')}\n"


def _types(nodes: Sequence[fx.Node], step: StepGraph) -> str:
    """The types of values, equal neighbours once."""
    device = device_of(step)
    shown = [type_text(n.meta["val"], step, device=device) if yields_tensor(n) else "number" for n in nodes]
    runs = ((name, len([*group])) for name, group in itertools.groupby(shown))
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in runs)
