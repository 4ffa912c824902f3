"""Peak tensor memory against step time: fxzero's recompute="auto", torch.compile's memory budget, torch's checkpoint.

    python tests/benchmarks/recompute_frontier.py                    # about six minutes on two cores
    python tests/benchmarks/recompute_frontier.py --layers 3 --budgets 1 --rounds 1 --steps 1  # to see that it works

A decoder of twelve blocks (that of job.py, without dropout), on one CPU core, sized so that activations are most of the
memory. Each variant lives in a process of its own and takes its turn: a round lets each make some steps, every second
round in reverse order, because a machine's speed drifts. Ratios are taken within a round, to that round's plain loop.

    plain         the loop that everybody writes, in eager mode
    checkpoint    the same with torch.utils.checkpoint around each block
    aot 0.5       torch.compile(backend="aot_eager") with activation_memory_budget=0.5: torch's partitioner decides
    none, blocks  fxzero with that `recompute`
    auto 0.5      fxzero with recompute="auto", its budget half way between the predicted peaks of blocks and of none

Columns: the loss after the last step (equal for all, or one computes something else), the median step, its ratio to
plain with min..max over rounds, the measured peak of tensors in a step, and what fxzero predicted of it.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from compare import build_memory_counter, machine, median_and_range, number
from job import MB, Llama, MemoryCounter, Size, adamw, batch, corpus
from tabulate import tabulate

SIZE = Size(dim=128, layers=12, heads=4, vocab=256, seq=256, microbatch=8)
PARTS = (0.9, 0.7, 0.5, 0.3, 0.15, 0.02)  # of what blocks save, how much a budget leaves
AOT_BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
COLUMNS = ("variant", "loss", "step s", "min..max s", "/plain", "min..max")
COLUMNS += ("peak MB", "predicted MB", "budget MB", "note")


def plain_step(model, *, compiled=None, checkpointed=False):
    """Eager forward, backward and update; optionally torch compiles forward and backward within a memory budget."""
    import torch
    from torch.utils.checkpoint import checkpoint

    optimizer, loss_of = adamw(model.parameters()), model
    for layer in model.layers if checkpointed else ():
        whole = layer.forward
        layer.forward = lambda *args, whole=whole: checkpoint(whole, *args, use_reentrant=False)
    if compiled is not None:
        torch._functorch.config.activation_memory_budget = compiled
        loss_of = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(x_BT, y_BT):
        loss = loss_of(x_BT, y_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, None


def fxzero_step(model, **plan):
    """The compiled step, and a function that says what was predicted of it."""
    import fxzero
    from fxzero.cost.memory import memory_profile

    step = fxzero.compile(model, adamw(model.parameters()), fxzero.Plan(**{"lowering": "eager"} | plan))
    return step, lambda: memory_profile(step.graph).peak_bytes


def next_order(connection):
    """How many steps to make; None: no more, or nobody is there to ask for any."""
    try:
        return connection.recv()
    except EOFError:
        return None


def serve(connection, size, kind, value, library):
    """What a variant's process does: make the step, then as many as asked for, until told to end."""
    import torch

    torch.set_num_threads(1)
    memory = MemoryCounter(library)
    data = corpus()
    torch.manual_seed(0)
    model = Llama(size)
    try:
        if kind == "fxzero":
            step, predicted = fxzero_step(model, **value)
        else:
            step, predicted = plain_step(model, **value)
        count = 0
        while (num_steps := next_order(connection)) is not None:
            times_s, loss = [], None
            inputs = [batch(data, size, step=count + i, rank=0, world_size=1) for i in range(num_steps)]
            memory.reset_peak()
            for given in inputs:
                began = time.perf_counter()
                loss = step(*given)
                times_s.append(time.perf_counter() - began)
            count += num_steps
            answer = {"times_s": times_s, "loss": loss.item(), "peak_mb": memory.read()[1]}
            connection.send(answer | {"predicted_mb": predicted() / MB if predicted else None})
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"[:300]})


class Variant:
    """One way to train, in a process of its own; `results` are its answers, round by round."""

    def __init__(self, name, kind, value, *, size, library):
        self.name, self.results, self.error = name, [], None
        self.budget_mb = value.get("memory_budget", 0) / MB or None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, size, kind, value, library), daemon=True)
        self.process.start()

    def run(self, num_steps):
        """So many steps more; returns the answer, or None where the variant has failed."""
        if self.error is not None:
            return None
        self.connection.send(num_steps)
        while not self.connection.poll(1):
            if not self.process.is_alive():
                self.error = f"its process ended with {self.process.exitcode}"
                return None
        answer = self.connection.recv()
        self.error = answer.get("error")
        return None if self.error else answer

    def end(self):
        """Let the process end."""
        if self.error is None:
            self.connection.send(None)
        self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()


def start_all(args, size, library):
    """The variants, each past its warm-up: compiled, with optimizer state, its memory steady."""

    def start(*variants):
        print(f"compiling {', '.join(name for name, _, _ in variants)}", file=sys.stderr, flush=True)
        started = [Variant(name, kind, value, size=size, library=library) for name, kind, value in variants]
        with ThreadPoolExecutor(len(started)) as pool:  # two at a time: as many as there are cores to compile on
            answers = list(pool.map(lambda variant: variant.run(args.warmup), started))
        return started, [answer and answer["predicted_mb"] for answer in answers]

    variants, _ = start(("plain", "plain", {}), ("checkpoint", "plain", {"checkpointed": True}))
    own, (most_mb, least_mb) = start(("none", "fxzero", {}), ("blocks", "fxzero", {"recompute": "blocks"}))
    variants += own
    if most_mb is None or least_mb is None:
        raise SystemExit("\n".join(f"{variant.name}: {variant.error}" for variant in own if variant.error))
    wanted = []
    for part in PARTS[-args.budgets :]:
        budget = int((least_mb + part * (most_mb - least_mb)) * MB)
        wanted.append((f"auto {part}", "fxzero", {"recompute": "auto", "memory_budget": budget}))
    wanted += [(f"aot {budget}", "plain", {"compiled": budget}) for budget in AOT_BUDGETS[-args.budgets :]]
    for index in range(0, len(wanted), 2):
        variants += start(*wanted[index : index + 2])[0]
    return variants


def summarize(variant, plain):
    """The figures of one variant over all rounds; `plain` is the loop's answers, round by round."""
    if not variant.results:
        return {"error": variant.error}
    step_s = [statistics.median(answer["times_s"]) for answer in variant.results]
    return {
        "loss": variant.results[-1]["loss"],
        "step_s": step_s,
        "over_plain": [s / statistics.median(p["times_s"]) for s, p in zip(step_s, plain, strict=True)],
        "peak_mb": max((a["peak_mb"] for a in variant.results if a["peak_mb"] is not None), default=None),
        "predicted_mb": variant.results[-1]["predicted_mb"],
        "budget_mb": variant.budget_mb,
        "error": variant.error,
    }


def table(summaries):
    """The comparison as text, one line a variant."""
    rows = []
    for name, s in summaries.items():
        if "step_s" not in s:
            rows.append([name, *[""] * (len(COLUMNS) - 2), s["error"]])
            continue
        cells = [number(s["loss"], 6), *median_and_range(s["step_s"], 3), *median_and_range(s["over_plain"], 2)]
        cells += [number(s[key], 1) for key in ("peak_mb", "predicted_mb", "budget_mb")]
        rows.append([name, *cells, s["error"] or ""])
    align = ["left", *["right"] * (len(COLUMNS) - 2), "left"]
    return tabulate(rows, headers=COLUMNS, colalign=align, disable_numparse=True)


def draw(summaries, path):
    """A picture: peak memory to the right, step time as a multiple of the plain loop's upwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    families = {"fxzero auto": ("auto", "none"), "torch.compile, aot_eager": ("aot",), "fxzero blocks": ("blocks",)}
    families |= {"torch.utils.checkpoint": ("checkpoint",), "plain loop": ("plain",)}
    for label, names in families.items():
        found = [s for name, s in summaries.items() if name.split()[0] in names and s.get("peak_mb")]
        points = sorted((s["peak_mb"], *(f(s["over_plain"]) for f in (statistics.median, min, max))) for s in found)
        if points:
            sizes, middle, low, high = zip(*points, strict=True)
            below = [m - a for m, a in zip(middle, low, strict=True)]
            spread = [below, [b - m for m, b in zip(middle, high, strict=True)]]
            axes.errorbar(sizes, middle, yerr=spread, marker="o", capsize=3, label=label)
    axes.set_xlabel("peak tensor memory of a step, MB")
    axes.set_ylabel("step time, plain loop = 1")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SIZE.layers, help="blocks of the model")
    about = f"how many of each kind, at most {len(PARTS)}"
    parser.add_argument("--budgets", type=int, default=len(PARTS), choices=range(1, len(PARTS) + 1), help=about)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of each variant in a round")
    parser.add_argument("--warmup", type=int, default=1, help="first steps, not in times and memory")
    parser.add_argument("--out", type=Path, default=Path("out/recompute_frontier.json"), help="the PNG lies beside it")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.warmup) < 1:
        parser.error("--rounds, --steps, --warmup: expected at least 1 of each")
    return args


def main():
    """Prints the table, writes JSON and PNG; returns the exit code."""
    args = parse_arguments()
    size = dataclasses.replace(SIZE, layers=args.layers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the processes of the variants get this path too
    os.environ["OMP_NUM_THREADS"] = "1"
    library, why_not = build_memory_counter(sys.executable, args.out.parent / "cache")
    if why_not:
        print(f"no memory figures: memory_counter.cpp was not built ({why_not})")
    variants = start_all(args, size, library and str(library))
    for index in range(args.rounds):
        for variant in variants if index % 2 == 0 else variants[::-1]:
            if (answer := variant.run(args.steps)) is not None:
                variant.results.append(answer)
    for variant in variants:
        variant.end()
    plain = next(variant for variant in variants if variant.name == "plain")
    summaries = {variant.name: summarize(variant, plain.results) for variant in variants}
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": version("torch"),
        "machine": machine(),
        "job": vars(size),
        "run": {key: getattr(args, key) for key in ("rounds", "steps", "warmup")},
        "summary": summaries,
        "raw": {variant.name: variant.results for variant in variants},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(summaries, args.out.with_suffix(".png"))
    print(f"{size.layers} blocks, one core, {args.rounds} rounds of {args.steps} steps, torch {version('torch')}")
    print(table(summaries))
    return 1 if any(s["error"] for s in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
