"""Set-up of one training step by depth: regions by Inductor beside torch.compile of the whole model.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.region_depth --depths 8 32 126 --json out/region_depth.json

The model of job.py with width 256, one process, AdamW. Each figure is of a process that begins with nothing compiled
on disk; `again` is fxzero's lowering in a second process, which finds it there. Set-up is the first step less a later
one; torch.compile has the model as one graph, and its optimizer is torch's fused one, which needs no compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent))

from job import Llama, Size, adamw, plain_loop

WIDTH, SEQ, VOCAB = 256, 128, 512


def fxzero_setup(layers: int) -> dict[str, Any]:
    """Seconds of fxzero's first step, and what its regions are."""
    import fxzero

    model = Llama(Size(dim=WIDTH, layers=layers, heads=4, vocab=VOCAB, seq=SEQ))
    step = fxzero.compile(model, adamw(model.parameters()), fxzero.Plan(zero=0, lowering="inductor"))
    found = first_step(step)
    compiled = step._last[-1]
    lowered = compiled.program.lowered
    return found | {
        "capture_s": compiled.seconds["capture"],
        "passes_s": compiled.seconds["passes"],
        "lower_s": compiled.seconds["lower"],
        "regions": len(lowered.regions),
        "distinct": lowered.num_distinct,
        "compiled": lowered.num_compiled,
    }


def whole_setup(layers: int) -> dict[str, Any]:
    """Seconds of the first step of the plain loop, the model compiled as a whole."""
    model = Llama(Size(dim=WIDTH, layers=layers, heads=4, vocab=VOCAB, seq=SEQ))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    return first_step(plain_loop(torch.compile(model), optimizer))


def first_step(step: Any) -> dict[str, Any]:
    """Set-up and step time in seconds."""
    batch = torch.randint(VOCAB, (2, SEQ)), torch.randint(VOCAB, (2, SEQ))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        step(*batch)
        seconds.append(time.perf_counter() - start)
    return {"setup_s": seconds[0] - min(seconds), "step_s": min(seconds)}


def run(what: str, layers: int, folder: str, timeout_s: float) -> dict[str, Any]:
    """What a process of its own finds."""
    environment = {**os.environ, "FXZERO_CACHE_DIR": f"{folder}/fxzero", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
    command = [sys.executable, "-m", "tests.benchmarks.region_depth", "--one", what, "--depths", str(layers)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(layers: int, timeout_s: float) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as other:
        cold = run("fxzero", layers, own, timeout_s)
        warm = run("fxzero", layers, own, timeout_s)
        whole = run("whole", layers, other, timeout_s)
    return {
        "layers": layers,
        "regions": cold["regions"],
        "distinct": cold["distinct"],
        "capture s": cold["capture_s"],
        "passes s": cold["passes_s"],
        "lower s": cold["lower_s"],
        "again s": warm["lower_s"],
        "set-up s": cold["setup_s"],
        "torch.compile set-up s": whole["setup_s"],
        "step s": cold["step_s"],
        "torch.compile step s": whole["step_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[8, 32, 126])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="of one process")
    parser.add_argument("--one", choices=["fxzero", "whole"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps((fxzero_setup if args.one == "fxzero" else whole_setup)(args.depths[0])))
        return
    rows = [compare(depth, args.timeout) for depth in args.depths]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
