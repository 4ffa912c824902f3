"""What no recording may have."""

from __future__ import annotations

from collections.abc import Iterator

from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import COMPUTE, RUNS, WAITS, is_launch, launch_of
from fxzero.runtime.recording import Recording, Sample


def faults(recording: Recording) -> Iterator[str]:
    """Words for each thing that is wrong in any step."""
    for sample in recording.samples:
        yield from sample_faults(sample)
    calls = {n.name for step in recording.steps for n in step.calls() if not c10d.is_release(n)}
    if set(recording.seconds) != calls:
        yield f"seconds of {sorted(set(recording.seconds) ^ calls)[:3]} are missing, or too many"
    if not 0 < recording.step_seconds <= recording.call_s:
        yield f"programs of {recording.step_seconds} s in a call of {recording.call_s} s"


def sample_faults(sample: Sample) -> Iterator[str]:
    """Likewise, of one step."""
    free: dict[str, float] = {}
    for event in sample.events:
        name = f"{event.node.name} on {event.lane}"
        if event.end_s < event.start_s:
            yield f"{name} ends before it begins"
        if event.start_s < free.get(event.lane, 0.0) - 1e-9:
            yield f"{name} begins before its lane is free"
        free[event.lane] = event.end_s
    ends: dict[int, float] = {}
    for event in (event for event in sample.events if event.lane == COMPUTE):
        if abs(event.start_s - ends.get(event.program, event.start_s)) > 1e-9:
            yield f"nothing is said of the time before {event.node.name}"
        ends[event.program] = event.end_s
    if abs(max(ends.values()) - sample.step_seconds) > 1e-9:
        yield f"the last call ends at {max(ends.values())} s of {sample.step_seconds} s"
    done = {(e.program, e.node): e.end_s for e in sample.events if e.kind == RUNS and is_launch(e.node)}
    for event in sample.events:
        launch = (event.program, launch_of(event.node)) if event.kind == WAITS else None
        if launch in done and event.end_s < done[launch] - 1e-9 and c10d.is_wait(event.node):
            yield f"{event.node.name} ends before its launch is done"
    for step, reached in zip(sample.steps, sample.reached_s, strict=True):
        if len(reached) != len(step.graph.nodes) or list(reached) != sorted(reached):
            yield "nodes are not reached in order"
