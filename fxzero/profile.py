"""record() and profile() of a TrainStep: what its calls take when they run, beside what was predicted."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import fx

from fxzero.cost.hardware import Hardware, hardware_of
from fxzero.cost.recorded import RecordedCosts, costs_from
from fxzero.cost.tasks import FREE, Task
from fxzero.errors import CaptureError, PlanError
from fxzero.graph.lanes import COMPUTE, RUNS, is_launch
from fxzero.plan import Plan
from fxzero.runtime.recorder import Recorder
from fxzero.runtime.recording import Recording, Sample
from fxzero.simulate.prediction import predict
from fxzero.simulate.side_by_side import SideBySide
from fxzero.simulate.timeline import Timeline, simulate


class Profiled:
    """The part of a TrainStep that measures it."""

    plan: Plan
    _device: torch.device
    _last: list[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step; TrainStep says how."""
        raise NotImplementedError

    def record(self, *args: Any, steps: int = 5, costs: str | Path | None = None, **kwargs: Any) -> Recording:
        """Run real steps, which train, with a time stamp between their calls; every rank must call it alike.

        Where no step has run yet, one more runs first, which compiles it.

        Args:
            args, kwargs: a batch, as for a step.
            steps: how many to record.
            costs: a file of recorded costs, by signature of the calls; rank 0 adds what it saw, or begins it.

        Raises:
            PlanError: if the step is one CUDA graph, whose calls have no times of their own.
            CaptureError: if `steps` is not 1 or more, or each step was captured anew, or the file has no folder.
            HardwareError: if the file holds costs of another machine.
        """
        file = None if costs is None else _own_file(str(costs), "record(..., costs=")
        if self.plan.cuda_graph:
            fix = "record a step compiled with cuda_graph=False"
            raise PlanError.of("step.record(...)", expected="calls that run one by one", got="one CUDA graph", fix=fix)
        if steps < 1:
            where = "step.record(..., steps=)"
            raise CaptureError.of(where, expected="1 or more", got=repr(steps), fix="leave it out, or give 5")
        if not self._last:
            self(*args, **kwargs)
        samples: list[Sample] = []
        recorder = Recorder(self._device)
        attached: set[int] = set()
        with contextlib.ExitStack() as stack:
            stack.callback(recorder.close)
            for _ in range(steps):
                for program in (compiled.program for compiled in self._last):
                    if id(program) not in attached:
                        stack.enter_context(recorder.attached(program))
                        attached.add(id(program))
                start = time.perf_counter()
                self(*args, **kwargs)
                sample = recorder.take(call_s=time.perf_counter() - start)
                if len(sample.steps) == len(self._last):  # else this batch had other programs than the step before
                    samples.append(sample)
        if not samples:
            where = f"step.record(..., steps={steps})"
            fix = "give more steps; if that does not help, see what causes the captures in the log 'fxzero'"
            raise CaptureError.of(where, expected="a step of known programs", got="a new capture each time", fix=fix)
        last = [id(step) for step in samples[-1].steps]
        recording = Recording(tuple(sample for sample in samples if [id(step) for step in sample.steps] == last))
        if file is not None:
            costs_of(recording, self._device).merged_into(file)
        return recording

    def profile(
        self,
        *args: Any,
        path: str | Path | None = "trace.json",
        steps: int = 5,
        hardware: Hardware | str | Path | None = None,
        **kwargs: Any,
    ) -> SideBySide:
        """Record real steps, which train, and put them beside what is predicted; every rank must call it alike.

        Args:
            args, kwargs: a batch, as for a step.
            path: of a trace for ui.perfetto.dev with the predicted and the measured step, written by rank 0; with
                "{rank}" in it, each rank writes its own. None: no file.
            steps: how many to record.
            hardware: that times are predicted for: a description, its name ("h100") or its file; default: the
                plan's.

        Raises:
            CaptureError: as `record`, or where the folder of `path` does not exist.
            HardwareError: if there is no such description, or it cannot be.
        """
        file = None if path is None else _own_file(str(path), "profile(..., path=")
        if isinstance(hardware, (str, Path)):
            hardware = Hardware.load(hardware)
        recording = self.record(*args, steps=steps, **kwargs)
        found = side_by_side(recording, hardware or hardware_of(recording.steps[-1], named=self.plan.hardware))
        if file is not None:
            found.write(file)
        return found


def side_by_side(recording: Recording, hardware: Hardware) -> SideBySide:
    """What was recorded beside what is predicted for a machine.

    Raises:
        SimulationError: if the time of the step cannot be predicted.
    """
    prediction = predict(recording.steps, hardware)
    replayed = simulate(recording.steps, recorded_tasks(Recording((recording.typical,))))
    return SideBySide(prediction, replayed, tuple(map(timeline_of, recording.samples)), recording.call_s)


def timeline_of(sample: Sample) -> Timeline:
    """A recorded step as a timeline, for tables, traces and pictures."""
    reached = tuple(np.array(reached, dtype=float) for reached in sample.reached_s)
    return Timeline(sample.steps, sample.events, reached, sample.step_seconds)


def recorded_tasks(recording: Recording) -> dict[fx.Node, Task]:
    """What each call occupied, as it was measured: means, with all that other lanes did to it at the time."""
    lanes = {event.node: event.lane for event in recording.typical.events if event.kind == RUNS}
    tasks: dict[fx.Node, Task] = {}
    for step in {id(step): step for step in recording.steps}.values():
        seconds = recording.seconds_of(step)
        for node in step.calls():
            if node.name in seconds:
                launch_s = recording.launch_s.get(node.name, 0.0)
                tasks[node] = Task(lanes[node], seconds[node.name], launch_s)
            elif is_launch(node):  # what the host uploads: its call does it all
                tasks[node] = Task(COMPUTE, recording.launch_s.get(node.name, 0.0))
            else:
                tasks[node] = FREE
    return tasks


def costs_of(recording: Recording, device: torch.device) -> RecordedCosts:
    """What was recorded, by signature of the calls, for this machine."""
    found = RecordedCosts.here(device)
    for step in {id(step): step for step in recording.steps}.values():
        found = found.adding(costs_from(step, recording.seconds_of(step), launch_s=recording.launch_s))
    return found


def _own_file(path: str, what: str) -> Path | None:
    """The file that this rank writes: before any step runs, so that no rank fails alone after it."""
    file = Path(path.replace("{rank}", str(dist.get_rank() if dist.is_initialized() else 0)))
    if not file.parent.is_dir():
        where = f"step.{what}{path!r})"
        fix = "make it, or give a path in one that there is"
        raise CaptureError.of(where, expected="a folder that exists", got=str(file.parent), fix=fix)
    writes = "{rank}" in path or not dist.is_initialized() or dist.get_rank() == 0
    return file if writes else None
