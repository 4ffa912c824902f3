"""What gloo needs special care with: which op gathers, which backend carries a device's tensors, how a process ends."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxzero
from fxzero import compat_distributed
from fxzero.runtime import gloo
from fxzero.runtime.program import Program
from tests.numerics.local_ranks import compile_for
from tests.numerics.worker import ROOT, rank_environment

UNSAFE = re.compile(
    r"c10d_functional_all_gather_into_tensor(_coalesced)?\(|all_gather_into_tensor(_coalesced)?_default\("
)


class MeanLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def source(bucket_form: str) -> str:
    """The text of a step for two ranks that gathers natively, as the group at hand launches it."""
    model = MeanLoss()
    plan = fxzero.Plan(mesh={"dp": 2}, zero=3, all_gather="native", bucket_form=bucket_form, persist_below=0)
    step = compile_for(model, torch.optim.AdamW(model.parameters()), (torch.ones(2, 4),), plan)
    return Program(step, groups={"dp": dist.group.WORLD}).source


@pytest.mark.parametrize("bucket_form", ["coalesced", "separate"])
def test_over_gloo_no_gather_goes_through_what_corrupts_the_heap(alone: None, bucket_form: str) -> None:
    text = source(bucket_form)
    assert "py__all_gather" in text and not UNSAFE.search(text)


def test_other_backends_launch_the_op_of_the_graph() -> None:
    compat_distributed.fake_process_group(2)
    text = source("coalesced")
    assert "py__all_gather" not in text and UNSAFE.search(text)


def test_a_group_made_without_a_name_is_carried_by_gloo_on_the_cpu(tmp_path: Path) -> None:
    dist.init_process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.get_backend() == "undefined" and gloo.backend_of(dist.group.WORLD, "cpu") == "gloo"
    assert gloo.carries(dist.group.WORLD, "cpu") and not gloo.carries(dist.group.WORLD, "cuda")


def test_gathers_yield_what_the_op_yields(alone: None) -> None:
    name = dist.group.WORLD.group_name
    for shard in (torch.arange(6.0).view(3, 2), torch.ones(5, dtype=torch.int8)):
        (ours,) = gloo.launcher_of(torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default)(
            [shard], 1, name
        )
        theirs = torch.ops._c10d_functional.all_gather_into_tensor(shard, 1, name)
        ours, theirs = (torch.ops._c10d_functional.wait_tensor(value) for value in (ours, theirs))
        assert torch.equal(ours, theirs) and ours.shape == theirs.shape


def test_a_process_rests_once_at_exit() -> None:
    text = (
        "from fxzero.runtime import gloo\n"
        "gloo.time.sleep = lambda seconds: print('rested', seconds)\n"
        "gloo.rest_at_exit(), gloo.rest_at_exit()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [f"rested {gloo.LAST_RELEASE_S}"], done.stderr
