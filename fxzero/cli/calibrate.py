"""fxzero calibrate: the machine at hand, measured, as a file that predictions work with."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxzero.calibrate import Calibration
from fxzero.calibrate.timing import Measured
from fxzero.cli.dump import check_out
from fxzero.cli.progress import Progress
from fxzero.cli.usage import UsageError
from fxzero.cost.hardware_file import parse
from fxzero.cost.machine_name import load_average, num_devices

BUSY = 0.5  # of the cores, by what else runs

DESCRIPTION = """\
Measure this machine (matrix products, ops bound by memory, collectives between --world processes, copies to the host
and to files) and write its description as TOML. Takes about two minutes; nothing else should run meanwhile.

example:
  fxzero calibrate --world 2 -o machine.toml
"""


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("calibrate", help="measure this machine for predictions", description=DESCRIPTION)
    parser.add_argument("-o", "--out", metavar="FILE", help="write there instead of to stdout")
    parser.add_argument("--name", default="machine", help="of the machine, in reports; default: machine")
    parser.add_argument("--world", type=int, metavar="N", help="ranks that collectives are timed between; default 2")
    about = "of each rank on a CPU; default: the cores that this process may use, over --world"
    parser.add_argument("--threads", type=int, metavar="N", help=about)
    parser.add_argument("--dir", metavar="DIR", help="where files are timed; default: for temporary ones")
    parser.add_argument("--fast", action="store_true", help="seconds, not minutes: to see that it works; rough figures")
    parser.add_argument("--quiet", action="store_true", help="say nothing on stderr but errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if an option makes no sense, or ranks or files fail.
    """
    check_out(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = 2 if args.world is None else args.world
    threads = max(1, num_devices(torch.device("cpu")) // max(world, 1)) if args.threads is None else args.threads
    for option, value in (("--world", world), ("--threads", threads)):
        if value < 1:
            raise UsageError.of(option, expected="at least 1", got=str(value), fix="leave it out for the default")
    if device.type == "cuda" and world > torch.cuda.device_count():
        got = f"{torch.cuda.device_count()}"
        raise UsageError.of("--world", expected=f"{world} GPUs here", got=got, fix="ask for as many as there are")
    progress = Progress(None if args.quiet else sys.stderr)
    load, cores = load_average(), num_devices(torch.device("cpu"))
    if load > BUSY * cores and not args.quiet:
        print(f"other work runs here (load {load:.1f} on {cores} cores): figures will be slow ones", file=sys.stderr)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        directory = Path(args.dir or tempfile.gettempdir())
        calibration = Calibration(device, world, threads, directory, fast=args.fast)
        for method, what in calibration.parts.items():
            with progress.stage(method, what):
                getattr(calibration, method)()
    finally:
        torch.set_num_threads(before)
    text = calibration.hardware(args.name).to_toml()
    parse(text, file=args.out or "what was measured")  # no file leaves here that could not be read
    print(as_table(calibration.rows), file=sys.stdout if args.out else sys.stderr)
    if args.out is None:
        sys.stdout.write(text)
    else:
        Path(args.out).write_text(text, encoding="utf-8")


def as_table(rows: list[Measured]) -> str:
    """What was measured, beside what the description says."""
    cells = [
        [r.what, r.case, f"{1e6 * r.seconds:,.1f}", f"{1e6 * r.predicted_s:,.1f}", f"{r.residual:+.0%}"] for r in rows
    ]
    headers = ["figure", "case", "measured us", "described us", "residual"]
    align = ("left", "left", "right", "right", "right")
    return tabulate(cells, headers=headers, colalign=align, disable_numparse=True)
