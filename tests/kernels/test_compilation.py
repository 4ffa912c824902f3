"""Kernels compile for a GPU, compute in fp32 whatever they are handed, and have 64-bit offsets."""

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.compile_for_gpu import f64_faults, offset_faults
from tests.kernels.launches import LAUNCHES

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def test_all_kernels_compile_for_a_gpu_after_the_interpreter_has_run(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu", "--after-the-interpreter", *LAUNCHES]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    compiled = done.stdout.split()
    assert len(compiled) > len(set(compiled)) > len(LAUNCHES)


def test_arithmetic_in_fp64_is_found():
    good = "  %0 = arith.truncf %eps : f64 to f32 loc(#loc1)\n  %1 = arith.addf %x, %0 : f32 loc(#loc1)"
    assert f64_faults(good) == []
    assert len(f64_faults(good + "\n  %2 = arith.addf %y, %eps : f64 loc(#loc1)")) == 1


def test_a_narrow_offset_is_found():
    column = "  %0 = tt.make_range {end = 4 : i32, start = 0 : i32} : tensor<4xi32> loc(#loc1)\n"
    good = column + "  %1 = tt.addptr %p, %0 : tensor<4x!tt.ptr<f32>>, tensor<4xi32> loc(#loc1)\n"
    wide = "  %2 = tt.addptr %p, %row : tensor<4x!tt.ptr<f32>>, tensor<4xi64> loc(#loc1)\n"
    assert offset_faults(good + wide) == []
    for narrow in ("tensor<4x!tt.ptr<f32>>, tensor<4xi32>", "!tt.ptr<f32>, i32"):
        assert len(offset_faults(good + f"  %3 = tt.addptr %p, %row : {narrow} loc(#loc1)\n")) == 1
