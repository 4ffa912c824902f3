"""fxzero calibrate: that it runs, end to end, in its fast form; what it refuses and says."""

import contextlib
import importlib
import io
from pathlib import Path

import pytest
import torch

from fxzero.calibrate.timing import Measured
from fxzero.cli import main
from fxzero.cli.calibrate import as_table
from fxzero.cost.hardware import Hardware
from fxzero.cost.hardware_file import COLLECTIVES
from fxzero.cost.op_classes import MATRIX_CLASSES, MEMORY_CLASSES


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
    assert min(hardware.slowdown("net:dp"), hardware.hindrance("net:dp"), hardware.among_ranks({"dp": 2})) >= 1
    assert hardware.origin["torch"] == torch.__version__ and hardware.origin["world"] == "2"
    assert {"date", "device", "threads", "load"} <= set(hardware.origin)
    for words in (
        "ops.pointwise",
        "matrix.classes.attention_backward",
        "collectives.send_recv",
        "nvme in",
        "residual",
        "small step",
    ):
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


def test_a_residual_says_what_the_description_is_off_by() -> None:
    row = Measured("ops.fill", "full, 10 elements", 2e-6, 3e-6)
    assert row.residual == pytest.approx(0.5)
    assert "+50%" in as_table([row])
