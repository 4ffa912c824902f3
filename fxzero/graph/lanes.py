"""The lanes on which a step's calls run beside each other, and what a call does on one of them, foreseen or measured.

compute         the device's main stream; on the CPU the thread that runs the program
host            updates that run on the host beside a GPU
net:<axis>      collectives of one mesh axis
d2h, h2d        copies between the device and the host's memory
nvme            transfers to and from files
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import swap_ops
from fxzero.graph.step_graph import first_argument

COMPUTE, HOST = "compute", "host"
LANES = (COMPUTE, HOST, "net", "d2h", "h2d", "nvme")  # "net" stands for all its axes
RUNS, LAUNCHES, WAITS = "runs", "launches", "waits"  # what an event's lane does


@dataclass(frozen=True, slots=True)
class Event:
    """What one call does on one lane.

    Args:
        node: the call.
        program: index of the microbatch.
        lane: "compute", "host", "net:<axis>", "d2h", "h2d" or "nvme".
        kind: "runs"; on the compute lane also "launches" (it only starts what another lane does) and "waits" (the lane
            stands still).
        start_s, end_s: seconds since the step began.
    """

    node: fx.Node
    program: int
    lane: str
    kind: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end_s - self.start_s


def is_launch(node: fx.Node) -> bool:
    """Whether a call only starts what another lane does."""
    return c10d.is_collective(node) or swap_ops.is_launch(node)


def is_wait(node: fx.Node) -> bool:
    """Whether a call ends when a launch is done."""
    return c10d.is_wait(node) or swap_ops.is_wait(node)


def launch_of(wait: fx.Node) -> fx.Node:
    """The launch that a wait waits for, or the input that stands for it if the program before has launched it."""
    return c10d.launched_by(wait) if c10d.is_wait(wait) else first_argument(wait)


def lane_of_launch(launch: fx.Node) -> str:
    """The lane that does what a launch starts, or what the program before has started."""
    if c10d.is_collective(launch) or c10d.is_ahead(launch):
        return f"net:{c10d.axis_of(launch)}"
    out = launch.target is swap_ops.swap_out
    if swap_ops.tier_of(launch if out else first_argument(launch)) == "nvme":
        return "nvme"
    return "d2h" if out else "h2d"
