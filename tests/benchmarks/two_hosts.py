"""compare.py's variants with one rank in each of two network namespaces and a slow link between them; needs root.

    python tests/benchmarks/two_hosts.py --rate 1gbit --rounds 3
    python tests/benchmarks/two_hosts.py --rate 100mbit --variants ddp fsdp2 fxzero3 --steps 6 --warmup 2
    python tests/benchmarks/two_hosts.py --variants ddp fsdp2 deepspeed3 fxzero3 --peer-python PEERS/bin/python

A veth pair joins the namespaces, with a token bucket (`tc ... tbf`) at each end; nothing is sent elsewhere, and the
namespaces are gone at the end. Above the table of compare.py stands the floor of ZeRO-3, what a rank must send at this
rate: parameters twice and gradients once, the other rank's half of each. With "fxzero3+cost" the order is found for a
machine with this link (`schedule="cost"`).
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import compare
from job import JOBS
from tqdm import tqdm

LINK = "link0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PAYLOAD = 1448 / 1514  # of an Ethernet frame that TCP fills, with its time stamps
BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def run(*command):
    """The command has run; its own message says why not."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"two_hosts: {' '.join(command)}: {done.stderr.strip() or 'failed'} (root and iproute2 are needed)")


@contextlib.contextmanager
def two_hosts(rate):
    """Two namespaces, joined; yields their names."""
    names = tuple(f"fxzero-{os.getpid()}-{end}" for end in "ab")
    for name in names:
        run("ip", "netns", "add", name)
    try:
        pair = ("ip", "link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        run(*pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", LINK, "up")
            if rate != "none":
                bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
                run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", LINK, "root", *bucket)
        yield names
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), capture_output=True)


def run_once(variant, python, args, names, port):
    """One variant, a torchrun in each namespace; returns job.py's result, or {"error": why}."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        plan = json.loads(args.plan) | ({"hardware": str(args.hardware)} if variant.endswith("+cost") else {})
        job = [str(compare.HERE / "job.py"), "--variant", variant, "--job", args.job, "--out", str(out)]
        job += [
            "--steps",
            str(args.steps),
            "--warmup",
            str(args.warmup),
            "--plan",
            json.dumps(plan),
            "--interface",
            LINK,
        ]
        processes, logs = [], []
        for rank, name in enumerate(names):
            command = ["ip", "netns", "exec", name, python, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--nproc-per-node", "1", "--node-rank", str(rank), "--master-addr", ADDRESSES[0]]
            command += ["--master-port", str(port), *job]
            logs.append(Path(folder, f"log{rank}"))
            with logs[-1].open("w") as log:
                own = compare.environment(LINK)
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=own))
        codes = [compare.wait_or_end(process, args.timeout) for process in processes]
        if None in codes:
            return {"error": f"took more than --timeout {args.timeout:g} s"}
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            return {"error": compare.last_error(logs[failed].read_text(errors="replace"))}
        return json.loads(out.read_text())


def machine_with(rate, cpu_file, path):
    """A description of this CPU with such a link between hosts, for schedules by cost.

    What collectives reach within the machine is more than a slow link carries: that one is used up. What the CPU does
    for a message is spread over the longer time that it takes, so that compute is hindered less. A message then waits
    for the link and for the CPU, each of which is the slower one at times: the root of the sum of their squares comes
    near what was measured (1.13 times the link's time, at 1 Gbit/s beside compute).
    """
    from fxzero.cost.hardware import Hardware, Link

    cpu = Hardware.load(cpu_file)
    inside = cpu.node_link.bytes_s
    link = cpu.network_link if rate == "none" else Link(1e-4, bits_per_second(rate) / 8 * PAYLOAD)
    part = min(1.0, link.bytes_s / inside)

    def on_link(found):
        reached = tuple(min(1.0, each / part) for each in found.efficiency)
        return dataclasses.replace(found, efficiency=reached)

    machine = dataclasses.replace(
        cpu,
        name=f"{cpu.name}, {rate}",
        node_link=link,
        network_link=link,
        collectives={kind: on_link(found) for kind, found in cpu.collectives.items()},
        contention={
            lane: factor if lane == "ranks" else 1 + (factor - 1) * part for lane, factor in cpu.contention.items()
        },
        beside_compute={lane: math.hypot(1.0, factor * part) for lane, factor in cpu.beside_compute.items()},
    )
    path.write_text(machine.to_toml())
    return path


def bits_per_second(rate):
    """Of a rate as tc writes it: 1gbit, 100mbit."""
    unit = next((unit for unit in BITS if rate.endswith(unit)), None)
    if unit is None or not rate.removesuffix(unit).replace(".", "", 1).isdigit():
        sys.exit(f"two_hosts: --rate {rate!r}: expected a number and kbit, mbit or gbit, or none")
    return float(rate.removesuffix(unit)) * BITS[unit]


def main():
    """Prints the table and writes the JSON; returns the exit code."""
    parser = compare.argument_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--rate", default="1gbit", help="of the link, each way, as tc writes it; none: as fast as it is"
    )
    parser.add_argument("--cpu", default="cpu", help="of both hosts: a description's name or file (fxzero calibrate)")
    parser.set_defaults(variants=["ddp", "fsdp2", "fxzero3", "fxzero3+cost"], steps=8, warmup=3)
    args = compare.checked(parser, parser.parse_args())
    seconds_per_bit = 0.0 if args.rate == "none" else 1 / bits_per_second(args.rate)
    args.world = 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.hardware = machine_with(args.rate, args.cpu, args.out.parent / f"cpu_{args.rate}.toml")
    pythons, missing = compare.choose_pythons(args)
    variants = list(pythons)
    results = {variant: [] for variant in variants}
    with two_hosts(args.rate) as names:
        rounds = [variants if i % 2 == 0 else variants[::-1] for i in range(args.rounds)]
        bar = tqdm([variant for order in rounds for variant in order], unit="run")
        for number, variant in enumerate(bar):
            bar.set_postfix_str(variant)
            results[variant].append(run_once(variant, pythons[variant], args, names, 29500 + number))
    summaries = {v: compare.summarize(results[v], results.get("ddp", [])) for v in variants}
    summaries |= {v: {"note": why_not} for v, why_not in missing.items()}
    good = [r for found in results.values() for r in found if "error" not in r]
    floor_s = 8 * 1.5 * good[0]["parameter_bytes"] * seconds_per_bit if good else 0.0
    report = {
        "rate": args.rate,
        "job": vars(JOBS[args.job]),
        "zero3_floor_s": floor_s,
        "summary": summaries,
        "raw": results,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.job}, two hosts, {args.rate}, {args.rounds} rounds of {args.steps} steps")
    print(f"what ZeRO-3 must send takes {floor_s:.2f} s at this rate")
    print(compare.table(summaries))
    return 1 if any("errors" in s for s in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
