"""The machine at hand, measured part by part, as a description that estimates work with."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxzero.calibrate.beside_compute import BesideCompute
from fxzero.calibrate.collectives import Collectives, measure
from fxzero.calibrate.company import company
from fxzero.calibrate.copies import copy_rate
from fxzero.calibrate.matrix_ops import matrix_cases, matrix_rates
from fxzero.calibrate.memory_ops import FRESH_ABOVE_BYTES, fresh_rate, memory_cases, op_rates, overheads
from fxzero.calibrate.timing import Clock, Measured
from fxzero.cost.hardware import CollectiveRate, Hardware, Link
from fxzero.cost.hardware_file import COLLECTIVES
from fxzero.cost.machine_name import device_name, load_average, num_devices

NOTHING_TO_SEND = Collectives(Link(1e-6, math.inf), {}, BesideCompute(), [])  # of one rank


@dataclass
class Calibration:
    """Measures one part after the other; `hardware()` puts them together.

    Args:
        device: what is measured.
        world: ranks between which collectives are timed, 1 times none; on a CPU all compute while one is timed.
        threads: of each rank, on a CPU.
        directory: for files.
        fast: small sizes and few samples: shows that it works, its figures are of no use.
    """

    device: torch.device
    world: int
    threads: int
    directory: Path
    fast: bool = False
    rows: list[Measured] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, str]:
        """Method to call -> what it measures, in order."""
        return {
            "measure_ops": "ops that go through memory, products and attention",
            "measure_collectives": f"collectives over {self.world} ranks",
            "measure_copies": "copies to the host and to files",
        }

    @property
    def _clock(self) -> Clock:
        return Clock(self.device, sample_s=2e-4, samples=3, turns_s=0.0) if self.fast else Clock(self.device)

    def _beside_others(self) -> contextlib.AbstractContextManager[None]:
        """The other ranks compute meanwhile, where they share this machine's cores and memory."""
        return company(self.world - 1 if self.device.type == "cpu" else 0, threads=self.threads)

    def measure_ops(self) -> None:
        """Rates of the classes of ops and products, and what a call takes, however small."""
        memory = memory_cases(self.device, fast=self.fast)
        matrix = matrix_cases(self.device, fast=self.fast)
        with self._beside_others():
            clock = self._clock
            seconds = clock.in_turns([case.call for case in memory] + [case.call for case in matrix])
            of_memory = dict(zip(memory, seconds, strict=False))
            of_matrix = dict(zip(matrix, seconds[len(memory) :], strict=True))
            flops, rates, matrix_rows = matrix_rates(of_matrix, clock, fast=self.fast)
            self.found["fresh_bytes_s"] = fresh_rate(clock, fast=self.fast)
        self.found["ops"], memory_rows = op_rates(of_memory)
        self.found["op_overhead_s"], self.found["view_overhead_s"] = overheads(of_memory)
        self.found["matrix_flops"], self.found["matrix_rates"] = flops, rates
        self.rows += memory_rows + matrix_rows

    def measure_collectives(self) -> None:
        """The link between ranks of this machine."""
        found = NOTHING_TO_SEND
        if self.world > 1:
            found = measure(self.world, threads=self.threads, fast=self.fast)
        self.found["collectives"] = found
        self.rows += found.rows

    def measure_copies(self) -> None:
        """Tiers of offload."""
        for tier in ("host", "nvme"):
            fresh = self.found["fresh_bytes_s"]
            self.found[tier] = copy_rate(self.device, tier, self.directory, fresh_bytes_s=fresh, fast=self.fast)
            self.rows += self.found[tier].rows

    def hardware(self, name: str) -> Hardware:
        """The description, of all parts.

        Args:
            name: of the machine.
        """
        found, network = self.found, self.found["collectives"]
        on_cpu = self.device.type == "cpu"
        pointwise = found["ops"]["pointwise"]
        memory = pointwise.bytes_s[-1]
        host, disk = found["host"], found["nvme"]
        collectives = dict(network.rates) or dict.fromkeys(COLLECTIVES, CollectiveRate(0.0, (1.0,), (1.0,)))
        fastest = max(max(rate.bytes_s) for rate in found["ops"].values())
        link = Link(network.link.latency_s, min(network.link.bytes_s, memory))
        return Hardware(
            name=name,
            device=self.device.type,
            matrix_flops=found["matrix_flops"],
            matrix_rates=found["matrix_rates"],
            vector_flops=fastest,  # no op that was timed is slower by arithmetic than its class says already
            memory_bytes_s=memory,
            memory_bytes=_memory_bytes(self.device),
            fresh_bytes_s=found["fresh_bytes_s"],
            fresh_above_bytes=FRESH_ABOVE_BYTES if found["fresh_bytes_s"] else 0.0,
            op_overhead_s=found["op_overhead_s"],
            view_overhead_s=found["view_overhead_s"] if on_cpu else 0.0,
            ops=found["ops"],
            host_bytes_s=min(host.bytes_s, memory),
            host_latency_s=host.latency_s,
            host_memory_bytes_s=memory if on_cpu else 1e11,
            copy_engines=1 if on_cpu else 2,
            disk_bytes_s=disk.bytes_s,
            disk_latency_s=disk.latency_s,
            ranks_per_node=max(self.world, num_devices(self.device)),
            node_link=link,
            network_link=link,
            launch_s=network.beside.launch_s,
            launch_bytes_s=network.beside.launch_bytes_s,
            collectives=collectives,
            contention=_factors(net=network.beside.slowdown, ranks=network.beside.among_ranks),
            beside_compute=_factors(net=network.beside.hindrance),
            origin=self.origin(),
        )

    def origin(self) -> dict[str, str]:
        """Where the figures are from."""
        return {
            "date": datetime.date.today().isoformat(),
            "device": device_name(self.device),
            "torch": str(torch.__version__),
            "threads": str(self.threads),
            "world": str(self.world),
            "load": f"{load_average():.1f}",
        }


def _factors(**factors: float) -> dict[str, float]:
    """Those that change something."""
    return {name: factor for name, factor in factors.items() if factor > 1}


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
