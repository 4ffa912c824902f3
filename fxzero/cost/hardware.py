"""What a machine does in a second, as an argument of every estimate: read from a file, not from this machine.

The files of known machines lie in `machines/`; `fxzero calibrate` writes one of the machine at hand. docs/hardware.md
says what each key means.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fxzero.graph import StepGraph


def between(sizes: Sequence[float], values: Sequence[float], at: float) -> float:
    """The value at a size: by the logarithms of both between sizes that are known, beyond them that of the nearest.

    Args:
        sizes: ascending.
        values: one for each of them.
        at: the size.
    """
    above = bisect_right(sizes, at)
    if above in (0, len(sizes)):
        return values[min(above, len(values) - 1)]
    part = math.log(at / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    return float(values[above - 1] * (values[above] / values[above - 1]) ** part)


@dataclass(frozen=True)
class Link:
    """What carries messages between two ranks.

    Args:
        latency_s: seconds of the shortest message.
        bytes_s: bytes a second that one rank sends while it receives as many.
    """

    latency_s: float
    bytes_s: float


@dataclass(frozen=True)
class OpRate:
    """How fast ops of one class go through memory.

    Args:
        overhead_s: seconds that a call takes, however small.
        traffic_bytes: bytes read and written by a call, ascending: where `bytes_s` is known.
        bytes_s: bytes a second at these; between them by the logarithm, beyond them as at the nearest.
    """

    overhead_s: float
    traffic_bytes: tuple[float, ...]
    bytes_s: tuple[float, ...]

    def seconds(self, traffic: float) -> float:
        """Seconds of one call that reads and writes so many bytes."""
        return self.overhead_s + traffic / between(self.traffic_bytes, self.bytes_s, traffic)


@dataclass(frozen=True)
class MatrixRate:
    """What part of the peak products of one class reach: efficiency * d / (d + half_dim), d their smallest size.

    Args:
        efficiency: of large products, 0 to 1.
        half_dim: the smallest size at which half of that is reached.
    """

    efficiency: float
    half_dim: float = 0.0

    def part(self, smallest: float) -> float:
        """Part of the peak that a product with this smallest size reaches."""
        return self.efficiency * smallest / (smallest + self.half_dim)


@dataclass(frozen=True)
class CollectiveRate:
    """How near to a link's figures one kind of collective comes.

    Args:
        overhead_s: seconds that a call takes beside its messages.
        message_bytes: of the whole tensor, ascending: where `efficiency` is known.
        efficiency: part of the link's bytes a second that is reached at these, 0 to 1.
    """

    overhead_s: float
    message_bytes: tuple[float, ...]
    efficiency: tuple[float, ...]

    def part(self, size: float) -> float:
        """Part of the link's bytes a second that a tensor of this size reaches."""
        return between(self.message_bytes, self.efficiency, size)


@dataclass(frozen=True)
class Hardware:
    """One device with its host and what links it to others.

    Args:
        name: as people call it.
        matrix_flops: floating point operations a second of matrix products at peak, by dtype; others go as float32.
        vector_flops: of everything else, a second.
        memory_bytes_s: bytes a second between the device and its own memory.
        host_bytes_s: bytes a second between the device and the host's memory, one way.
        disk_bytes_s: bytes a second between the host and its disk.
        op_overhead_s: seconds that any op takes, however small, where its class says nothing else.
        device: "cuda" or "cpu".
        memory_bytes: of the device.
        view_overhead_s: seconds of a call that makes a view; 0 where the host runs ahead of the device.
        fresh_bytes_s: bytes a second at which memory that a call takes for its output becomes usable; 0: at once.
        fresh_above_bytes: outputs smaller than this come from memory that is usable.
        host_latency_s: seconds of the smallest copy between device and host.
        host_memory_bytes_s: bytes a second between the host and its memory, for updates on the host.
        copy_engines: 2 or more copy both ways at the same time.
        disk_latency_s: seconds of the smallest transfer to or from a file.
        ranks_per_node: devices that share a host.
        node_link: between ranks of a node.
        network_link: between ranks of different nodes, a rank's part of it.
        launch_s: seconds of the launching thread (on a GPU: of the stream of compute) for a collective or a copy.
        launch_bytes_s: bytes a second of its whole tensor at which a launched collective is handed over, beside that;
            0: at once.
        ops: class of ops -> rate; classes are those of `op_classes`.
        matrix_rates: class of products -> part of the peak that they reach.
        collectives: name of a collective, or "send_recv" -> rate.
        contention: kind of lane ("net", "d2h", ..) -> by what factor compute takes longer while it is busy; "ranks" ->
            by what factor it does all the time on one of several ranks, which share a machine or wait for the slowest.
        beside_compute: kind of lane -> by what factor what it does takes longer while compute runs.
        origin: where the figures are from: date, device, torch and threads of a calibration.
    """

    name: str
    matrix_flops: Mapping[torch.dtype, float]
    vector_flops: float
    memory_bytes_s: float
    host_bytes_s: float
    disk_bytes_s: float
    op_overhead_s: float
    device: str = "cuda"
    memory_bytes: float = math.inf
    view_overhead_s: float = 0.0
    fresh_bytes_s: float = 0.0
    fresh_above_bytes: float = 0.0
    host_latency_s: float = 0.0
    host_memory_bytes_s: float = 1e11
    copy_engines: int = 2
    disk_latency_s: float = 0.0
    ranks_per_node: int = 1
    node_link: Link = Link(0.0, math.inf)
    network_link: Link = Link(0.0, math.inf)
    launch_s: float = 0.0
    launch_bytes_s: float = 0.0
    ops: Mapping[str, OpRate] = field(default_factory=dict)
    matrix_rates: Mapping[str, MatrixRate] = field(default_factory=dict)
    collectives: Mapping[str, CollectiveRate] = field(default_factory=dict)
    contention: Mapping[str, float] = field(default_factory=dict)
    beside_compute: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path_or_name: str | Path) -> Hardware:
        """The description in a file, or the one that fxzero brings under a name ("h100").

        Raises:
            HardwareError: naming file and key, where something is missing, unknown or cannot be.
        """
        from fxzero.cost.hardware_file import load

        return load(path_or_name)

    def to_toml(self) -> str:
        """The description as a file that `load` reads."""
        from fxzero.cost.hardware_file import to_toml

        return to_toml(self)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating point operations a second of matrix products in `dtype`, at peak."""
        return self.matrix_flops.get(dtype, self.matrix_flops[torch.float32])

    def tier_bytes_s(self, tier: str) -> float:
        """Bytes a second between the device and "host" or "nvme", one way."""
        return self.host_bytes_s if tier == "host" else min(self.host_bytes_s, self.disk_bytes_s)

    def slowdown(self, resource: str) -> float:
        """By what factor compute takes longer while a lane of this name ("net:dp", "d2h") is busy; 1.0: it does not."""
        return self.contention.get(resource.partition(":")[0], 1.0)

    def among_ranks(self, mesh: Mapping[str, int]) -> float:
        """By what factor compute takes longer in a program for this mesh (axis -> ranks) than in one for one rank."""
        return self.contention.get("ranks", 1.0) if any(size > 1 for size in mesh.values()) else 1.0

    def hindrance(self, resource: str) -> float:
        """By what factor what a lane of this name does takes longer while compute runs; 1.0: it does not."""
        return self.beside_compute.get(resource.partition(":")[0], 1.0)

    def undisturbed(self) -> Hardware:
        """The same machine, but lanes and compute do not slow each other down: for costs that have this in them."""
        return replace(self, contention={}, beside_compute={})

    def fresh_seconds(self, output_bytes: float) -> float:
        """Seconds until memory for an output of this size is usable."""
        if not self.fresh_bytes_s or output_bytes < self.fresh_above_bytes:
            return 0.0
        return output_bytes / self.fresh_bytes_s


@functools.cache
def known_hardware(name: str) -> Hardware:
    """A description that fxzero brings, read once."""
    return Hardware.load(name)


def hardware_of(step: StepGraph, *, backend: str = "", named: str = "auto") -> Hardware:
    """The description for the device that a graph's tensors lie on, or the one that a plan names.

    A GPU is known by its name; one of another name, or of a machine that is not this one, counts as an H100.

    Args:
        step: the graph.
        backend: what carries collectives; "nccl" stands for GPUs, though a meta model is traced on the CPU.
        named: name or path of the description; "auto": by the device.

    Raises:
        HardwareError: if there is no such description, or it cannot be.
    """
    if named != "auto":
        return Hardware.load(named)
    kinds = {val.device.type for node in step.placeholders if isinstance(val := node.meta.get("val"), torch.Tensor)}
    if "cuda" not in kinds and backend != "nccl":
        return known_hardware("cpu")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return known_hardware(next((known.lower() for known in ("A100", "H200") if known in name), "h100"))
