"""What each call of a program occupies, and for how long: what a simulator and a scheduler work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from fxzero.cost.communication import collective_seconds, launch_seconds, wait_seconds
from fxzero.cost.compute import compute_seconds, computes, fresh_seconds, host_seconds
from fxzero.cost.fused import fused_seconds
from fxzero.cost.hardware import Hardware
from fxzero.cost.signature import launch_key, signature
from fxzero.graph import StepGraph, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.blocked_runs import blocked_runs
from fxzero.graph.step_graph import is_getitem, num_bytes, yields_scalar
from fxzero.graph.storage import InPlace


@dataclass(frozen=True)
class Task:
    """What one call of a program occupies, and for how long when nothing else runs.

    Args:
        resource: lane that it runs on: "compute", "host" (an update on the host), "net:<axis>" (one lane per process
            group), "d2h", "h2d", "nvme"; "" for calls that take no time (getitem, releases, Python numbers, most waits;
            where the host does not run ahead of the device, a view takes a moment).
        seconds: on that lane. Of a wait: what it computes after what it waits for has come.
        launch_s: that the compute lane (on CPU: the main thread) is held by launching it (collectives, swaps).
    """

    resource: str
    seconds: float
    launch_s: float = 0.0


FREE = Task("", 0.0)


def step_tasks(
    step: StepGraph, hardware: Hardware, *, recorded: Mapping[str, float] | None = None
) -> dict[fx.Node, Task]:
    """What each node of a program occupies; calls with one signature are looked at once.

    Args:
        step: the program.
        hardware: the machine that it is for.
        recorded: signature of an op (`cost/signature.py`) -> seconds that were measured; replaces the estimate of it.
            Of launches also `launch_key` -> those for which they hold the compute lane.
    """
    in_place = InPlace(step)
    forms = in_place.forms
    runs = blocked_runs(step, in_place, device=hardware.device)
    blocks = {node: run.num_blocks for run in runs for node in run.calls}
    known: dict[tuple[str, str, int], Task] = {}
    fused = fused_seconds(step, hardware)
    tasks = {}
    for node in step.graph.nodes:
        if node.op != "call_function" or is_getitem(node) or c10d.is_release(node):
            tasks[node] = FREE
            continue
        form = forms.get(node)
        text = signature(node, step.mesh, form=form)
        if node in fused and (recorded is None or text not in recorded):
            fused_s = fused[node] * hardware.among_ranks(step.mesh)
            tasks[node] = Task(_lane(node, hardware), fused_s) if fused_s else FREE
            continue
        key = (text, _lane(node, hardware), blocks.get(node, 1))
        if key not in known:
            seconds = None if recorded is None else recorded.get(text)
            task = _task(
                node, step.mesh, hardware, lane=key[1], in_place=form is not None, blocks=key[2], seconds=seconds
            )
            if recorded is not None and (launch_s := recorded.get(launch_key(text))) is not None:
                task = replace(task, launch_s=launch_s)
            known[key] = task
        tasks[node] = known[key]
    return tasks


def _lane(node: fx.Node, hardware: Hardware) -> str:
    if c10d.is_collective(node):
        return f"net:{c10d.axis_of(node)}"
    if swap_ops.is_wait(node):
        return "compute"
    if swap_ops.is_launch(node):
        out = node.target is swap_ops.swap_out
        source = node if out else node.args[0]
        if swap_ops.tier_of(source) == "nvme":  # type: ignore[arg-type]
            return "nvme"
        return "d2h" if out or hardware.copy_engines < 2 else "h2d"
    return "host" if swap_ops.is_off_device(node) and hardware.device != "cpu" else "compute"


def _task(
    node: fx.Node,
    mesh: Mapping[str, int],
    hardware: Hardware,
    *,
    lane: str,
    in_place: bool,
    blocks: int,
    seconds: float | None,
) -> Task:
    if c10d.is_collective(node):
        predicted = collective_seconds(node, mesh, hardware) if seconds is None else seconds
        return Task(lane, predicted, launch_seconds(node, hardware))
    if swap_ops.is_launch(node):
        return Task(lane, _swap_seconds(node, lane, hardware) if seconds is None else seconds, hardware.launch_s)
    if seconds is not None:
        return Task(lane, seconds) if seconds else FREE
    if c10d.is_wait(node):
        seconds = wait_seconds(node, mesh, hardware)
    elif swap_ops.is_wait(node) or yields_scalar(node):
        seconds = 0.0
    elif not computes(node):
        seconds = hardware.view_overhead_s
    elif lane == "host":
        seconds = host_seconds(node, hardware)
    else:
        seconds = compute_seconds(node, hardware, in_place=in_place, blocks=blocks)
    return Task(lane, seconds * hardware.among_ranks(mesh)) if seconds else FREE


def _swap_seconds(node: fx.Node, lane: str, hardware: Hardware) -> float:
    """Of a copy between the device and its host, or a file."""
    size = num_bytes(node.meta["val"])
    fresh_s = fresh_seconds(node, hardware) if node.target is swap_ops.swap_in else 0.0
    if lane != "nvme":
        return hardware.host_latency_s + size / hardware.host_bytes_s + fresh_s
    blocks = -(-size // swap_ops.FILE_BLOCK_BYTES) * swap_ops.FILE_BLOCK_BYTES
    return hardware.disk_latency_s + blocks / hardware.tier_bytes_s("nvme") + fresh_s
