"""Wire ratio and held-out loss of the demo model under each compression, next to none.

    python tests/benchmarks/compression.py                          # all of them, 300 steps, at 2 and at 4 ranks
    python tests/benchmarks/compression.py --world 2 --only int8    # one part; results are kept in --out
    python tests/benchmarks/compression.py --table                  # the table of the parts that are there

The model, its data (the standard library's sources) and its schedule are those of examples/train_gpt.py, sharded by
ZeRO-3 over gloo. A part is one compression at one number of ranks, in a process group of its own: a run that was
interrupted goes on with the parts that are missing. Columns:

    gathers, reductions, step   bytes that a rank sends in a step to gather parameters, to reduce gradients, and for all
                                together: counted in the graph, as a factor of the uncompressed run's
    loss, - none                nats per byte of held-out text after the last step, and its distance to uncompressed
    weights off                 norm of what rounding takes off the trained weights, relative to theirs
    gradients off               the same of a mean gradient; marked * the norm of what a rank keeps back for later
                                steps, as a multiple of its gradient's
    s                           of a step, median: four ranks share what cores there are, so it says little

What is measured is the loss; on loopback the smaller messages save no time. The exit code is 1 if a part failed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import train_gpt  # noqa: E402

import fxzero  # noqa: E402
from fxzero.graph import collectives as c10d  # noqa: E402
from fxzero.graph.compression_ops import dequantize_blockwise, quantize_blockwise  # noqa: E402

VARIANTS = {
    "none": {},
    "int8 gathers": {"compress_gathers": "int8"},
    "fp8 gathers": {"compress_gathers": "fp8"},
    "fp8_rows gathers": {"compress_gathers": "fp8_rows"},
    "int8 reductions": {"compress_reductions": "int8"},
    "fp8 reductions": {"compress_reductions": "fp8"},
    "int8": {"compress_gathers": "int8", "compress_reductions": "int8"},
    "fp8": {"compress_gathers": "fp8", "compress_reductions": "fp8"},
    "powersgd": {"compress_reductions": "powersgd"},
    "topk": {"compress_reductions": "topk"},
    "topk 10%": {"compress_reductions": "topk", "topk_fraction": 0.1},
}


# ---- one rank


def sent_bytes(graph):
    """Bytes that a rank sends in a step, by what for."""
    launches = [node for node in graph.calls() if c10d.is_collective(node)]
    sizes = {True: 0, False: 0}
    for node in launches:
        sizes[c10d.gathers_parameters(node)] += c10d.wire_bytes(node, graph.mesh)
    return {"gathers": sizes[True], "reductions": sizes[False], "step": sizes[True] + sizes[False]}


def there_and_back(x, node, world):
    """A whole tensor as it arrives by a quantizing call of the graph, from its rows on each rank."""
    missing = -x.shape[0] % world
    padded = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))
    form, block = node.args[1:3]
    packed = quantize_blockwise(padded, form, block, world)
    return dequantize_blockwise(packed, list(padded.shape), form, block, world, x.dtype)[: x.shape[0]]


def relative(pairs):
    """Norm of all differences together, relative to that of all first tensors; None where there are none."""
    pairs = list(pairs)
    if not pairs:
        return None
    off = sum((a - b).double().square().sum() for a, b in pairs)
    return (off / sum(a.double().square().sum() for a, _ in pairs)).sqrt().item()


def weight_error(step, model, world):
    """What rounding takes off the weights that are gathered quantized."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    calls = [(own[n.meta["param"]], n) for n in step.graph.calls(quantize_blockwise) if n.meta["phase"] == "forward"]
    return relative((weight, there_and_back(weight, node, world)) for weight, node in calls)


def gradient_error(step, model, batch, world):
    """What rounding takes off the mean of the ranks' gradients that are reduced quantized."""
    calls = [n for n in step.graph.calls(quantize_blockwise) if n.args[3] > 1]
    with torch.enable_grad():
        own = dict(model.named_parameters())
        names = [n.meta["param"] for n in calls]
        loss = train_gpt.loss_fn(model, *batch)
        gradients = torch.autograd.grad(loss, [own[name] for name in names]) if names else ()
    pairs = [[g, there_and_back(g, n, world)] for g, n in zip(gradients, calls, strict=True)]
    for pair in pairs:
        for value in pair:
            dist.all_reduce(value)
    return relative(pairs)


def kept_back(kept, model, batch):
    """What this rank keeps back (name in checkpoints -> rows), relative to its gradient; None where nothing is kept."""
    if not kept:
        return None
    own = dict(model.named_parameters())
    names = [name.partition(".residual.")[2] for name in kept]
    with torch.enable_grad():
        gradients = torch.autograd.grad(train_gpt.loss_fn(model, *batch), [own[name] for name in names])
    return relative((g, g - value.to_local()[0]) for g, value in zip(gradients, kept.values(), strict=True))


def train(args):
    """Runs one part; returns its figures on rank 0."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    model = train_gpt.GPT(dim=args.dim, layers=args.layers, heads=args.heads, context=args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: train_gpt.learning_rate_factor(i, args))
    plan = fxzero.Plan(zero=3, mesh={"dp": world}, lowering="eager", **VARIANTS[args.rank_of])
    step = fxzero.compile(model, optimizer, plan, loss=train_gpt.loss_fn)
    data, held_out = train_gpt.corpus()
    times_s, loss = [], 0.0
    for i in range(1, args.steps + 1):
        began = time.perf_counter()
        loss = step(*train_gpt.batch(data, args, step=i, rank=rank)).item()
        scheduler.step()
        times_s.append(time.perf_counter() - began)
        if rank == 0 and (i % args.report_every == 0 or i == args.steps):
            where = f"world {world}, {args.rank_of}: step {i} of {args.steps}"
            print(f"{where}, loss {loss:.3f}, {statistics.median(times_s):.2f} s a step", flush=True)
    result = {"held_out_loss": train_gpt.held_out_loss(step, held_out, args), "step_s": statistics.median(times_s)}
    kept = {name: value for name, value in step.state_dict().items() if ".residual." in name}
    with step.unsharded() as whole:
        result["weights_off"] = weight_error(step, whole, world)
        batch = train_gpt.batch(data, args, step=args.steps + 1, rank=rank)
        result["gradients_off"] = gradient_error(step, whole, batch, world)
        result["kept_back"] = kept_back(kept, whole, batch)
    return result | {"bytes": sent_bytes(step.graph), "plan": plan.to_dict()}


def run_rank(args):
    """Rank 0 has written the figures of one part."""
    torch.set_num_threads(1)
    args.device = train_gpt.start_ranks()
    result = train(args)
    if dist.get_rank() == 0:
        args.result.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


# ---- all parts


def result_path(args, world, name):
    """Where a part's figures are."""
    return args.out / f"world{world}_{name.replace(' ', '_').replace('%', '')}_{args.steps}.json"


def run_part(args, world, name):
    """One part in a process group of its own; returns why it failed, or None."""
    path = result_path(args, world, name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
    command += ["--rank-of", name, "--result", str(path), "--steps", str(args.steps)]
    command += ["--report-every", str(args.report_every), "--eval-windows", str(args.eval_windows)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment)
    try:
        code = process.wait(args.timeout)
        return f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"took more than --timeout {args.timeout:g} s"
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its ranks; a kill would leave them running
            process.wait()


def table(args):
    """The table of the parts that are there, as text."""
    rows = []
    for world in args.world:
        found = {n: json.loads(p.read_text()) for n in VARIANTS if (p := result_path(args, world, n)).exists()}
        plain = found.get("none")
        for name, part in found.items():
            ratios = [part["bytes"][key] / plain["bytes"][key] if plain else None for key in part["bytes"]]
            loss = part["held_out_loss"]
            distance = f"{loss - plain['held_out_loss']:+.3f}" if plain else ""
            off = ["" if part[key] is None else f"{part[key]:.2%}" for key in ("weights_off", "gradients_off")]
            off[1] = off[1] if part["kept_back"] is None else f"{part['kept_back']:.2f} *"
            ratios = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
            rows.append([world, name, *ratios, f"{loss:.3f}", distance, *off, f"{part['step_s']:.2f}"])
    headers = ["ranks", "compression", "gathers", "reductions", "step", "loss", "- none"]
    headers += ["weights off", "gradients off", "s"]
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def parse_arguments():
    """The command line; what --rank-of needs of the example's arguments has the example's defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, action="append", help="numbers of ranks; default 2 and 4")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval-windows", type=int, default=512, help="held-out windows")
    parser.add_argument("--report-every", type=int, default=50, help="steps between two lines of progress")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one part")
    parser.add_argument("--again", action="store_true", help="run parts whose results are there, too")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("out/compression"))
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    example = {"batch": 8, "context": 128, "dim": 128, "layers": 4, "heads": 4, "lr": 3e-3, "warmup": 80, "seed": 0}
    parser.set_defaults(**example)
    args = parser.parse_args()
    args.world = args.world or [2, 4]
    unknown = [name for name in args.only or () if name not in VARIANTS]
    if unknown:
        parser.error(f"--only {unknown[0]!r}: choose from: {', '.join(VARIANTS)}")
    return args


def main():
    """Runs what is missing, prints the table, and writes it all as one JSON file."""
    args = parse_arguments()
    if args.rank_of:
        run_rank(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    failures = []
    parts = [(world, name) for world in args.world for name in args.only or VARIANTS]
    missing = [p for p in parts if args.again or not result_path(args, *p).exists()]
    for number, (world, name) in enumerate([] if args.table else missing, start=1):
        print(f"part {number} of {len(missing)}: {name}, {world} ranks", flush=True)
        failure = run_part(args, world, name)
        if failure:
            failures.append(f"{name}, {world} ranks: {failure}")
            print(failures[-1], flush=True)
    text = table(args)
    print(text)
    found = {p.stem: json.loads(p.read_text()) for p in sorted(args.out.glob(f"world*_{args.steps}.json"))}
    about = {"when": datetime.now(timezone.utc).isoformat(), "torch": torch.__version__, "steps": args.steps}
    (args.out / f"table_{args.steps}.json").write_text(json.dumps(about | {"parts": found, "table": text}, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
