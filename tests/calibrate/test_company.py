"""The other ranks compute while one is timed, where they share a machine."""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero.calibrate import Calibration, company
from fxzero.calibrate.timing import Clock
from fxzero.errors import HardwareError


def test_other_ranks_compute_while_one_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def noted(*args: Any, **keys: Any) -> Any:
        started.append(start(*args, **keys))
        return started[-1]

    monkeypatch.setattr(company.subprocess, "Popen", noted)
    calibration = Calibration(torch.device("cpu"), world=3, threads=1, directory=tmp_path, fast=True)
    seen: list[list[int | None]] = []

    def in_turns(self: Clock, calls: list[Any]) -> list[float]:
        seen.append([other.poll() for other in started])
        return [1e-3] * len(calls)

    monkeypatch.setattr(Clock, "in_turns", in_turns)
    calibration.measure_ops()
    assert seen == [[None, None]]  # both run
    assert [other.returncode for other in started] == [-signal.SIGKILL] * 2


def test_ranks_that_share_nothing_are_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company.subprocess, "Popen", None)
    for device, world in (("cpu", 1), ("cuda", 4)):
        with Calibration(torch.device(device), world=world, threads=1, directory=tmp_path)._beside_others():
            pass


def test_a_rank_that_does_not_compute_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company.sys, "executable", shutil.which("false"))
    with pytest.raises(HardwareError, match=r"beside 1 other ranks.*expected a process that computes, got exit code 1"):
        with company.company(1, threads=1):
            pass
