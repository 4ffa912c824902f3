"""What each call of a program occupies, and for how long: what a simulator and a scheduler work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware
from fxzero.graph import StepGraph, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import num_bytes


@dataclass(frozen=True)
class Task:
    """What one call of a program occupies, and for how long when nothing else runs.

    Args:
        resource: lane that it runs on: "compute", "host" (an update on the host), "net:<axis>" (one lane per process
            group), "d2h", "h2d", "nvme"; "" for calls that take no time (getitem, releases, waits).
        seconds: on that lane.
        launch_s: that the compute lane (on CPU: the main thread) is held by launching it (collectives, swaps).
    """

    resource: str
    seconds: float
    launch_s: float = 0.0


FREE = Task("", 0.0)


def step_tasks(
    step: StepGraph, hardware: Hardware, *, recorded: Mapping[str, float] | None = None
) -> dict[fx.Node, Task]:
    """What each node of a program occupies.

    Args:
        step: the program.
        hardware: the machine that it is for.
        recorded: signature of an op -> seconds that were measured; replaces estimates.
    """
    return {node: _task(node, step.mesh, hardware) for node in step.graph.nodes}


def _task(node: fx.Node, mesh: Mapping[str, int], hardware: Hardware) -> Task:
    if node.op != "call_function":
        return FREE
    if c10d.is_collective(node):
        axis = c10d.axis_of(node)
        seconds = c10d.wire_bytes(node, dict(mesh)) / hardware.host_bytes_s + 10 * hardware.op_overhead_s
        return Task(f"net:{axis}", seconds, hardware.op_overhead_s)
    if swap_ops.is_launch(node):
        out = node.target is swap_ops.swap_out
        source = node.args[0]
        assert isinstance(source, fx.Node)
        tier = swap_ops.tier_of(node if out else source)
        lane = "nvme" if tier == "nvme" else "d2h" if out else "h2d"
        return Task(lane, num_bytes(node.meta["val"]) / hardware.tier_bytes_s(tier), hardware.op_overhead_s)
    seconds = compute_seconds(node, hardware)
    if not seconds or swap_ops.is_wait(node):
        return FREE
    return Task("host" if swap_ops.is_off_device(node) else "compute", seconds)
