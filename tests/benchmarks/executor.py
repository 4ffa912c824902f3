"""What running a program costs beside its arithmetic: microseconds a node, on tensors too small to take time.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.executor --layers 8 --json out/executor.json --profile

The decoder of tests/lower (width 8, 16 tokens), AdamW, one process, on the CPU. `program` is the compiled function
alone; `step` is `step(batch)`, with what is looked up before and after: signature, guards, state. `plain` is the same
training step written by hand (forward, backward, `optimizer.step()` in its for-loop form). They run in turns; medians.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxzero
from tests.lower.models import Decoder, tokens


def plain(layers: int) -> Callable[[], Any]:
    """The step by hand."""
    model = Decoder(layers, dim=8)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batch = tokens(0, rows=1)

    def run() -> None:
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def compiled(layers: int, lowering: str) -> fxzero.TrainStep:
    """The step by fxzero, warm."""
    model = Decoder(layers, dim=8)
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), fxzero.Plan(zero=0, lowering=lowering))
    for _ in range(3):
        step(*tokens(0, rows=1))
    return step


def timed_program(step: fxzero.TrainStep) -> list[float]:
    """Seconds of each later run of a step's program, which are noted from now on."""
    program, seconds = step._last[-1].program, []
    run = program.run

    def noted(inputs: list[Any]) -> Any:
        start = time.perf_counter()
        out = run(inputs)
        seconds.append(time.perf_counter() - start)
        return out

    program.run = noted  # type: ignore[method-assign]
    return seconds


def measure(layers: int, rounds: int) -> list[dict[str, Any]]:
    """One row a way of running the step."""
    steps = {lowering: compiled(layers, lowering) for lowering in ("eager", "inductor")}
    programs = {lowering: timed_program(step) for lowering, step in steps.items()}
    runs: dict[str, Callable[[], Any]] = {"plain": plain(layers)}
    runs |= {name: (lambda step=step: step(*tokens(0, rows=1))) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rows = [{"way": "plain", "step us": statistics.median(seconds["plain"][2:]) * 1e6}]
    for name, step in steps.items():
        program = step._last[-1].program
        nodes = len(program.step.calls())
        calls = sum(" = " in line or line.lstrip().startswith("region_") for line in program.source.splitlines()[3:])
        own, whole = (statistics.median(found[2:]) * 1e6 for found in (programs[name], seconds[name]))
        found = {"way": name, "nodes": nodes, "lines": calls, "step us": whole, "program us": own}
        rows.append(found | {"program us a node": own / nodes, "beside it us": whole - own})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="show where the eager step's time goes")
    args = parser.parse_args()
    rows = measure(args.layers, args.rounds)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
    if args.profile:
        step, profile = compiled(args.layers, "eager"), cProfile.Profile()
        profile.enable()
        for _ in range(10):
            step(*tokens(0, rows=1))
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
