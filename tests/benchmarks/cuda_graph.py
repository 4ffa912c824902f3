"""Time of a step as one CUDA graph beside the same step launched call by call, on a GPU.

    python -m tests.benchmarks.cuda_graph --json out/cuda_graph.json           # small and larger steps, 30 rounds
    python -m tests.benchmarks.cuda_graph --dim 256 --layers 2 8 --lowering eager
    torchrun --nproc-per-node 2 -m tests.benchmarks.cuda_graph --zero 3        # collectives over nccl are captured too

The decoder of tests/lower, AdamW with a schedule. The variants run in turns, each round a few steps between two events;
what a graph saves is what the host takes to launch, so it shows where kernels are short. Columns:

    step ms     median of the rounds (least..greatest)
    host ms     until the host has launched a step, median
    / without   the step time over that of the same plan without a graph, medians
    pool MiB    what the graph holds for what it computes
    bit-equal   whether losses are those of the same lowering without a graph
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

import fxzero
from tests.lower.models import Decoder

STEPS = 5  # of a round
WARM_UP = 4


class Variant:
    """One way of running the step, warm.

    Args:
        layers, dim, rows: of the decoder and its batch.
        keys: of the plan.
    """

    def __init__(self, layers: int, dim: int, rows: int, keys: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = Decoder(layers, dim=dim).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        self.step = fxzero.compile(model, optimizer, fxzero.Plan(**keys))
        text = torch.randint(50, (rows, 65), generator=torch.Generator().manual_seed(0)).cuda()
        self.batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.losses: list[torch.Tensor] = []
        self.step_ms: list[float] = []
        self.host_ms: list[float] = []
        for _ in range(WARM_UP):
            self.run()

    def run(self) -> None:
        self.losses.append(self.step(*self.batch))
        self.scheduler.step()

    def round(self) -> None:
        """Some steps between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        for _ in range(STEPS):
            self.run()
        end.record()
        self.host_ms.append((time.perf_counter() - start) / STEPS * 1e3)
        torch.cuda.synchronize()
        self.step_ms.append(begin.elapsed_time(end) / STEPS)

    @property
    def pool(self) -> str:
        """MiB of the graph's pool, from the report."""
        line = next((line for line in self.step.report().splitlines() if line.startswith("one CUDA graph")), "")
        return line.rpartition("pool ")[2].removesuffix(" MiB")


def measure(args: argparse.Namespace, layers: int) -> list[dict[str, Any]]:
    """One row a variant."""
    variants = {
        (lowering, graph): Variant(
            layers, args.dim, args.rows, {"zero": args.zero, "lowering": lowering, "cuda_graph": graph}
        )
        for lowering in args.lowering
        for graph in (False, True)
    }
    for _ in range(args.rounds):
        for variant in variants.values():
            variant.round()
    rows = []
    for (lowering, graph), variant in variants.items():
        without = variants[lowering, False]
        median = statistics.median(variant.step_ms)
        rows.append(
            {
                "layers": layers,
                "lowering": lowering,
                "graph": graph,
                "step ms": f"{median:.3f} ({min(variant.step_ms):.3f}..{max(variant.step_ms):.3f})",
                "host ms": statistics.median(variant.host_ms),
                "/ without": median / statistics.median(without.step_ms),
                "pool MiB": variant.pool,
                "bit-equal": torch.equal(torch.stack(variant.losses), torch.stack(without.losses)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 24])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="sequences of 64 tokens")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--lowering", nargs="+", default=["eager", "inductor"], choices=["eager", "inductor", "triton"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device on this machine: there is nothing to time\n")
    if "RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    rows = [row for layers in args.layers for row in measure(args, layers)]
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
