"""What tensors take to leave the device and to come back, by the runtime's own swapper."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fxzero.calibrate.timing import Measured, settle
from fxzero.runtime.swap.swapper import Swapper

SMALL_BYTES = 2**12
LARGE_BYTES = 2**26
FAST_BYTES = 2**20
SAMPLES = 5


@dataclass(frozen=True)
class CopyRate:
    """Of one tier, both ways alike.

    Args:
        latency_s: of a small tensor.
        bytes_s: of a large one.
        rows: what these are made of.
    """

    latency_s: float
    bytes_s: float
    rows: list[Measured]


def copy_rate(
    device: torch.device, tier: str, directory: Path, *, fresh_bytes_s: float = 0.0, fast: bool = False
) -> CopyRate:
    """Time a small and a large tensor out to a tier and in again.

    Args:
        device: that they are on.
        tier: "host" or "nvme".
        directory: where files are made, and removed again.
        fresh_bytes_s: at which large memory that a tensor comes back into becomes usable; 0: at once.
        fast: smaller, fewer.

    Raises:
        PlanError, OffloadError: if the directory cannot hold files for direct I/O.
    """
    large = FAST_BYTES if fast else LARGE_BYTES
    swapper = Swapper(device, directory=directory if tier == "nvme" else None)
    try:
        times = {size: _out_and_in(swapper, device, tier, size) for size in (SMALL_BYTES, large)}
    finally:
        swapper.close()
    latency_s = statistics.median(times[SMALL_BYTES])
    # into memory that is not usable yet a copy takes longer, which estimates count by themselves
    large_s = min(times[large]) if fresh_bytes_s else max(times[large])
    rate = (large - SMALL_BYTES) / max(large_s - latency_s, 1e-9)
    rows = []
    for size, both in times.items():
        for way, seconds in zip(("out", "in"), both, strict=True):
            fresh_s = size / fresh_bytes_s if fresh_bytes_s and way == "in" and size == large else 0.0
            predicted = latency_s + (size - SMALL_BYTES) / rate + fresh_s
            rows.append(Measured(f"{tier} {way}", f"{size:,} bytes", seconds, predicted))
    return CopyRate(latency_s, rate, rows)


def _out_and_in(swapper: Swapper, device: torch.device, tier: str, size: int) -> tuple[float, float]:
    x = torch.ones(size, dtype=torch.uint8, device=device)
    out, back = [], []
    for _ in range(SAMPLES + 1):
        settle(device)
        began = time.perf_counter()
        stored = swapper.written(swapper.write(x, "calibration", tier))
        settle(device)
        half = time.perf_counter()
        transfer = swapper.read(stored)
        swapper.drop(stored)
        swapper.loaded(transfer)
        settle(device)
        out.append(half - began)
        back.append(time.perf_counter() - half)
    return statistics.median(out[1:]), statistics.median(back[1:])
