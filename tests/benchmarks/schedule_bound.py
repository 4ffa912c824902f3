"""How near schedules come to the lower bound: shapes of large models, worlds, machines; against three other policies.

    python -m tests.benchmarks.schedule_bound --json out/schedule_bound.json
    python -m tests.benchmarks.schedule_bound --models llama_8b --worlds 64 --layers 8

Each row is written to the file as it is done; with --resume, rows that it has already are not measured again.

One process, no GPU, no process group: models live on the meta device, times are those of the cost model. All policies
order the same program (same buckets), and may take as much memory as prefetching one bucket ahead does, or, with
--times-smallest, a multiple of the least (which prefetching one bucket ahead does not heed):

    no overlap     each collective is waited for where it is launched, a gather where it is read
    prefetch one   FSDP2's: the next bucket is gathered while one is read, a reduction waited for at the next one
    as early       DeepCompile's: gathers are launched as early as memory allows
    by cost        the pass schedule_step

The first three update behind backward, as what they stand for does. Shapes of Mixtral are those of 8 experts of which
each token takes 2; here each expert takes a quarter of the tokens, so that shapes do not depend on values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from examples.llama_meta import Attention, Llama, llama, llama_70b
from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import Hardware
from fxzero.cost.tasks import step_tasks
from fxzero.recipe import captured_as, recipe
from fxzero.schedule.bound import lower_bound
from fxzero.schedule.evaluate import peak_of, times_of
from fxzero.schedule.least_memory import least_memory_order, without_overlap
from fxzero.schedule.list_schedule import Policy, list_schedule, ways_to_end
from fxzero.schedule.local_search import find_schedule
from fxzero.schedule.problem import Problem

GIB = 2**30
MIB = 2**20


class Experts(nn.Module):
    """Each of 8 gated perceptrons takes a quarter of the tokens, weighted by a router."""

    def __init__(self, *, dim: int, ffn: int, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.w1, self.w2, self.w3 = (
            nn.ModuleList(nn.Linear(*size, bias=False) for _ in range(experts))
            for size in ((dim, ffn), (ffn, dim), (dim, ffn))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weights = self.router(flat).softmax(-1)
        rows = flat.shape[0] // 4
        parts = []
        for index, (w1, w2, w3) in enumerate(zip(self.w1, self.w2, self.w3, strict=True)):
            start = index % 4 * rows
            own = flat[start : start + rows]
            parts.append(w2(F.silu(w1(own)) * w3(own)) * weights[start : start + rows, index, None])
        halves = [torch.cat(parts[:4]), torch.cat(parts[4:])]
        return (halves[0] + halves[1]).view_as(x)


class GPT(nn.Module):
    """GPT-3's shapes: learned positions, layer norms, a perceptron of four times the width, biases."""

    def __init__(self, *, layers: int, dim: int, heads: int, vocab: int, seq: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Parameter(torch.zeros(seq, dim))
        self.layers = nn.ModuleList(GPTBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class GPTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class MixtralLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(4096, eps=1e-5), nn.RMSNorm(4096, eps=1e-5)
        self.attention = Attention(dim=4096, heads=32, kv_heads=8)
        self.feed_forward = Experts(dim=4096, ffn=14336)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


def gpt3_13b(layers: int) -> tuple:
    with torch.device("meta"):
        model = GPT(layers=layers, dim=5120, heads=40, vocab=50257, seq=2048)
        tokens = torch.zeros(2, 2048, dtype=torch.int64)
    return model, torch.optim.AdamW(model.parameters()), (tokens, tokens)


def mixtral_8x7b(layers: int) -> tuple:
    with torch.device("meta"):
        sizes = {"dim": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 32000}
        model = Llama(layers=0, seq=4096, **sizes)
        model.layers = nn.ModuleList(MixtralLayer() for _ in range(layers))
        tokens = torch.zeros(1, 4096, dtype=torch.int64)
    return model, torch.optim.AdamW(model.parameters()), (tokens, tokens)


@dataclass(frozen=True)
class Model:
    """Shapes of one model, with the bytes of a bucket: about a block's parameters as they travel."""

    make: Callable[[int], tuple]
    layers: int
    bucket_bytes: int


MODELS = {
    "llama_8b": Model(lambda layers: llama(layers=layers, seq=4096), 32, 512 * MIB),
    "llama_70b": Model(lambda layers: llama_70b(layers=layers, seq=4096), 80, 1024 * MIB),
    "gpt3_13b": Model(gpt3_13b, 40, 640 * MIB),
    "mixtral_8x7b": Model(mixtral_8x7b, 32, 1024 * MIB),
    "llama_405b": Model(
        lambda layers: llama(layers=layers, dim=16384, ffn=53248, heads=128, kv_heads=8, seq=4096), 126, 2048 * MIB
    ),
}


@dataclass(frozen=True)
class Row:
    """One model at one world on one machine; seconds of a step, bytes of a rank's peak."""

    model: str
    layers: int
    world: int
    hardware: str
    bound_s: float
    binds: str
    no_overlap_s: float
    prefetch_one_s: float
    as_early_s: float
    by_cost_s: float
    memory_bound_bytes: int
    by_cost_peak_bytes: int
    smallest_peak_bytes: int
    schedule_seconds: float
    times_smallest: float | None

    @property
    def key(self) -> tuple:
        return self.model, self.layers, self.world, self.hardware, self.times_smallest

    @property
    def part_of_bound(self) -> float:
        return self.bound_s / self.by_cost_s


def captured(model: Model, layers: int, plan: Plan) -> StepGraph:
    module, optimizer, batch = model.make(layers)
    batch = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in batch)
    inventory, fresh = rehearse(Inventory.of(module, optimizer))
    return capture_step(inventory, None, batch, {}, fresh=fresh, options=captured_as(plan)).step


def updates_last(problem: Problem, order: Sequence[int]) -> list[int]:
    late = [problem.nodes[call].meta["phase"] == "update" for call in range(len(problem))]
    for call in range(len(problem)):
        late[call] |= any(late[other] for other in problem.before[call])
    return [call for call in order if not late[call]] + [call for call in order if late[call]]


def as_early(problem: Problem, limit: int) -> list[int]:
    way_out, ways = least_memory_order(problem), ways_to_end(problem)
    policy = Policy(queue_s=float("inf"), in_turn=False)
    order = list_schedule(problem, policy, way_out=way_out, bound_bytes=limit, ways=ways)
    return updates_last(problem, order)


def measure(name: str, layers: int, world: int, hardware: str, step: StepGraph, times_smallest: float | None) -> Row:
    machine = Hardware.load(hardware)
    problem = Problem.of(step, step_tasks(step, machine), slowdown=machine.slowdown, hindrance=machine.hindrance)
    program = list(range(len(problem)))
    smallest = peak_of(problem, least_memory_order(problem))
    limit = peak_of(problem, program) if times_smallest is None else int(times_smallest * smallest)
    start = time.perf_counter()
    found = find_schedule(problem, bound_bytes=limit)
    seconds = time.perf_counter() - start
    assert problem.is_legal(found.order) and found.peak_bytes <= limit
    bound = lower_bound(problem, bound_bytes=limit, places=12)
    others = {
        "no_overlap_s": updates_last(problem, without_overlap(problem)),
        "prefetch_one_s": updates_last(problem, program),
        "as_early_s": as_early(problem, limit),
    }
    assert all(problem.is_legal(order) for order in others.values())
    return Row(
        name,
        layers,
        world,
        hardware,
        bound.seconds,
        bound.binds,
        **{key: times_of(problem, order).seconds for key, order in others.items()},
        by_cost_s=found.seconds,
        memory_bound_bytes=limit,
        by_cost_peak_bytes=found.peak_bytes,
        smallest_peak_bytes=smallest,
        schedule_seconds=seconds,
        times_smallest=times_smallest,
    )


def table(rows: Sequence[Row]) -> str:
    heads = ["model", "world", "machine", "no overlap", "prefetch one", "as early", "by cost", "bound", "% of bound"]
    heads += ["bound by", "peak / bound GiB"]
    lines = [
        [
            f"{row.model} ({row.layers} layers)",
            row.world,
            row.hardware,
            *(f"{s * 1e3:,.0f} ms" for s in (row.no_overlap_s, row.prefetch_one_s, row.as_early_s)),
            *(f"{s * 1e3:,.1f} ms" for s in (row.by_cost_s, row.bound_s)),
            f"{100 * row.part_of_bound:.1f}",
            row.binds,
            f"{row.by_cost_peak_bytes / GIB:.1f} / {row.memory_bound_bytes / GIB:.1f}",
        ]
        for row in rows
    ]
    return tabulate(lines, heads, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_8b", "llama_70b", "gpt3_13b", "mixtral_8x7b"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--hardware", nargs="+", default=["h100", "h100_ethernet"])
    parser.add_argument("--layers", type=int, help="of every model, instead of its own")
    parser.add_argument("--times-smallest", type=float, help="memory, as a multiple of the smallest peak")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file of --json has")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.resume and args.json and args.json.exists():
        rows = [Row(**row) for row in json.loads(args.json.read_text())]
    known = {row.key for row in rows}
    for name in args.models:
        layers = args.layers or MODELS[name].layers
        keys = [(name, layers, *place, args.times_smallest) for place in product(args.worlds, args.hardware)]
        for row in measured([key for key in keys if key not in known]):
            rows.append(row)
            print(table([row]).splitlines()[-1], file=sys.stderr)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(table(rows))


def measured(keys: Sequence[tuple]) -> Iterator[Row]:
    """The rows of one model, world after world: captured once, all passes run once for each world."""
    step, program, last = None, None, None
    for name, layers, world, hardware, times_smallest in keys:
        model = MODELS[name]
        plan = Plan(zero=3, precision="bf16", recompute="blocks", bucket_bytes=model.bucket_bytes)
        if step is None:
            step = captured(model, layers, plan)
            print(f"{name}: {len(step.graph.nodes):,} nodes captured", file=sys.stderr)
        if world != last:
            resolved, last = plan.resolve(world), world
            step.mesh = dict(resolved.axes)
            program = recipe(resolved, backend="nccl").run(step, check=False)
        yield measure(name, layers, world, hardware, program, times_smallest)


if __name__ == "__main__":
    main()
