"""What messages and compute do to each other where they share cores, as in a step over gloo.

[Note: a stream beside compute]
Some messages are launched one after the other, with compute behind each, and all are waited for at the end. Compute
takes longer than alone, and so do the launches, which wake the threads that carry messages. What is left of the
messages at the end says how much of them was carried meanwhile: alone, it would have taken a part of that time only.
Means count, not medians: a launch behind which the system ran something else is rare, but takes as long as many others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from fxzero.calibrate.timing import settle

Start = Callable[[torch.Tensor], Callable[[], object]]  # launches on a whole tensor, returns what waits for it

SIZES = (2**18, 2**20, 2**22)  # bytes of the whole tensor
FAST_SIZES = (2**12, 2**18)
PACES = (1.0, 2.0, 4.0)  # seconds of compute behind each launch, times those of the message alone
DRY_PACE = 2.0  # beyond it messages may be through before the next one is launched: how long they take is not seen
MESSAGES = 8  # of a stream
MOST = 20.0  # times as long as alone
STREAM_S = 0.6  # for which compute runs, of one size and pace


@dataclass(frozen=True)
class BesideCompute:
    """What streams have shown.

    Args:
        launch_s: for which launching a message holds the thread.
        launch_bytes_s: bytes a second of the whole tensor, beside that; 0: it takes no time.
        slowdown: by what factor compute takes longer while messages are under way.
        hindrance: by what factor messages take longer while compute runs.
    """

    launch_s: float
    launch_bytes_s: float
    slowdown: float
    hindrance: float


def line(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(seconds of no bytes, bytes a second); where time does not grow with bytes, at least the rate of the largest."""
    constant, slope = _fit(sizes, seconds)
    return constant, 1 / slope if slope > 0 else float(sizes[-1] / seconds[-1])


def beside_compute(streams: Sequence[Mapping[str, float]]) -> BesideCompute:
    """Figures of what `streams_of` has measured: a line through all launches, factors where lanes were always busy."""
    sizes, launches = (np.array([stream[key] for stream in streams]) for key in ("bytes", "launch_s"))
    constant, slope = _fit(sizes, launches)
    full = [stream for stream in streams if stream["pace"] <= DRY_PACE]
    slowdown = statistics.mean(stream["compute_s"] / stream["compute_alone_s"] for stream in full)
    hindrance = statistics.median(map(_hindrance, full))
    return BesideCompute(constant, 1 / slope if slope > 0 else 0.0, max(1.0, slowdown), max(1.0, hindrance))


def _hindrance(stream: Mapping[str, float]) -> float:
    """Of one stream; where next to nothing was carried beside compute, as much as can be told."""
    carried_s = max(stream["alone_s"] - stream["left_s"], stream["alone_s"] / MOST)
    return min(MOST, (stream["launch_s"] + stream["compute_s"]) / carried_s)


def _fit(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    matrix = np.stack([np.ones(len(sizes)), sizes], axis=1) / seconds[:, None]
    (constant, slope), _ = nnls(matrix, np.ones(len(seconds)))
    return float(constant), float(slope)


# ---- one rank


def streams_of(kinds: Sequence[Start], device: torch.device, *, fast: bool) -> list[dict[str, float]]:
    """Streams of each kind of message, size and pace; all ranks call it alike. All seconds are of one message.

    Args:
        kinds: what launches a message.
        device: of the tensors.
        fast: shows that it works, its figures are of no use.
    """
    compute = Compute.agreed(device)
    found = []
    for start in kinds:
        for size in FAST_SIZES if fast else SIZES:
            whole = torch.ones(size // 4, device=device)
            alone_s = _agreed(statistics.median(_burst(start, whole) for _ in range(1 if fast else 7)))
            for pace in PACES:
                chunks = max(1, round(pace * alone_s / compute.chunk_s))
                rounds = 1 if fast else max(2, int(STREAM_S / (MESSAGES * chunks * compute.chunk_s)))
                runs = [_stream(start, whole, compute, chunks) for _ in range(rounds)]
                means = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
                found.append({"bytes": size, "pace": pace, "alone_s": alone_s, **means})
    return found


def _stream(start: Start, whole: torch.Tensor, compute: Compute, chunks: int) -> dict[str, float]:
    dist.barrier()
    alone_s = compute.run(chunks * MESSAGES)
    dist.barrier()
    waits = []
    launch_s = compute_s = 0.0
    for _ in range(MESSAGES):
        began = time.perf_counter()
        waits.append(start(whole))
        launch_s += time.perf_counter() - began
        compute_s += compute.run(chunks)
    left_s = _waited(waits)
    seconds = {"launch_s": launch_s, "compute_s": compute_s, "compute_alone_s": alone_s, "left_s": left_s}
    return {key: value / MESSAGES for key, value in seconds.items()}


def _burst(start: Start, whole: torch.Tensor) -> float:
    """Seconds of one of several messages that are launched at once, with no compute beside them."""
    dist.barrier()
    began = time.perf_counter()
    _waited([start(whole) for _ in range(MESSAGES)])
    return (time.perf_counter() - began) / MESSAGES


def _waited(waits: Sequence[Callable[[], object]]) -> float:
    began = time.perf_counter()
    for wait in waits:
        wait()
    return time.perf_counter() - began


class Compute:
    """Compute in small chunks: a product and a sum, as in a step.

    Attributes:
        chunk_s: seconds of one, alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.randn(256, 256, device=device)
        self._vector = torch.randn(2**18, device=device)
        self.run(100)
        self.chunk_s = statistics.median(self.run(20) / 20 for _ in range(20))

    @classmethod
    def agreed(cls, device: torch.device) -> Compute:
        """With seconds as rank 0 has measured them; all ranks call it alike."""
        compute = cls(device)
        compute.chunk_s = _agreed(compute.chunk_s)
        return compute

    def run(self, chunks: int) -> float:
        """Seconds of so many."""
        began = time.perf_counter()
        for _ in range(chunks):
            torch.mm(self._matrix, self._matrix)
            torch.add(self._vector, self._vector)
        settle(self._matrix.device)
        return time.perf_counter() - began


def _agreed(seconds: float) -> float:
    """Rank 0's: all ranks must do as much."""
    found: list[Any] = [seconds]
    dist.broadcast_object_list(found, 0)
    return float(found[0])
