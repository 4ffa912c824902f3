"""fxzero env: what a bug report needs to say about the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate

import fxzero

DESCRIPTION = """\
Print the versions and the machine that fxzero finds; paste it into reports.

example:
  fxzero env --json
"""

NONE = "none"


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("env", help="print versions, backends and devices", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it."""
    found = environment()
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(tabulate([[key, _shown(value)] for key, value in found.items()], tablefmt="plain", disable_numparse=True))


def environment() -> dict[str, Any]:
    """Versions, backends and devices; a list where there may be several, `None` where there is none."""
    return {
        "fxzero": fxzero.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "backends": _backends(),
        "devices": _devices(),
        "cpus": _cpus(),
        "memory_gib": _memory_gib(),
        "compiler": _compiler(),
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or NONE
    return NONE if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    names = ("gloo", "nccl", "mpi", "ucc", "xccl")
    return [name for name in names if getattr(dist, f"is_{name}_available", bool)()]


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{item.name} ({item.total_memory / 2**30:.0f} GiB)" for item in found]


def _cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _compiler() -> str | None:
    """First line that the C++ compiler says about its version."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found is None:
            continue
        try:
            said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return said.stdout.splitlines()[0] if said.stdout else name
    return None
