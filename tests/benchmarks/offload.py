"""A model whose state is three times a budget trains on one rank: its state rests in files, beside all kept in memory.

    python tests/benchmarks/offload.py                               # about four minutes on two cores
    python tests/benchmarks/offload.py --directory /fast/disk --rounds 3

The job is that of job.py (34M parameters: 390 MB of parameters and AdamW state) on one rank and one core, from a model
on the meta device that is filled module by module. A round runs each variant once, in a process of its own, every
second round in reverse order; ratios are taken within a round.

    none        everything in memory
    host        state and activations in host memory beside the allocator, as it would be beside a GPU
    host update the same, every update on the host
    nvme        state in files (direct I/O), blocks recomputed; tensors held to --budget, a third of the state

Columns: the loss after the last step (equal for all: nothing that is computed changes), the median step and its ratio
to `none`, the peak of tensors with what was predicted, from the first byte of the model on; bytes swapped out and in a
step, as predicted, as counted, and as the system counts them (/proc/self/io); and how much anonymous memory the
process held at most in a step beyond what it held before it, which is tensors and buffers: the host's share is that
less the tensors.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from compare import build_memory_counter, machine, median_and_range, number
from job import JOBS, MB, Llama, MemoryCounter, adamw, batch, corpus
from tabulate import tabulate

STATE = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "offload_activations": "nvme"}
HOST = dict.fromkeys(STATE, "host")
VARIANTS = {
    "none": {},
    "host": HOST,
    "host update": {**HOST, "update_on_host": 1.0},
    "nvme": {**STATE, "recompute": "blocks"},
}
COLUMNS = ("variant", "loss", "step s", "/none", "min..max", "peak MB", "predicted", "out MB a step", "in MB a step")
COLUMNS += ("of the system", "anonymous MB", "buffers MB")


def parts_of(text):
    """ "key: number" lines of a file of /proc."""
    return {
        key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in text.splitlines()) if value
    }


class Watch:
    """The most anonymous memory that the process holds, looked at every few milliseconds."""

    def __init__(self):
        self.most_mb, self._going = 0.0, True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @staticmethod
    def now_mb():
        """Of this process; 0 where the system does not say."""
        lines = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(lines[0].split()[1]) / 1024 if lines else 0.0

    def _look(self):
        while self._going:
            self.most_mb = max(self.most_mb, self.now_mb())
            time.sleep(0.004)

    def end(self):
        """Stop looking; the most, in MB."""
        self._going = False
        self._thread.join()
        return self.most_mb


def measure(connection, plan, steps, library):
    """What the process of one variant does: make the model, take the steps, send the figures."""
    import torch

    import fxzero
    from fxzero.cost.memory import memory_profile
    from fxzero.graph.swap_ops import swapped_bytes

    torch.set_num_threads(1)
    size, data = JOBS["llama"], corpus()
    memory = MemoryCounter(library)
    memory.reset_peak()
    base_mb = memory.read()[0]
    with torch.device("meta"):
        model = Llama(size)
    step = fxzero.compile(model, adamw(model.parameters()), fxzero.Plan(**{"lowering": "eager"} | plan), init=fill)
    losses, times_s = [step(*batch(data, size, step=0, rank=0, world_size=1))], []
    swapper = step._state.homes.swapper
    before = swapper and swapper.traffic()
    io = parts_of(Path("/proc/self/io").read_text())
    held_mb, watch = Watch.now_mb(), Watch()
    for index in range(1, steps + 1):
        given = batch(data, size, step=index, rank=0, world_size=1)
        began = time.perf_counter()
        losses.append(step(*given))
        times_s.append(time.perf_counter() - began)
    anonymous_mb = watch.end() - held_mb
    io = {key: value - io[key] for key, value in parts_of(Path("/proc/self/io").read_text()).items()}
    moved = swapped_bytes(step.graph.calls())
    predicted = [sum(size for (_, way), size in moved.items() if way == which) for which in ("out", "in")]
    counted = [0, 0]
    if swapper:
        after = swapper.traffic()
        counted = [
            sum(now.values()) - sum(then.values())
            for now, then in zip((after.written, after.read), (before.written, before.read), strict=True)
        ]
    connection.send(
        {
            "losses": torch.stack(losses).tolist(),
            "times_s": times_s,
            "peak_mb": memory.read()[1] and memory.read()[1] - base_mb,
            "predicted_mb": memory_profile(step.graph).peak_bytes / MB,
            "state_mb": sum(p.nbytes for p in model.parameters()) * 3 / MB,
            "predicted_swaps_mb": [number / MB for number in predicted],
            "counted_swaps_mb": [number / MB / steps for number in counted],
            "system_mb": [io["write_bytes"] / MB / steps, io["read_bytes"] / MB / steps],
            "anonymous_mb": anonymous_mb,
            "buffers_mb": swapper.buffers.num_made * swapper.buffers.buffer_bytes / MB if swapper else 0.0,
        }
    )


def fill(module):
    """The initial values of one module: those of job.py's model, but for the draw."""
    import torch

    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 2:
            generator = torch.Generator().manual_seed(parameter.shape[0])
            parameter.data.normal_(std=0.02, generator=generator)
        else:
            parameter.data.fill_(1.0)
    for name, table in module.named_buffers(recurse=False):
        half = table.shape[1]
        angles = torch.outer(torch.arange(table.shape[0]), 10000 ** (-torch.arange(half) / half))
        table.copy_(angles.cos() if name == "cos" else angles.sin())


def run(plan, steps, library):
    """The figures of one variant, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, plan, steps, library), daemon=True)
    process.start()
    while not ours.poll(1):
        if not process.is_alive():
            raise SystemExit(f"the process of {plan} ended with {process.exitcode}")
    answer = ours.recv()
    process.join()
    return answer


def table(results):
    """One line a variant."""
    rows = []
    for name, answers in results.items():
        last = answers[-1]
        ratios = [
            statistics.median(own["times_s"]) / statistics.median(plain["times_s"])
            for own, plain in zip(answers, results["none"], strict=True)
        ]
        times, _ = median_and_range([statistics.median(answer["times_s"]) for answer in answers], 3)
        out, back = zip(last["predicted_swaps_mb"], last["counted_swaps_mb"], strict=True)
        cells = [f"{predicted:.1f}, {counted:.1f}" for predicted, counted in (out, back)]
        system = "{:.1f}, {:.1f}".format(*last["system_mb"])
        shown = [number(last["peak_mb"], 1), number(last["predicted_mb"], 1), *cells, system]
        loss = number(last["losses"][-1], 6)
        rows.append([name, loss, times, *median_and_range(ratios, 2), *shown])
        rows[-1] += [number(last["anonymous_mb"], 0), number(last["buffers_mb"], 0)]
    align = ["left", *["right"] * (len(COLUMNS) - 1)]
    return tabulate(rows, headers=COLUMNS, colalign=align, disable_numparse=True)


def main():
    """Prints the table, writes JSON; returns 1 if a loss, a budget or a count is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each variant in a round, after a first one")
    parser.add_argument(
        "--budget", type=float, default=None, help="MB of tensors for nvme; default: a third of the state"
    )
    parser.add_argument("--directory", default=None, help="where files go; default: that for temporary files")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=Path, default=Path("out/offload.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ["OMP_NUM_THREADS"] = "1"
    library, why_not = build_memory_counter(sys.executable, args.out.parent / "cache")
    if why_not:
        print(f"no measured peaks: memory_counter.cpp was not built ({why_not})")
    size = JOBS["llama"]
    state_mb = sum(p.nbytes for p in Llama(size).parameters()) * 3 / MB
    budget_mb = args.budget or state_mb / 3
    names = ["none", *(name for name in args.variants if name != "none")]
    results = {name: [] for name in names}
    for index in range(args.rounds):
        for name in names if index % 2 == 0 else names[::-1]:
            print(f"round {index + 1}: {name}", file=sys.stderr, flush=True)
            plan = dict(VARIANTS[name])
            if name == "nvme":
                plan |= {"memory_budget": int(budget_mb * MB), "offload_dir": args.directory}
            results[name].append(run(plan, args.steps, library and str(library)))
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": version("torch"),
        "machine": machine(),
        "state_mb": state_mb,
        "budget_mb": budget_mb,
        "results": results,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"state {state_mb:.0f} MB, budget of nvme {budget_mb:.0f} MB, torch {version('torch')}")
    print(table(results))
    every = [answer for answers in results.values() for answer in answers]
    equal = all(answer["losses"] == every[0]["losses"] for answer in every)
    counts = all(
        abs(a - b) < 1e-6
        for answer in every
        for a, b in zip(answer["predicted_swaps_mb"], answer["counted_swaps_mb"], strict=True)
    )
    within = all((answer["peak_mb"] or 0) <= budget_mb for answer in results.get("nvme", []))
    print(f"losses equal: {equal}; swaps as predicted: {counts}; nvme within its budget: {within}")
    return 0 if equal and counts and within else 1


if __name__ == "__main__":
    sys.exit(main())
