"""What launchers share: Triton at the first launch, rows in place, tiles."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxzero.kernels import launch

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import importlib, os, sys
from pathlib import Path
sys.modules["triton"] = None
os.environ.pop("TRITON_INTERPRET", None)
import torch
from fxzero import compat
names = sorted(path.stem for path in Path("kernels").glob("*.py"))
modules = {name: importlib.import_module(f"fxzero.kernels.{name}") for name in names}
y, rstd = modules["rms_norm"].rms_norm(torch.ones(2, 3), None, 1e-5)
with compat.new_fake_mode():
    modules["rms_norm"].rms_norm(torch.ones(2, 3), None, 1e-5)
os.environ["TRITON_INTERPRET"] = "1"
try:
    modules["rms_norm"].rms_norm(torch.ones(2, 3), None, 1e-5)
except ImportError as error:
    print(len(names), error)
"""


def copied(x):
    """Whether the rows of `x` are in other memory than `x`."""
    return launch.rows_of(x).data_ptr() != x.data_ptr()


def test_kernels_are_imported_traced_and_run_as_references_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, text=True, capture_output=True, timeout=120, check=False
    )
    assert "rms_norm_kernel: expected the package triton" in done.stdout, done.stderr
    assert "pip install triton" in done.stdout


def test_rows_are_views_where_one_stride_reaches_them():
    x = torch.randn(4, 6, 10)
    for view in (x, x[:2], x[..., 3:7], x[:, ::2], x[:, 0], x[1, 1], x[:1, :2], x.flatten(0, 1)[::3], x[..., :1]):
        assert not copied(view)
        assert torch.equal(launch.rows_of(view), view.reshape(-1, view.shape[-1]))
    for other in (x.transpose(0, 1), x[..., ::2], x[:, :4], x.transpose(1, 2)):
        assert copied(other)
        assert torch.equal(launch.rows_of(other), other.reshape(-1, other.shape[-1]))


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (1023, 1024), (1024, 1024), (1025, 2048)])
def test_powers_of_two(n, power):
    assert launch.power_of_2(n) == power


def test_tiles_hold_a_row_and_are_not_small():
    for columns in (1, 3, 64, 2048, 5000, launch.MAX_COLUMNS):
        rows, width, warps = launch.tile_of(columns)
        assert width >= columns
        assert rows * width >= launch.TILE
        assert rows * width <= 32 * 64 * warps
    assert launch.tile_of(5000, most=1024)[1] == 1024


def test_a_kernel_is_built_once_for_compiler_and_interpreter_each(monkeypatch):
    def kernel(x):
        pass

    first = launch.jit(kernel)
    assert launch.jit(kernel) is first
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plain = launch.jit(kernel)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.jit(kernel) is not plain
    assert "tl" not in kernel.__globals__
