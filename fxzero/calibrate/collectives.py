"""What collectives take: run by torchrun, one process a rank, over the same calls as a program's.

    python -m torch.distributed.run --nproc-per-node 2 -m fxzero.calibrate.collectives out.json

Rank 0 writes the medians; `collective_rates` makes rates of them.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from fxzero.calibrate.beside_compute import BesideCompute, beside_compute
from fxzero.calibrate.company import Compute, rank_environment
from fxzero.calibrate.recorded_steps import StepMeans, recorded_steps
from fxzero.calibrate.small_step import small_step
from fxzero.calibrate.timing import Measured, settle
from fxzero.cost.hardware import CollectiveRate, Link
from fxzero.errors import HardwareError
from fxzero.graph import collectives as c10d
from fxzero.runtime import send_recv

SIZES = (2**14, 2**18, 2**20, 2**22, 2**24)  # bytes of the whole tensor
FAST_SIZES = (2**14, 2**18)
SAMPLES = 21
BURST = 4  # collectives that gloo is given at once
CONTENTION_BYTES = 2**25
TIMEOUT_S = 300
LAUNCH, TOTAL = "launch", "total"

Start = Callable[[torch.Tensor], Callable[[], object]]  # launches on a whole tensor, returns what waits for it


@dataclass(frozen=True)
class Collectives:
    """What a run over several ranks has found.

    Args:
        link: between the ranks of this machine.
        rates: kind of collective -> how near it comes to the link.
        beside: what collectives and compute do to each other, and what launches take.
        rows: what these are made of.
    """

    link: Link
    rates: dict[str, CollectiveRate]
    beside: BesideCompute
    rows: list[Measured]


def steps_and_bytes(kind: str, size: float, ranks: int) -> tuple[int, float]:
    """Messages that follow each other, and bytes on a link, of a collective over ranks of one node.

    The same as `fxzero.cost.communication` counts: a ring, or messages to all peers at once.
    """
    moved = size * (ranks - 1) / ranks
    if kind in ("all_to_all", "send_recv"):
        return 1, moved
    return ((ranks - 1) * 2, 2 * moved) if kind == "all_reduce" else (ranks - 1, moved)


def measure(world: int, *, threads: int, fast: bool = False) -> Collectives:
    """Start `world` processes on this machine and time collectives between them.

    Raises:
        HardwareError: if they fail; with the end of what they said.
    """
    with tempfile.TemporaryDirectory(prefix="fxzero-calibrate-") as folder:
        out = Path(folder) / "collectives.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += ["--module", "fxzero.calibrate.collectives", str(out), *(["--fast"] if fast else [])]
        done = subprocess.run(
            command, env=rank_environment(threads), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            raise HardwareError.of(
                f"calibration over {world} ranks",
                expected="collectives that run",
                got=f"exit code {done.returncode}: {done.stderr.strip()[-400:]}",
                fix="try --world 1, which measures none, and look at what the ranks said",
            )
        return collective_rates(json.loads(out.read_text()))


def collective_rates(found: Mapping[str, Any]) -> Collectives:
    """Rates, from medians.

    What no bytes take is found by a line through all sizes of a kind; the least of it stands for the link, the rest is
    the kind's overhead. What is left of each size is bytes over a rate; the best one stands for the link.
    """
    ranks = int(found["ranks"])
    medians = {kind: _not_falling(by_size) for kind, by_size in found["seconds"].items()}
    fits: dict[str, tuple[float, float]] = {}
    for kind, seconds in medians.items():
        sizes = np.array([steps_and_bytes(kind, size, ranks)[1] for size in seconds])
        fits[kind] = line(sizes, np.array(list(seconds.values())))
    latency_s = min(constant / steps_and_bytes(kind, 0, ranks)[0] for kind, (constant, _) in fits.items())
    reached = {kind: _reached(kind, seconds, fits[kind], ranks) for kind, seconds in medians.items()}
    rate = max(max(by_size.values()) for by_size in reached.values())
    rates: dict[str, CollectiveRate] = {}
    rows: list[Measured] = []

    def predicted(kind: str, size: float) -> float:
        messages, moved = steps_and_bytes(kind, size, ranks)
        return rates[kind].overhead_s + messages * latency_s + moved / (rate * rates[kind].part(size))

    for kind, (constant, _) in fits.items():
        steps = steps_and_bytes(kind, 0, ranks)[0]
        parts = tuple(own / rate for own in reached[kind].values())
        rates[kind] = CollectiveRate(max(0.0, constant - latency_s * steps), tuple(reached[kind]), parts)
        for size, times in found["seconds"][kind].items():
            case = f"{int(size):,} bytes over {ranks}"
            rows.append(Measured(f"collectives.{kind}", case, times[TOTAL], predicted(kind, float(size))))
    beside, steps_rows = _beside(found, predicted)
    return Collectives(Link(latency_s, rate), rates, beside, rows + steps_rows)


def _beside(found: Mapping[str, Any], alone_s: Callable[[str, float], float]) -> tuple[BesideCompute, list[Measured]]:
    if not found["steps"]:
        launch_s = statistics.median(min(t[LAUNCH] for t in by_size.values()) for by_size in found["seconds"].values())
        return BesideCompute(launch_s, slowdown=max(1.0, float(found["slowdown"]))), []
    steps = {form: StepMeans(**seen) for form, seen in found["steps"].items()}
    programs = {form: small_step(int(found["ranks"]), form, torch.device("cpu"), fast=found["fast"]) for form in steps}
    return beside_compute(steps, programs, alone_s)


def line(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(seconds of no bytes, bytes a second); where time does not grow with bytes, at least the rate of the largest."""
    matrix = np.stack([np.ones(len(sizes)), sizes], axis=1) / seconds[:, None]
    (constant, slope), _ = nnls(matrix, np.ones(len(seconds)))
    return float(constant), float(1 / slope) if slope > 0 else float(sizes[-1] / seconds[-1])


def _not_falling(by_size: Mapping[str, Mapping[str, float]]) -> dict[float, float]:
    """Size -> seconds, ascending; where a size seemed to take longer than a larger one, other work was in the way."""
    found: dict[float, float] = {}
    least = math.inf
    for size in sorted(by_size, key=float, reverse=True):
        least = min(least, by_size[size][TOTAL])
        found[float(size)] = least
    return dict(reversed(found.items()))


def _reached(kind: str, by_size: Mapping[float, float], fit: tuple[float, float], ranks: int) -> dict[float, float]:
    """Size -> bytes a second on the link; small sizes, where latency is most of the time, by the line through all."""
    constant, rate = fit
    found = {}
    for size, seconds in by_size.items():
        moved = steps_and_bytes(kind, size, ranks)[1]
        left_s = seconds - constant
        found[size] = moved / left_s if left_s > constant else rate
    return found


# ---- one rank


def _rank(out: Path, *, fast: bool) -> None:
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    kinds = _kinds(ranks, device, messages=not cuda)
    found: dict[str, Any] = {"ranks": ranks, "seconds": {}, "steps": {}, "slowdown": 1.0, "fast": fast}
    for kind, start in kinds.items():
        found["seconds"][kind] = {}
        for size in FAST_SIZES if fast else SIZES:
            found["seconds"][kind][size] = _median_of(
                start, torch.ones(size // 4, device=device), burst=1 if cuda else BURST, fast=fast
            )
    if cuda:  # nccl has no such messages here: one peer at a time is an all_to_all
        found["seconds"]["send_recv"] = found["seconds"]["all_to_all"]
        found["slowdown"] = 1.0 if fast else _slowdown(kinds["all_gather"], device)
    else:
        found["steps"] = {form: vars(seen) for form, seen in recorded_steps(ranks, device, fast=fast).items()}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _kinds(ranks: int, device: torch.device, *, messages: bool) -> dict[str, Start]:
    """Kind -> what launches it on a whole tensor and returns what waits for it."""
    group = dist.group.WORLD
    name = str(group.group_name)  # type: ignore[union-attr]

    def native(launch: Callable[[torch.Tensor], torch.Tensor]) -> Start:
        def start(whole: torch.Tensor) -> Callable[[], object]:
            launched = launch(whole)
            return lambda: c10d.wait(launched)

        return start

    def rows(whole: torch.Tensor) -> torch.Tensor:
        return whole[: whole.numel() // ranks]

    def by_messages(whole: torch.Tensor) -> Callable[[], object]:
        pending = send_recv.launch_all_gather(rows(whole), ranks, group, 1)
        return pending.finish

    def splits(whole: torch.Tensor) -> list[int]:
        return [whole.numel() // ranks] * ranks

    kinds = {
        "all_gather": native(lambda whole: c10d.all_gather(rows(whole), ranks, name)),
        "reduce_scatter": native(lambda whole: c10d.reduce_scatter(whole, "sum", ranks, name)),
        "all_reduce": native(lambda whole: c10d.all_reduce(whole, "sum", name)),
        "all_to_all": native(lambda whole: c10d.all_to_all(whole, splits(whole), splits(whole), name)),
    }
    return {**kinds, "send_recv": by_messages} if messages else kinds


def _median_of(start: Start, whole: torch.Tensor, *, burst: int, fast: bool) -> dict[str, float]:
    """Of one collective; over gloo, of several at once, as buckets launch them: its threads carry them together."""
    launched, total = [], []
    for number in range(-2, 3 if fast else SAMPLES):
        dist.barrier()
        settle(whole.device)
        began = time.perf_counter()
        waits = [start(whole) for _ in range(burst)]
        held = time.perf_counter() - began
        for wait in waits:
            wait()
        settle(whole.device)
        if number >= 0:
            launched.append(held / burst)
            total.append((time.perf_counter() - began) / burst)
    return {LAUNCH: statistics.median(launched), TOTAL: statistics.median(total)}


def _slowdown(start: Start, device: torch.device) -> float:
    """By what factor compute takes longer while a collective is under way; all ranks compute, as in a step."""
    whole = torch.ones(CONTENTION_BYTES // 4, device=device)
    compute = Compute(device)
    dist.barrier()
    under_way = statistics.median(_median_of(start, whole, burst=1, fast=True)[TOTAL] for _ in range(2))
    number = max(1, int(0.5 * under_way / compute.chunk_s))  # ends before the collective does
    alone, beside = [], []
    for _ in range(9):  # in turns, so that what else the machine does falls on both
        dist.barrier()
        alone.append(compute.run(number))
        dist.barrier()
        wait = start(whole)
        beside.append(compute.run(number))
        wait()
    return statistics.median(beside) / statistics.median(alone)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), fast="--fast" in sys.argv)
