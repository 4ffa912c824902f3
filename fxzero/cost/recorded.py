"""Costs that were measured in runs: signature of a call -> mean seconds, kept in a file and shared across runs.

    costs = RecordedCosts.here(device).adding(costs_from(step.graph, recording.seconds))
    costs.merged_into("costs.json")                               # later runs add to it
    known = RecordedCosts.load("costs.json", machine=Machine.of(device))
    tasks = step_tasks(step.graph, hardware, recorded=known.seconds)

[Note: rank 0 decides]
Ranks measure different times, and what is decided by them must be the same everywhere. `as_text` and `from_text` are
exact both ways, so that rank 0 can put its costs into the store and all ranks, itself included, decide by those.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxzero.cost.machine_name import device_name
from fxzero.cost.signature import launch_key, signature
from fxzero.errors import HardwareError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import is_getitem
from fxzero.graph.storage import InPlace

FORMAT = 1
KEPT_RUNS = 32  # of each call, the newest


@dataclass(frozen=True)
class Machine:
    """What costs hold for.

    Args:
        device: as the system calls it.
        torch_version: of torch.
        threads: of one process, on a CPU; 0 on a GPU.
    """

    device: str
    torch_version: str
    threads: int

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """The machine at hand."""
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        return cls(device_name(device), str(torch.__version__), threads)

    def __str__(self) -> str:
        return f"{self.device}, torch {self.torch_version}" + (f", {self.threads} threads" if self.threads else "")


@dataclass(frozen=True, repr=False)
class RecordedCosts:
    """Seconds of calls, by signature.

    Its repr has a digest of all costs: ranks compare it.

    Args:
        machine: that they were measured on.
        runs: signature -> means of runs, oldest first.
    """

    machine: Machine
    runs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Signature -> median over the runs."""
        return {key: statistics.median(values) for key, values in self.runs.items()}

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.as_text().encode()).hexdigest()[:12]
        return f"RecordedCosts({len(self.runs)} calls, {self.machine}, sha256 {digest})"

    @classmethod
    def here(cls, device: torch.device) -> RecordedCosts:
        """Those of this machine, none yet."""
        return cls(Machine.of(device))

    def adding(self, seconds: Mapping[str, float]) -> RecordedCosts:
        """With one run more.

        Raises:
            HardwareError: a time that is none.
        """
        runs = dict(self.runs)
        for key, value in seconds.items():
            _check_seconds(key, value)
            runs[key] = (*runs.get(key, ()), float(value))[-KEPT_RUNS:]
        return RecordedCosts(self.machine, runs)

    def merged(self, other: RecordedCosts, *, force: bool = False) -> RecordedCosts:
        """With the runs of another record behind these.

        Raises:
            HardwareError: if that is another machine's, unless `force`.
        """
        _check_machine("costs to merge", other.machine, self.machine, force=force)
        runs = {key: (*self.runs.get(key, ()), *values)[-KEPT_RUNS:] for key, values in other.runs.items()}
        return RecordedCosts(self.machine, {**self.runs, **runs})

    def merged_into(self, path: str | Path) -> RecordedCosts:
        """Add these to what a file holds, or begin one; the file is whole at every moment.

        Raises:
            HardwareError: if the file is another machine's, or no such file.
        """
        path = Path(path)
        whole = RecordedCosts.load(path, machine=self.machine).merged(self) if path.exists() else self
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(whole.as_text())
        os.replace(name, path)
        return whole

    @classmethod
    def load(cls, path: str | Path, *, machine: Machine, force: bool = False) -> RecordedCosts:
        """What a file holds.

        Args:
            path: of the file.
            machine: what the costs are wanted for.
            force: take another machine's costs too.

        Raises:
            HardwareError: if the file is no record of costs, or another machine's, unless `force`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            fix = "record one: step.record(*batch)"
            raise HardwareError.of(str(path), expected="recorded costs", got=repr(error), fix=fix) from error
        found = cls.from_text(text, where=str(path))
        _check_machine(str(path), found.machine, machine, force=force)
        return found

    def as_text(self) -> str:
        """As text that `from_text` reads, for a file or for the store; exact, and the same for the same costs."""
        runs = {key: list(self.runs[key]) for key in sorted(self.runs)}
        return json.dumps({"format": FORMAT, "machine": asdict(self.machine), "seconds": runs}, indent=0) + "\n"

    @classmethod
    def from_text(cls, text: str, *, where: str = "recorded costs") -> RecordedCosts:
        """What `as_text` wrote.

        Args:
            text: as written.
            where: it is from, for errors.

        Raises:
            HardwareError: if it is no such text.
        """
        try:
            data = json.loads(text)
            version = data["format"]
            if version != FORMAT:
                raise ValueError(f"format {version!r}")
            found = cls(Machine(**data["machine"]))
            runs = {key: tuple(map(float, values)) for key, values in data["seconds"].items()}
            if not all(runs.values()):
                raise ValueError("a call without any run")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            got, fix = f"{type(error).__name__}: {error}", "remove it and record again"
            raise HardwareError.of(where, expected=f"recorded costs, format {FORMAT}", got=got, fix=fix) from error
        for key, values in runs.items():
            for value in values:
                _check_seconds(key, value)
        return cls(found.machine, runs)


def costs_from(
    step: StepGraph, seconds: Mapping[Any, float], *, launch_s: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Signature -> mean seconds, of one program's recorded calls; of launches also `launch_key` -> seconds.

    Args:
        step: the program that was recorded.
        seconds: node, or its name, -> seconds: of a launch on its lane, of a wait without the time that it stood still.
        launch_s: name of a launch -> seconds for which it held the compute lane.

    Raises:
        HardwareError: a name that is no call of this program.
    """
    forms = InPlace(step).forms
    nodes: dict[Any, fx.Node] = {node.name: node for node in step.graph.nodes}
    found: dict[str, list[float]] = {}
    for key, value in seconds.items():
        node = nodes.get(key if isinstance(key, str) else key.name)
        if node is None:
            fix = "give the program that was recorded"
            raise HardwareError.of("recorded seconds", expected="calls of this program", got=repr(key), fix=fix)
        if node.op == "call_function" and is_timed(node):
            text = signature(node, step.mesh, form=forms.get(node))
            _check_seconds(text, value)
            found.setdefault(text, []).append(value)
            if launch_s is not None and node.name in launch_s:
                found.setdefault(launch_key(text), []).append(launch_s[node.name])
    return {key: statistics.fmean(values) for key, values in found.items()}


def knows(recorded: Mapping[str, float], step: StepGraph) -> bool:
    """Whether any call of a program is among recorded costs.

    Args:
        recorded: signature -> seconds.
        step: the program.
    """
    return any(text in recorded for text in signatures(step))


def signatures(step: StepGraph) -> Iterator[str]:
    """Of the calls of a program that have a cost of their own, in order."""
    forms = InPlace(step).forms
    return (signature(node, step.mesh, form=forms.get(node)) for node in filter(is_timed, step.calls()))


def is_timed(call: fx.Node) -> bool:
    """Whether a call has a cost of its own."""
    return not is_getitem(call) and not c10d.is_release(call)


def _check_seconds(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        got, fix = repr(value), "record the step again"
        raise HardwareError.of(f"cost of {key}", expected="seconds, 0 or more", got=got, fix=fix)


def _check_machine(where: str, theirs: Machine, ours: Machine, *, force: bool) -> None:
    if theirs != ours and not force:
        fix = "record on this machine, or force it, if you know that they are alike"
        raise HardwareError.of(where, expected=f"costs of {ours}", got=f"costs of {theirs}", fix=fix)
