"""Variants of the benchmark job in one process group, a step of each in turns: what a machine does meanwhile hits all.

    export OMP_NUM_THREADS=1
    torchrun --nproc-per-node 2 tests/benchmarks/in_turns.py fsdp2 fsdp2+compile ddp+compile fxzero3+inductor
    torchrun --nproc-per-node 1 tests/benchmarks/in_turns.py plain+compile fxzero0+inductor

compare.py runs each variant in processes of its own and counts memory and messages; its rounds are minutes apart, and a
shared machine is not the same then. Here a ratio is one of steps that follow each other; its median over steps is what
counts. Keys of fxzero's plan go behind an @: fxzero3+inductor@{"all_gather":"shared_memory"}.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from job import JOBS, VARIANTS, Llama, batch, corpus, data_of
from tabulate import tabulate


def built(variant, size):
    """The step of a variant, from the same initial weights as any other."""
    name, _, keys = variant.partition("@")
    if name not in VARIANTS:
        raise SystemExit(f"{name!r}: expected one of {', '.join(VARIANTS)}, perhaps with @ and a plan's keys in JSON")
    torch.manual_seed(0)
    return VARIANTS[name](Llama(size), json.loads(keys or "{}"))


def measure(args):
    """Variant -> seconds of each step, the first ones left out, and its last loss; the same on all ranks."""
    size, data = JOBS[args.job], corpus()
    steps = {variant: built(variant, size) for variant in args.variants}
    found = {variant: {"seconds": [], "loss": 0.0} for variant in steps}
    for index in range(args.warmup + args.steps):
        for variant, step in steps.items():
            rank, parts = data_of(variant.partition("@")[0])
            inputs = batch(data, size, step=index, rank=rank, world_size=parts)
            dist.barrier()
            began = time.perf_counter()
            found[variant]["loss"] = float(step(*inputs))
            dist.barrier()
            found[variant]["seconds"] += [time.perf_counter() - began] * (index >= args.warmup)
    return found


def table(found):
    """Medians with span, and ratios of steps that follow each other to the first variant's."""
    first = next(iter(found.values()))["seconds"]
    rows = []
    for variant, own in found.items():
        seconds = own["seconds"]
        ratios = sorted(b / a for a, b in zip(first, seconds, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        span = f"{statistics.median(seconds):.3f} ({min(seconds):.3f}..{max(seconds):.3f})"
        rows.append([variant, span, f"{statistics.median(ratios):.3f} ({low:.3f}..{high:.3f})", f"{own['loss']:.6f}"])
    headers = ["variant", "step s (min..max)", "/ first (quartiles)", "loss"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def main():
    """Rank 0 has printed the table, and written the steps' seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", help="the first one is what others are held against")
    parser.add_argument("--job", choices=JOBS, default="llama")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=4, help="first steps, which are not counted")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    found = measure(args)
    if dist.get_rank() == 0:
        print(f"{args.job}, {dist.get_world_size()} ranks, torch {torch.__version__}, {args.steps} steps in turns")
        print(table(found))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
