"""The small step in its forms, recorded on several ranks as real ones are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fxzero.calibrate.small_step import AXIS, FORMS, inputs_of, small_step
from fxzero.graph.lanes import COMPUTE, LAUNCHES, RUNS, WAITS, Event, is_wait
from fxzero.runtime.program import Program
from fxzero.runtime.recorder import Recorder
from fxzero.runtime.recording import Sample

STEPS_S = 40.0  # for which steps are recorded


@dataclass(frozen=True)
class StepMeans:
    """What was seen of one form: means over steps and ranks, in seconds.

    A message travels from where all ranks have launched it: what one waits for another is not the message's time.

    Args:
        step_s: from the first call to the end of the last.
        compute_s: of each call but launches and waits, in order.
        launch_s: for which each launch held the thread, in order.
        wait_s: that each wait computed after what it waited for had come, in order.
        flight_s: that messages travelled, in whole.
        still_s: of that, while compute stood still.
        beside_s: of that, while calls ran that are no launches.
    """

    step_s: float
    compute_s: Sequence[float]
    launch_s: Sequence[float]
    wait_s: Sequence[float]
    flight_s: float
    still_s: float
    beside_s: float


def recorded_steps(ranks: int, device: torch.device, *, fast: bool) -> dict[str, StepMeans]:
    """Form of the small step -> what was seen of it; all ranks call it alike.

    Args:
        ranks: of the default group.
        device: of the tensors.
        fast: shows that it works, its figures are of no use.
    """
    programs = {}
    for form in FORMS:
        step = small_step(ranks, form, device, fast=fast)
        programs[form] = Program(step, groups={AXIS: dist.group.WORLD}, name=f"calibration {form}")
    inputs = {form: inputs_of(program.step) for form, program in programs.items()}
    recorder = Recorder(device)
    samples: dict[str, list[Sample]] = {form: [] for form in programs}
    try:
        began, going = time.perf_counter(), True
        while going:
            for form, program in programs.items():
                with recorder.attached(program):
                    dist.barrier()
                    program.run(list(inputs[form]))
                    samples[form].append(recorder.take(call_s=0.0))
            going = _of_all(time.perf_counter() - began < STEPS_S and not fast)[0]
    finally:
        recorder.close()
    return {form: _means(found[1:] or found) for form, found in samples.items()}  # the first of each warms up


def _means(samples: Sequence[Sample]) -> StepMeans:
    launched = [[e.end_s for e in sample.events if e.kind == LAUNCHES] for sample in samples]
    by_all = np.max(_of_all(launched), axis=0)
    own = [_seen(sample, latest) for sample, latest in zip(samples, by_all, strict=True)]
    everyone = [found for of_rank in _of_all(own) for found in of_rank]
    return StepMeans(**{key: np.mean([found[key] for found in everyone], axis=0).tolist() for key in everyone[0]})


def _seen(sample: Sample, launched_by_all: Sequence[float]) -> dict[str, Any]:
    """Of one step."""
    runs = [event for event in sample.events if event.lane == COMPUTE and event.kind == RUNS]
    waits = [event for event in sample.events if event.kind == WAITS]
    flights = np.array(list(_flights(sample, launched_by_all))).reshape(-1, 2)
    return {
        "step_s": sample.step_seconds,
        "compute_s": [event.seconds for event in runs if not is_wait(event.node)],
        "launch_s": [event.seconds for event in sample.events if event.kind == LAUNCHES],
        "wait_s": [event.seconds for event in runs if is_wait(event.node)],
        "flight_s": float((flights[:, 1] - flights[:, 0]).sum()),
        "still_s": _overlap_s(flights, waits),
        "beside_s": _overlap_s(flights, runs),
    }


def _overlap_s(flights: np.ndarray, events: Sequence[Event]) -> float:
    """Seconds of flights, (start, end) in rows, that fall into events."""
    spans = np.array([(event.start_s, event.end_s) for event in events]).reshape(-1, 2)
    common = np.minimum(flights[:, None, 1], spans[:, 1]) - np.maximum(flights[:, None, 0], spans[:, 0])
    return float(common.clip(min=0).sum())


def _flights(sample: Sample, launched_by_all: Sequence[float]) -> Iterator[tuple[float, float]]:
    flights = [event for event in sample.events if event.lane != COMPUTE]
    for flight, launched_s in zip(flights, launched_by_all, strict=True):
        start = max(flight.start_s, launched_s)
        yield start, max(start, flight.end_s)


def _of_all(value: Any) -> list[Any]:
    """Each rank's."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
