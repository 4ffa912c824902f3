"""fxzero calibrate: which figures come of which measurements; that it runs, end to end, in its fast form."""

import contextlib
import importlib
import io
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero.calibrate import Calibration, collectives, company, machine, matrix_ops, memory_ops
from fxzero.calibrate.beside_compute import BesideCompute, beside_compute
from fxzero.calibrate.collectives import collective_rates, steps_and_bytes
from fxzero.calibrate.matrix_ops import Case
from fxzero.calibrate.timing import Clock, Measured
from fxzero.cli import main
from fxzero.cli.calibrate import as_table
from fxzero.cost.communication import Layout, collective_seconds
from fxzero.cost.hardware import Hardware, MatrixRate
from fxzero.cost.hardware_file import COLLECTIVES
from fxzero.cost.op_classes import MATRIX_CLASSES, MEMORY_CLASSES
from fxzero.errors import HardwareError

CPU = torch.device("cpu")


def calibrate(*args: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["calibrate", "--fast", "--threads", "1", *args])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.multirank
def test_this_machine_is_described(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    code, out, err = calibrate("--world", "2", "-o", str(path), "--name", "mine", "--dir", str(tmp_path))
    assert code == 0, err
    hardware = Hardware.load(path)
    assert hardware.name == "mine" and hardware.device in ("cpu", "cuda")
    assert set(hardware.ops) == set(MEMORY_CLASSES)
    assert set(hardware.matrix_rates) == set(MATRIX_CLASSES) - {"convolution"}
    assert set(hardware.collectives) == set(COLLECTIVES)
    assert {torch.float32, torch.bfloat16, torch.float16} == set(hardware.matrix_flops)
    assert hardware.launch_s or hardware.launch_bytes_s
    assert hardware.slowdown("net:dp") >= 1 and hardware.hindrance("net:dp") >= 1
    assert hardware.origin["torch"] == torch.__version__ and hardware.origin["world"] == "2"
    assert {"date", "device", "threads", "load"} <= set(hardware.origin)
    for words in ("ops.pointwise", "matrix.classes.attention_backward", "collectives.send_recv", "nvme in", "residual"):
        assert words in out
    assert "collectives over 2 ranks" in err
    assert [item.name for item in tmp_path.iterdir()] == ["machine.toml"]  # no file of a measurement is left


def test_without_a_file_the_description_goes_to_stdout(tmp_path: Path) -> None:
    code, out, err = calibrate("--world", "1", "--quiet", "--dir", str(tmp_path))
    assert code == 0, err
    (tmp_path / "machine.toml").write_text(out, encoding="utf-8")
    hardware = Hardware.load(tmp_path / "machine.toml")
    assert hardware.ranks_per_node >= 1 and set(hardware.collectives) == set(COLLECTIVES)
    assert "residual" in err


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fxzero.cli.calibrate")
    monkeypatch.setattr(module.Calibration, "parts", {})  # what follows fails: nothing was measured
    for load, told in ((1e6, True), (0.0, False)):
        monkeypatch.setattr(module, "load_average", lambda load=load: load)
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(KeyError):
            main(["calibrate"])
        assert ("other work runs here" in err.getvalue()) is told


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--world", "0"), "--world: expected at least 1, got 0"),
        (("--threads", "-1"), "--threads: expected at least 1, got -1"),
        (("-o", "/nowhere/machine.toml"), "--out: expected a file to write"),
        (("--world", "1", "--dir", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(args: tuple[str, ...], words: str) -> None:
    code, _, err = calibrate("--quiet", *args)
    assert code == 2 and err.count("\n") == 1
    assert words in err


def test_ranks_that_fail_are_an_error_with_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode, stderr = 1, "RuntimeError: no free port"

    monkeypatch.setattr(collectives.subprocess, "run", lambda *args, **kwargs: Failed())
    with pytest.raises(HardwareError, match=r"calibration over 2 ranks: expected .* no free port"):
        collectives.measure(2, threads=1)


# ---- fits


def timed(latency_s: float, rate: float, kinds: dict[str, tuple[float, float]], ranks: int) -> dict[str, Any]:
    """Medians as they would be on a machine of these figures: kind -> (overhead, efficiency)."""
    seconds: dict[str, Any] = {}
    for kind, (overhead_s, efficiency) in kinds.items():
        seconds[kind] = {}
        for size in (2**14, 2**20, 2**24):
            steps, moved = steps_and_bytes(kind, size, ranks)
            total = overhead_s + steps * latency_s + moved / rate / efficiency
            seconds[kind][str(size)] = {"total": total, "launch": 1e-5}
    return {"ranks": ranks, "seconds": seconds, "streams": [], "slowdown": 1.25}


def test_figures_of_collectives_are_found_again() -> None:
    kinds = {"all_gather": (5e-5, 0.5), "all_reduce": (1e-4, 0.8), "send_recv": (0.0, 1.0)}
    found = collective_rates(json.loads(json.dumps(timed(1e-4, 2e9, kinds, 4))))
    assert found.link.latency_s == pytest.approx(1e-4) and found.link.bytes_s == pytest.approx(2e9)
    assert found.beside == BesideCompute(1e-5, 0.0, 1.25, 1.0)
    for kind, (overhead_s, efficiency) in kinds.items():
        assert found.rates[kind].efficiency == pytest.approx([efficiency] * 3)
        assert found.rates[kind].overhead_s == pytest.approx(overhead_s, abs=1e-9)
    assert all(abs(row.residual) < 1e-6 for row in found.rows)


def stream(size: float, pace: float, *, launch_s: float, slowdown: float, hindrance: float) -> dict[str, float]:
    """One message of a stream as it would be on a machine of these figures: 10 ms for each MB, alone."""
    alone_s = size / 1e8
    compute_s = pace * alone_s * slowdown
    left_s = max(0.0, alone_s - (launch_s + compute_s) / hindrance)
    found = {"bytes": size, "pace": pace, "alone_s": alone_s, "launch_s": launch_s, "left_s": left_s}
    return found | {"compute_s": compute_s, "compute_alone_s": pace * alone_s}


def test_figures_of_streams_beside_compute_are_found_again() -> None:
    def streams(hindrance: float) -> list[dict[str, float]]:
        figures = {"slowdown": 1.25, "hindrance": hindrance}
        cases = [(size, pace) for size in (1e5, 1e6) for pace in (1.0, 2.0)]
        return [stream(size, pace, launch_s=1e-4 + size / 1e9, **figures) for size, pace in cases]

    found = beside_compute(json.loads(json.dumps(streams(5.0))))
    assert vars(found) == pytest.approx(vars(BesideCompute(1e-4, 1e9, 1.25, 5.0)))
    dry = [one | {"pace": 8.0, "compute_s": one["compute_alone_s"]} for one in streams(5.0)]
    assert vars(beside_compute(streams(5.0) + dry)) == pytest.approx(
        vars(found)
    )  # of messages that were through nothing is known
    stuck = [one | {"left_s": one["alone_s"]} for one in streams(5.0)[:1]]
    assert beside_compute(streams(5.0) + stuck).hindrance == pytest.approx(5.0)  # where nothing moved, others count
    assert beside_compute(streams(9.0)).hindrance == pytest.approx(9.0)  # the twin
    alike = [one | {"launch_s": 1e-4} for one in streams(5.0)]
    assert beside_compute(alike).launch_bytes_s == 0.0


def test_a_size_of_its_own_rate_has_it() -> None:
    planted = timed(1e-4, 2e9, {"all_gather": (0.0, 1.0), "send_recv": (0.0, 1.0)}, 2)
    slow = planted["seconds"]["all_gather"]["16777216"]
    slow["total"] *= 2
    found = collective_rates(planted)
    _, middle, large = found.rates["all_gather"].efficiency
    assert large < 0.6 and middle > 0.9
    by_case = {(row.what, row.case): row for row in found.rows}
    assert abs(by_case["collectives.all_gather", "16,777,216 bytes over 2"].residual) < 0.01
    planted["seconds"]["send_recv"]["1048576"]["total"] = 1.0  # the twin: no message takes longer than a larger one
    assert max(abs(row.residual) for row in collective_rates(planted).rows) > 0.9
    assert collective_rates(planted).rates["send_recv"].efficiency[1] == pytest.approx(1 / 16)  # as long as 16 MiB


def test_time_that_falls_with_size_gives_figures_that_can_be() -> None:
    found = timed(1e-4, 2e9, {"all_gather": (0.0, 1.0)}, 2)
    for number, times in enumerate(found["seconds"]["all_gather"].values()):
        times["total"] = 1e-3 / (number + 1)
    rates = collective_rates(found)
    assert rates.link.bytes_s > 0 and rates.link.latency_s >= 0 and 0 < min(rates.rates["all_gather"].efficiency) <= 1


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_fitted_is_what_estimates_count(kind: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two files count steps and bytes by themselves; a change of one must show."""
    from fxzero.cost import communication
    from fxzero.cost.hardware import Link

    hardware = Hardware("x", {torch.float32: 1.0}, 1, 1, 1, 1, 0, ranks_per_node=ranks, node_link=Link(3.0, 0.5))
    monkeypatch.setattr(communication, "algorithm_of", lambda node: kind)
    monkeypatch.setattr(communication, "layout_of", lambda *args: Layout(ranks, ranks))
    monkeypatch.setattr(communication, "message_bytes", lambda node: 1e6)
    monkeypatch.setattr(communication, "fresh_seconds", lambda *args: 0.0)
    monkeypatch.setattr(communication.c10d, "axis_of", lambda node: "dp")
    steps, moved = steps_and_bytes(kind, 1e6, ranks)
    node: Any = None
    assert collective_seconds(node, {"dp": ranks}, hardware) == pytest.approx(steps * 3.0 + moved / 0.5)


def test_a_saturating_curve_is_found_again() -> None:
    rate = MatrixRate(1.0, 64.0)
    cases = [Case("matmul", "", 1e9, smallest, lambda _: None) for smallest in (16, 64, 256, 1024)]
    found = matrix_ops._fit([(case, case.flops / (2e11 * rate.part(case.smallest))) for case in cases])
    assert found == pytest.approx((2e11, 64.0))
    assert matrix_ops._fit([(case, 1e-3 * case.smallest) for case in cases])[1] == 0.0


def test_the_same_ops_are_timed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which code runs does not depend on what the clock says."""

    def cases(seconds: float) -> list[tuple[str, str]]:
        monkeypatch.setattr(Clock, "seconds", lambda self, call: (call(0) and 0.0) or seconds)
        _, rows = memory_ops.op_rates(Clock(CPU), fast=True)
        return [(row.what, row.case) for row in rows]

    monkeypatch.setattr(memory_ops, "FAST_SIZES", (2**13,))
    assert cases(1e-3) == cases(1e-5)


def test_a_residual_says_what_the_description_is_off_by() -> None:
    row = Measured("ops.fill", "full, 10 elements", 2e-6, 3e-6)
    assert row.residual == pytest.approx(0.5)
    assert "+50%" in as_table([row])


# ---- the other ranks


def test_other_ranks_compute_while_one_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def noted(*args: Any, **keys: Any) -> Any:
        started.append(start(*args, **keys))
        return started[-1]

    monkeypatch.setattr(company.subprocess, "Popen", noted)
    calibration = Calibration(torch.device("cpu"), world=3, threads=1, directory=tmp_path, fast=True)
    seen: list[list[int | None]] = []
    monkeypatch.setattr(machine, "program_overheads", lambda clock: seen.append([p.poll() for p in started]) or (1, 1))
    calibration.measure_overheads()
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
