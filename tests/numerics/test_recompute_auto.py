"""Two ranks: what is decided for a budget is bit-equal to keeping everything, at stages 0 and 3, dropout included.

Run as a module, this file is what each rank does. The reference is the same plan with recompute="none", which
test_world2.py compares with DDP.
"""

import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

import fxzero
import fxzero.passes.recompute_chosen as chosen
from fxzero.cost.memory import memory_profile
from fxzero.graph import StepGraph
from fxzero.graph.edit import Editor
from fxzero.graph.swap_ops import swapped_bytes
from tests.numerics.side_by_side import Values, check, first_difference, parameters, results_of, run_jobs
from tests.numerics.sparing import sharing_first_capture, verifying_less
from tests.passes.test_recompute_blocks import Reader, batch

STEPS = 8


@dataclass(frozen=True)
class Job:
    """One comparison.

    Args:
        zero: the stage.
        part: of what blocks save, how much the budget leaves; below 0 it asks for more than that.
        moved: state and activations may be offloaded, too.
        fault: backward reads other masks than forward drew.
    """

    zero: int
    part: float
    moved: bool = False
    fault: bool = False

    @property
    def name(self) -> str:
        moved = ", what moves too" if self.moved else ""
        return f"zero {self.zero}, part {self.part}{moved}{', other masks' if self.fault else ''}"


JOBS = [Job(0, 0.6), Job(3, 0.1), Job(3, 0.1, fault=True), Job(3, -0.3, moved=True)]
MOVED = {
    **dict.fromkeys(("offload_optimizer", "offload_parameters", "offload_activations", "update_on_host"), "auto"),
    "offload_below": 0,
    "bucket_bytes": 2**13,
}
_keep_as_bool = chosen.keep_as_bool
_captures: dict[str, Any] = {}
_kept: dict[int, tuple[Values, int, int]] = {}


def train(rank: int, *, steps: int = STEPS, **plan: object) -> tuple[Values, StepGraph]:
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    step = fxzero.compile(model, optimizer, fxzero.Plan(**plan))
    torch.manual_seed(1 + rank)
    with sharing_first_capture(_captures, ""):
        losses = {f"loss {i}": step(batch(2 * i + rank)) for i in range(steps)}
    return losses | parameters(model), step.graph


def kept(rank: int, zero: int) -> tuple[Values, int, int]:
    """What keeping everything gives, and the peaks of that and of recomputing all blocks."""
    if zero not in _kept:
        values, step = train(rank, zero=zero)
        blocks = train(rank, zero=zero, recompute="blocks", steps=1)[1]
        _kept[zero] = values, memory_profile(step).peak_bytes, memory_profile(blocks).peak_bytes
    return _kept[zero]


def negated(step: StepGraph, mask: torch.fx.Node, position: dict[torch.fx.Node, float]) -> int:
    """Keeps a mask as booleans, the wrong way round."""
    edits = _keep_as_bool(step, mask, position)
    for node in [n for n in mask.users if n.target is torch.ops.aten._to_copy.default]:
        with Editor(step, phase="forward", module=mask.meta["module"]).after(node) as editor:
            other = editor.call(torch.ops.aten.logical_not.default, node)
        node.replace_all_uses_with(other, delete_user_cb=lambda user, other=other: user is not other)
    return edits


def run(job: Job, rank: int) -> str:
    with verifying_less({"zero": job.zero}, broken=job.fault):
        return _difference(job, rank)


def _difference(job: Job, rank: int) -> str:
    values, most, least = kept(rank, job.zero)
    budget = int(least + job.part * (most - least))
    plan = {"zero": job.zero, "recompute": "auto", "memory_budget": budget, **(MOVED if job.moved else {})}
    if job.fault:
        with mock.patch.object(chosen, "keep_as_bool", negated):
            return first_difference(values, train(rank, **plan)[0])
    got, step = train(rank, **plan)
    assert memory_profile(step).peak_bytes <= budget < most
    assert bool(swapped_bytes(step.calls())) is job.moved
    return first_difference(values, got)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return results_of("tests.numerics.test_recompute_auto", tmp_path_factory.mktemp("auto"), ranks=2)


@pytest.mark.multirank
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_two_ranks_are_bit_equal_to_keeping_everything(job: Job, results: list[dict[str, str]]) -> None:
    check(job, results, differs=job.fault)


if __name__ == "__main__":
    run_jobs(sys.argv[1], JOBS, run)
