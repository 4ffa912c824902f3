"""A run that was saved at dp=2 x tp=2 goes on at dp=4, at tp=4 and on one rank with the losses that it would have had.

Run as a module, this file is what each of four ranks does.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import fxzero
from tests.hf.models import CASES, TOKENS, VOCAB
from tests.numerics.sparing import verifying_less
from tests.numerics.worker import launch
from tests.sharding.machines import free_network_file

RANKS, STEPS, ROWS = 4, 3, 4
TOLERANCE = 1e-5
LATER = {"dp=4": {"dp": 4, "tp": 1}, "tp=4": {"dp": 1, "tp": 4}, "dp=2 tp=2": {"dp": 2, "tp": 2}}

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]
pytest.importorskip("transformers")


def compiled(mesh: dict[str, int], machine: str, *, seed: int = 0) -> fxzero.TrainStep:
    """The step of a Llama; with another seed from other weights, which a checkpoint has to replace."""
    torch.manual_seed(seed)
    model = CASES["llama"].model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = fxzero.Plan(mesh=mesh, zero=3, hardware=machine, lowering="eager")
    return fxzero.compile(model, optimizer, plan)


def trained(step: fxzero.TrainStep, steps: range, *, part: int = 0, parts: int = 1) -> list[float]:
    """The losses of some steps, over all rows of a batch, of which this rank has a part."""
    losses = []
    for index in steps:
        ids = torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(index))
        mine = ids.chunk(parts)[part]
        loss = step(input_ids=mine, labels=mine).clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def resumed(step: fxzero.TrainStep, folder: str) -> fxzero.TrainStep:
    """The step with what a checkpoint holds."""
    state = step.state_dict()
    dcp.load(state, checkpoint_id=folder)
    step.load_state_dict(state)
    return step


def main(out: str, machine: str, folder: str) -> None:
    """Train, save, go on elsewhere; rank 0 writes the losses, and how many parameters tp has split."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    with verifying_less({}):
        found = going_on(machine, folder)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def going_on(machine: str, folder: str) -> dict[str, Any]:
    """What a rank finds."""
    rank = dist.get_rank()
    step = compiled({"dp": 2, "tp": 2}, machine)
    trained(step, range(STEPS), part=rank // 2, parts=2)
    dcp.save(step.state_dict(), checkpoint_id=folder)
    later = range(STEPS, 2 * STEPS)
    found: dict[str, Any] = {"not stopped": trained(step, later, part=rank // 2, parts=2)}
    for name, mesh in LATER.items():
        again = resumed(compiled(mesh, machine, seed=1), folder)
        found[name] = trained(again, later, part=rank // mesh["tp"], parts=mesh["dp"])
        if mesh["tp"] > 1:
            split = [p for p in again.model.parameters() if p.placements[0].is_shard()]  # type: ignore[attr-defined]
            found[f"split at {name}"] = len(split)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks found, and one that resumes."""
    folder = tmp_path_factory.mktemp("resume")
    out, machine, checkpoint = folder / "found.json", free_network_file(folder), str(folder / "checkpoint")
    launch("tests.sharding.test_resume", str(out), machine, checkpoint, ranks=RANKS, timeout_s=200)
    alone = resumed(compiled({"dp": 1}, machine, seed=1), checkpoint)
    return json.loads(out.read_text()) | {"one rank": trained(alone, range(STEPS, 2 * STEPS))}


@pytest.mark.parametrize("where", [*LATER, "one rank"])
def test_losses_are_those_of_a_run_that_was_not_stopped(where: str, found: dict[str, Any]) -> None:
    assert found[where] == pytest.approx(found["not stopped"], abs=TOLERANCE)


@pytest.mark.parametrize("where", ["tp=4", "dp=2 tp=2"])
def test_what_resumes_is_split(where: str, found: dict[str, Any]) -> None:
    assert found[f"split at {where}"] > 15


if __name__ == "__main__":
    main(*sys.argv[1:])
