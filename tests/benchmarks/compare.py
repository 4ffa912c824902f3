"""Step time, memory, traffic and set-up of fxzero and its peers on one training job (job.py), side by side.

    python tests/benchmarks/compare.py                                # every variant, three rounds, two ranks
    python tests/benchmarks/compare.py --job vocab50m --variants ddp fxzero3 --rounds 5
    python tests/benchmarks/compare.py --peer-python PYTHON           # an interpreter that has DeepSpeed

A round runs each variant once, in a process group of its own; every second round goes in reverse order, because a
machine's speed drifts. A ratio is taken within its round, to that round's DDP. Columns:

    loss       after the last step, mean over ranks: equal for all variants, or one computes something else
    step s     the median step of a run, on its slowest rank: median over rounds, then min..max over rounds
    /DDP       that of the same round's DDP as unit: median of the ratios, then min..max
    peak MB    tensor memory of the fullest rank, at most in any step after the warm-up
    predicted  the peak that fxzero tells before the run, and how far it is off
    steady MB  the same between steps
    wire MB    what all ranks together send in a step, and as a multiple of the parameters' bytes
    calls      collectives that rank 0's backend runs in a step; a send and its receive are one
    set-up s   wrapping or compiling, and what the first steps take longer than the median

The exit code is 1 if any variant failed. Nothing else should load the machine or the interface meanwhile; a network
namespace keeps other traffic out: unshare -rn sh -c 'ip link set lo up && exec python tests/benchmarks/compare.py'
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from job import JOBS, MB, VARIANTS
from tabulate import tabulate
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
COLUMNS = ("variant", "loss", "step s", "min..max s", "/DDP", "min..max", "peak MB", "predicted", "steady MB")
COLUMNS += ("wire MB", "x params", "calls", "set-up s", "note")


def build_memory_counter(python, cache):
    """memory_counter.cpp is built against an interpreter's torch; returns (library, None) or (None, why not)."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, "no g++"
    where = "import torch, os; print(torch.__version__, os.path.dirname(torch.__file__))"
    asked = subprocess.run([python, "-c", where], capture_output=True, text=True)
    if asked.returncode:
        return None, last_error(asked.stderr)
    torch_dir = asked.stdout.strip().partition(" ")[2]
    source = HERE / "memory_counter.cpp"
    key = hashlib.sha256(source.read_bytes() + asked.stdout.encode()).hexdigest()[:16]
    library, partial = cache / f"memory_counter_{key}.so", cache / f"memory_counter_{os.getpid()}.partial"
    if library.exists():
        return library, None
    cache.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-std=c++20", "-fPIC", "-shared", f"-I{torch_dir}/include", str(source)]
    command += [f"-L{torch_dir}/lib", "-lc10", f"-Wl,-rpath,{torch_dir}/lib", "-o", str(partial)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        return None, next((line for line in built.stderr.splitlines() if "error" in line), "g++ failed")
    partial.rename(library)
    return library, None


def last_error(log):
    """The last line of a log that names an exception, without torchrun's own; else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    texts = [line.partition("]: ")[2] if line.startswith("[rank") else line for line in lines]
    errors = [t for t in texts if t.partition(":")[0].endswith(("Error", "Exception", "Mismatch"))]
    own = [t for t in errors if "ChildFailedError" not in t]
    return (own or errors or texts or ["no output"])[-1][:200]


def environment(interface):
    """What every rank gets: one thread, traffic on the counted interface, fxzero from this checkout."""
    path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, "PYTHONPATH": path}
    return {**os.environ, **own, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}


def run_once(variant, args, *, python, memory_counter):
    """Runs one variant in its own process group; returns job.py's result, or {"error": why}."""
    with tempfile.TemporaryDirectory() as folder:
        out, log_path = Path(folder, "result.json"), Path(folder, "log")
        command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.world}"]
        command += [str(HERE / "job.py"), "--variant", variant, "--job", args.job, "--out", str(out)]
        command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
        command += ["--plan", args.plan, "--interface", args.interface]
        command += ["--memory-counter", str(memory_counter)] if memory_counter else []
        with log_path.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(args.interface))
            returncode = wait_or_end(process, args.timeout)
        if returncode is None:
            return {"error": f"took more than --timeout {args.timeout:g} s"}
        if returncode != 0:
            return {"error": last_error(log_path.read_text(errors="replace"))}
        return json.loads(out.read_text())


def wait_or_end(process, timeout_s):
    """The process and its ranks have ended; returns the exit code, None where the timeout ended them."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its ranks, within 30 s; a kill would leave them running
            process.wait()


def run_rounds(args, pythons, counters):
    """Runs every variant once a round; returns the results of each variant, round by round."""
    results = {variant: [] for variant in pythons}
    order = list(pythons)
    runs = [variant for i in range(args.rounds) for variant in (order if i % 2 == 0 else order[::-1])]
    bar = tqdm(runs, unit="run")
    for variant in bar:
        bar.set_postfix_str(variant)
        python = pythons[variant]
        result = run_once(variant, args, python=python, memory_counter=counters[python])
        results[variant].append(result)
        if "error" in result:
            bar.write(f"{variant}: {result['error']}")
    return results


def slowest_step_s(result):
    """The median step of a run, on the rank where it is longest."""
    return max(rank["step_s"] for rank in result["ranks"])


def fullest_rank(results, key):
    """The largest rank's figure, median over rounds; None where it was not measured."""
    figures = [max(k[key] for k in r["ranks"]) for r in results if r["ranks"][0][key] is not None]
    return statistics.median(figures) if figures else None


def summarize(results, baseline):
    """The figures of one variant over the rounds that succeeded; `baseline` is DDP's results, round by round."""
    errors = [r["error"] for r in results if "error" in r]
    summary = {"errors": errors} if errors else {}
    good = [r for r in results if "error" not in r]
    if not good:
        return summary
    pairs = [(a, b) for a, b in zip(results, baseline) if not ("error" in a or "error" in b)]  # noqa: B905
    sent = statistics.median(r["sent_bytes_per_step"] for r in good)
    return summary | {
        "loss": statistics.mean(rank["losses"][-1] for rank in good[0]["ranks"]),
        "step_s": [slowest_step_s(r) for r in good],
        "over_ddp": [slowest_step_s(a) / slowest_step_s(b) for a, b in pairs],
        "peak_mb": fullest_rank(good, "peak_mb"),
        "predicted_mb": fullest_rank(good, "predicted_mb"),
        "steady_mb": fullest_rank(good, "live_mb"),
        "wire_mb": sent / MB,
        "wire_x_parameters": sent / good[0]["parameter_bytes"],
        "collectives": sum(n for name, n in good[0]["collectives"].items() if not name.endswith(":recv")),
        "setup_s": statistics.median(max(k["setup_s"] for k in r["ranks"]) for r in good),
    }


def number(value, digits):
    """A figure as text; nothing for one that was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def prediction(predicted_mb, peak_mb):
    """The predicted peak and its error as text; nothing for a peer."""
    if predicted_mb is None or peak_mb is None:
        return number(predicted_mb, 0)
    return f"{predicted_mb:.0f} ({predicted_mb / peak_mb - 1:+.1%})"


def median_and_range(values, digits):
    """Two cells: the median, and min..max."""
    if not values:
        return "", ""
    return number(statistics.median(values), digits), f"{min(values):.{digits}f}..{max(values):.{digits}f}"


def table(summaries):
    """The comparison as text, one line a variant; columns with nothing in them are left out."""
    rows = []
    for variant, s in summaries.items():
        note = s["errors"][-1] if "errors" in s else s.get("note", "")
        cells = [""] * (len(COLUMNS) - 2)
        if "step_s" in s:
            cells = [number(s["loss"], 6), *median_and_range(s["step_s"], 3), *median_and_range(s["over_ddp"], 2)]
            cells += [number(s["peak_mb"], 0), prediction(s["predicted_mb"], s["peak_mb"])]
            cells += [number(s["steady_mb"], 0), number(s["wire_mb"], 0)]
            cells += [number(s["wire_x_parameters"], 2), str(s["collectives"]), number(s["setup_s"], 1)]
        rows.append([variant, *cells, note])
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in used] for row in rows]
    align = ["left" if COLUMNS[i] in ("variant", "note") else "right" for i in used]
    return tabulate(cells, headers=[COLUMNS[i] for i in used], colalign=align, disable_numparse=True)


def machine():
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()}


def choose_pythons(args):
    """The interpreter of each variant that can run, and why the others cannot."""
    pythons = {variant: sys.executable for variant in args.variants}
    if "deepspeed3" not in pythons:
        return pythons, {}
    peer = args.peer_python or sys.executable
    command = [peer, "-c", "import deepspeed"]
    asked = subprocess.run(command, capture_output=True, text=True, env=environment(args.interface))
    if asked.returncode == 0:
        return pythons | {"deepspeed3": peer}, {}
    del pythons["deepspeed3"]
    return pythons, {"deepspeed3": f"not installed: {last_error(asked.stderr)}"}


def argument_parser(description):
    """The command line that the side-by-side benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    # a CPU without bf16 takes minutes for a step of llama; "plain" is one process
    usual = [name for name in VARIANTS if "bf16" not in name and "plain" not in name]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=usual, metavar="VARIANT")
    parser.add_argument("--job", choices=JOBS, default="llama")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="first steps, not in times, memory and wire")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one run may take")
    parser.add_argument("--plan", default="{}", help='further keys of fxzero\'s plan, as JSON: {"prefetch": 2}')
    parser.add_argument("--peer-python", help="interpreter with DeepSpeed; default: this one")
    parser.add_argument("--interface", default="lo", help="network interface of the ranks, whose traffic is counted")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark.json"))
    return parser


def checked(parser, args):
    """The arguments, if they fit together."""
    if not 0 < args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup}: expected at least 1 and fewer than --steps {args.steps}")
    return args


def main():
    """Prints the table and writes the JSON; returns the exit code."""
    parser = argument_parser(__doc__.splitlines()[0])
    args = checked(parser, parser.parse_args())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pythons, missing = choose_pythons(args)
    built = {python: build_memory_counter(python, args.out.parent / "cache") for python in set(pythons.values())}
    for _, why_not in built.values():
        if why_not:
            print(f"no memory figures: memory_counter.cpp was not built ({why_not})")
    results = run_rounds(args, pythons, {python: library for python, (library, _) in built.items()})
    summaries = {
        variant: {"note": missing[variant]}
        if variant in missing
        else summarize(results[variant], results.get("ddp", []))
        for variant in args.variants
    }
    size = JOBS[args.job]
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": version("torch"),
        "machine": machine(),
        "job": {"name": args.job, **vars(size)},
        "run": {key: getattr(args, key) for key in ("world", "rounds", "steps", "warmup", "plan", "interface")},
        "summary": summaries,
        "raw": results,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.job}, world {args.world}, {args.rounds} rounds of {args.steps} steps, torch {version('torch')}")
    print(table(summaries))
    return 1 if any("errors" in s for s in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
