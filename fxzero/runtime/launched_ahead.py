"""Gathers that are under way from one step to the next, and when they have to be launched anew.

[Note: what was launched is what is read]
A gather that a step has launched holds the parameters as that step left them, and they may be written before the next
one: edited in place, loaded from a checkpoint, written back by `unsharded`. On the CPU this rank's rows are compared,
bit by bit, with those that were sent, which are a copy; on a GPU the host cannot ask so without waiting for the device:
there, torch's counts of writes must do, which miss what is written through `.data`. On both, other memory than that
which was sent is a change. A rank that sees one says so where ranks vote, since others see only their own rows; if any
does, all wait for what is under way, drop it, and gather anew. So it is at the first step, and after one that failed. A
program that waits for other gathers than those that were launched (its batch has another shape, say) has what it lacks
launched before it begins; what it does not read is waited for and dropped.

[Note: what nobody waits for]
Memory in which messages arrive must stay until they have arrived, else gloo's connection stands still for all that
comes later. So a step that is dropped while the process goes on waits for what it has launched. At exit nothing waits:
other ranks may be gone. The gathers that a last step launches are then for a step that never comes; where another rank
has left before they are launched, that is no error of this step ([Note: launches that fail] in `send_recv.py`).

[Note: under torch's profiler]
A profile that ends while a collective over gloo is under way is damaged: torch 2.13 ends the process when the profile
is deleted (plain `all_gather_into_tensor(async_op=True)` shows it). So a step that is profiled waits for what it has
launched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import LAUNCHED, tensor_val
from fxzero.runtime.pending import Pending
from fxzero.runtime.program import Program

# name of a parameter -> what the model owns, and the memory of this rank's rows
Rows = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _UnderWay:
    """One gather.

    Args:
        value: what its launch has returned.
        form: what a program must expect of it.
        rows: the memory that was sent from.
        sent: what was sent, on the CPU.
        versions: of what the model owned then.
    """

    value: Any
    form: tuple[Any, ...]
    rows: torch.Tensor
    sent: torch.Tensor | None
    versions: tuple[int, ...]

    @classmethod
    def of(cls, value: Any, form: tuple[Any, ...], owned: torch.Tensor, rows: torch.Tensor) -> _UnderWay:
        """What was launched to gather these rows."""
        sent = value.own if isinstance(value, Pending) else None
        if sent is None and rows.device.type == "cpu":
            sent = rows.detach().to(form[0], copy=True)
        return cls(value, form, rows, sent, compat.versions_of(owned))

    def holds(self, owned: torch.Tensor, rows: torch.Tensor) -> bool:
        """Whether it gathers what is there now."""
        if rows is not self.rows or compat.versions_of(owned) != self.versions:
            return False
        return self.sent is None or _same_bits(self.sent, rows.detach().to(self.sent.dtype))

    def settle(self) -> None:
        """Return when nothing is under way any more; what has arrived may still be waited for."""
        if isinstance(self.value, Pending):
            self.value.arrive()
        else:
            c10d.wait(self.value)

    def drop(self) -> None:
        """Wait for what no program will wait for, and let go of it."""
        self.settle()
        if isinstance(self.value, Pending):
            self.value.finish()


class LaunchedAhead:
    """What one step has launched for the next, on this rank.

    Args:
        groups: mesh axis -> process group.
    """

    def __init__(self, groups: Mapping[str, Any]) -> None:
        self._groups = groups
        self._kept: dict[str, _UnderWay] = {}
        weakref.finalize(self, _drain, self._kept).atexit = False
        self._programs: dict[tuple[int, tuple[str, ...]], tuple[StepGraph, Program]] = {}

    def is_stale(self, rows: Rows) -> bool:
        """Whether nothing is under way, or a parameter has changed since; [Note: what was launched is what is read].

        Args:
            rows: those of now.
        """
        return not self._kept or not all(gather.holds(*rows(name)) for name, gather in self._kept.items())

    def take(self, step: StepGraph, rows: Rows, *, anew: bool) -> dict[str, Any]:
        """What a step's first program waits for, by parameter; what is missing is launched now.

        Args:
            step: the graph of that program.
            rows: those of now.
            anew: launch all; some rank's parameters have changed.
        """
        kept = dict(self._kept)
        self._kept.clear()
        wanted = {node.meta["entry"].name: _form(node) for node in filter(c10d.is_ahead, step.placeholders)}
        taken: dict[str, Any] = {}
        for name, gather in kept.items():
            if not anew and wanted.get(name) == gather.form:
                taken[name] = gather.value
            else:
                gather.drop()  # memory that messages arrive in must not go before
        missing = tuple(name for name in wanted if name not in taken)
        if missing:
            program = self._launching(step, missing)
            values = program.run([rows(name)[1] for name in missing])
            taken |= {name: value for (_, name), value in zip(program.outputs, values, strict=True)}
        return taken

    def keep(self, step: StepGraph, launched: Mapping[str, Any], rows: Rows) -> None:
        """Keep what a step's last program has launched.

        Args:
            step: the graph of that program.
            launched: what it has returned, by parameter.
            rows: as the step has left them.
        """
        results = step.results
        for name, value in launched.items():
            self._kept[name] = _UnderWay.of(value, _form(results[(LAUNCHED, name)]), *rows(name))
        if compat.is_profiled():  # [Note: under torch's profiler]
            _drain(self._kept)

    def _launching(self, step: StepGraph, names: tuple[str, ...]) -> Program:
        key = (id(step), names)
        if key not in self._programs:
            graph = launching_graph(step, names)
            self._programs[key] = step, Program(graph, groups=self._groups, name="gathers before a step")
        return self._programs[key][1]


def launching_graph(step: StepGraph, names: Iterable[str]) -> StepGraph:
    """The graph that launches what a program waits for at its begin, one gather a parameter.

    Args:
        step: the graph of that program.
        names: of the parameters.
    """
    out = StepGraph(fx.Graph(), dict(step.mesh), "gathers before a step")
    inputs: dict[str, fx.Node] = {}
    for name in names:
        parameter = step.input("parameter", name)
        assert parameter is not None, name
        inputs[name] = out.graph.placeholder(parameter.name)
        inputs[name].meta = dict(parameter.meta)
    output = out.graph.output(())
    output.meta = {"results": ()}
    results: dict[tuple[str, str], fx.Node] = {}
    for name, rows in inputs.items():
        wanted = step.input(LAUNCHED, name)
        assert wanted is not None, name
        sharding = rows.meta["sharding"]
        editor = Editor(out, phase="update", module=wanted.meta["module"], param=name)
        with editor.before(output):
            if tensor_val(wanted).dtype != tensor_val(rows).dtype:
                dtype = tensor_val(wanted).dtype
                rows = editor.call(torch.ops.aten._to_copy.default, rows, dtype=dtype, sharding=sharding)
            launch = editor.call(c10d.all_gather, rows, sharding.num_shards, sharding.axis, name=f"{wanted.name}_now")
        if "algorithm" in wanted.meta:
            launch.meta["algorithm"] = wanted.meta["algorithm"]
        results[(LAUNCHED, name)] = launch
    out.set_results(results)
    return out


def _form(node: fx.Node) -> tuple[Any, ...]:
    """What a launch and the input that stands for it have in common: dtype, shape, and how it is waited for."""
    launch: Any = node if c10d.is_ahead(node) or c10d.is_collective(node) else node.args[0]
    return tensor_val(node).dtype, tuple(tensor_val(node).shape), launch.meta.get("algorithm")


def _drain(kept: Mapping[str, _UnderWay]) -> None:
    """Wait for gathers that no program will wait for; [Note: what nobody waits for]."""
    for gather in kept.values():
        with contextlib.suppress(RuntimeError):  # the process group may have ended
            gather.settle()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
