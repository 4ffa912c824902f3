"""Checkpoints: saved by four ranks at ZeRO-3, resumed by two at ZeRO-1 and by one; and the plain model in between.

Run as a module, this file is what each rank does.
"""

import copy
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.tensor import DTensor

import fxzero
from fxzero.errors import FxzeroError, PlanError
from tests.numerics import models
from tests.numerics.models import OPTIMIZERS, Case, Network, Smooth, plain_batch
from tests.numerics.reference import build, compare, first_difference, optimizer_state, run_compiled, run_plain
from tests.numerics.worker import launch

STEPS, SAVED_AFTER, ROWS = 12, 6, 8

# the first step of SGD with dampening is unlike others: a resumed run must not take its first for that one
JOBS = ("adamw", "sgd_dampening")


def start(job: str, plan: fxzero.Plan, *, meta: bool = False) -> tuple[fxzero.TrainStep, Any]:
    """A new step with its LR scheduler."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    with torch.device("meta" if meta else "cpu"):
        model = Smooth()
    optimizer = OPTIMIZERS[job](model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return fxzero.compile(model, optimizer, plan), scheduler


def train(step: fxzero.TrainStep, scheduler: Any, numbers: range) -> list[float]:
    """The mean loss over all ranks of each step; the same rows at any number of ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    losses = []
    for number in numbers:
        x, y = models.tokens(torch.Generator().manual_seed(number), ROWS)
        loss = step(x[mine], y[mine])
        scheduler.step()
        if size > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / size)
    return losses


def save(step: fxzero.TrainStep, scheduler: Any, folder: Path) -> None:
    """What a training script saves."""
    dcp.save(step.state_dict(), checkpoint_id=folder)
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")


def resume(step: fxzero.TrainStep, scheduler: Any, folder: Path) -> None:
    """What a training script loads."""
    values = step.state_dict()
    dcp.load(values, checkpoint_id=folder)
    step.load_state_dict(values)
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


# ---- what ranks do


def rank_saves(folder: Path) -> dict[str, Any]:
    """The uninterrupted run, saved half way."""
    losses = {}
    for job in JOBS:
        step, scheduler = start(job, fxzero.Plan(zero=3))
        first = train(step, scheduler, range(SAVED_AFTER))
        save(step, scheduler, folder / job)
        losses[job] = first + train(step, scheduler, range(SAVED_AFTER, STEPS))
    return losses


def rank_resumes(folder: Path) -> dict[str, Any]:
    """Resumed with other sharding, and as a meta model that only the checkpoint fills."""
    losses = {}
    for job in JOBS:
        step, scheduler = start(job, fxzero.Plan(zero=1))
        resume(step, scheduler, folder / job)
        losses[job] = train(step, scheduler, range(SAVED_AFTER, STEPS))
    step, scheduler = start("adamw", fxzero.Plan(zero=3), meta=True)
    resume(step, scheduler, folder / "adamw")
    losses["adamw from meta"] = train(step, scheduler, range(SAVED_AFTER, STEPS))
    unsharded, saved = rank_unshards(folder)
    return losses | {"unsharded": unsharded, "safetensors": saved}


def save_safely(model: nn.Module, folder: Path) -> str:
    """Save with safetensors on rank 0; returns what went wrong."""
    try:
        if dist.get_rank() == 0:
            save_model(model, str(folder / "model.safetensors"))
    except Exception as error:
        return str(error)
    return ""


def rank_unshards(folder: Path) -> tuple[list[str], str]:
    """Where the plain model within `step.unsharded()` is not what DDP's module is; what safetensors objects to."""
    case = Case("unsharded", Network, OPTIMIZERS["adamw"], plain_batch, steps=5)
    expected = run_plain(case, rank=dist.get_rank(), distributed=True)
    got, step = run_compiled(case, fxzero.Plan(zero=3), rank=dist.get_rank())
    faults = [str(first_difference(expected, got) or "")]
    x, y = models.tokens(torch.Generator().manual_seed(0))
    with step.unsharded() as model:
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
            faults.append(str(compare(name, expected.values[f"{kind} {name}"], value.detach()) or ""))
            faults.append(f"{name} is a DTensor" if isinstance(value, DTensor) else "")
        faults.append("" if model.head.weight is model.embed.weight else "the tie is lost")
        with torch.no_grad():
            inside = model.eval()(x, y)
        model.train()
        if dist.get_rank() == 0:  # ranks have running statistics of their own
            torch.save(inside, folder / "loss.pt")
        saved = save_safely(model, folder)
        before = model.block.mix.weight.detach().clone()
        with torch.no_grad():
            model.block.mix.weight.zero_()
    sharded = step.model.block.mix.weight
    faults.append("" if isinstance(sharded, DTensor) else "no DTensor after the block")
    faults.append("" if step.model.head.weight is step.model.embed.weight else "the tie is lost after the block")
    faults.append(str(compare("without writeback", before, sharded.full_tensor().detach()) or ""))
    with step.unsharded(writeback=True) as model, torch.no_grad():
        model.block.mix.weight.mul_(2)
    faults.append(str(compare("with writeback", before * 2, step.model.block.mix.weight.full_tensor().detach()) or ""))
    faults.append("" if torch.isfinite(step(x, y)) else "no step after the block")
    return [fault for fault in faults if fault], saved


def main(which: str, folder: Path) -> None:
    """One rank; rank 0 writes what it has found."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {"rank_saves": rank_saves, "rank_resumes": rank_resumes}[which](folder)
    if dist.get_rank() == 0:
        (folder / f"{which}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks have saved."""
    path = tmp_path_factory.mktemp("checkpoints")
    launch("tests.numerics.test_checkpoint", "rank_saves", str(path), ranks=4, timeout_s=180)
    return path


@pytest.fixture(scope="module")
def resumed(folder: Path) -> dict[str, Any]:
    """What two ranks have found."""
    launch("tests.numerics.test_checkpoint", "rank_resumes", str(folder), ranks=2, timeout_s=180)
    return json.loads((folder / "rank_resumes.json").read_text())


def uninterrupted(folder: Path, job: str) -> list[float]:
    """Losses of the run by four ranks, from the checkpoint on."""
    return json.loads((folder / "rank_saves.json").read_text())[job][SAVED_AFTER:]


def close(expected: list[float]) -> Any:
    """Within 1e-6 relative: gradients are sums over rows and ranks, and other ranks sum in another order."""
    return pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.multirank
@pytest.mark.parametrize("job", JOBS)
def test_resumed_by_two_ranks_at_zero_1(job: str, folder: Path, resumed: dict[str, Any]) -> None:
    assert resumed[job] == close(uninterrupted(folder, job))


@pytest.mark.multirank
def test_a_meta_model_is_resumed_by_two_ranks_at_zero_3(folder: Path, resumed: dict[str, Any]) -> None:
    assert resumed["adamw from meta"] == close(uninterrupted(folder, "adamw"))


@pytest.mark.multirank
@pytest.mark.parametrize("job", JOBS)
def test_resumed_by_one_rank(job: str, folder: Path) -> None:
    step, scheduler = start(job, fxzero.Plan())
    resume(step, scheduler, folder / job)
    assert train(step, scheduler, range(SAVED_AFTER, STEPS)) == close(uninterrupted(folder, job))


@pytest.mark.multirank
@pytest.mark.parametrize(
    "lost",
    [
        "model.embed.weight",
        "optimizer.state.body.weight:exp_avg",
        "optimizer.state.body.weight:step",
        "optimizer.param_groups.0.lr",
    ],
)
def test_a_part_that_is_not_resumed_is_seen(lost: str, folder: Path) -> None:
    step, scheduler = start("adamw", fxzero.Plan())
    values = step.state_dict()
    kept = values[lost].clone()
    dcp.load(values, checkpoint_id=folder / "adamw")
    values[lost].copy_(kept)
    step.load_state_dict(values)
    scheduler.load_state_dict(torch.load(folder / "adamw" / "scheduler.pt", weights_only=True))
    assert train(step, scheduler, range(SAVED_AFTER, STEPS)) != close(uninterrupted(folder, "adamw"))


@pytest.mark.multirank
def test_unsharded_is_the_module_of_ddp(resumed: dict[str, Any]) -> None:
    assert resumed["unsharded"] == []


@pytest.mark.multirank
def test_safetensors_saved_unsharded_load_into_a_plain_model(folder: Path, resumed: dict[str, Any]) -> None:
    assert resumed["safetensors"] == ""
    model = Network()
    load_model(model, str(folder / "model.safetensors"))
    x, y = models.tokens(torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(x, y), torch.load(folder / "loss.pt", weights_only=True))


# ---- one rank


@pytest.mark.parametrize("name", ["third_party", "asgd", "nadam", "muon", "two_paths"])
def test_resumed_in_one_process_bit_by_bit(name: str, tmp_path: Path) -> None:
    case = models.all_cases()[name]
    case = case.but(steps=STEPS, scheduler=None)
    expected, _ = run_compiled(case, fxzero.Plan())
    _, step = run_compiled(case.but(steps=SAVED_AFTER), fxzero.Plan())
    dcp.save(step.state_dict(), checkpoint_id=tmp_path)
    drawn = torch.get_rng_state()

    model, optimizer = build(case, rank=7)
    step = fxzero.compile(model, optimizer, fxzero.Plan(), loss=case.loss)
    values = step.state_dict()
    dcp.load(values, checkpoint_id=tmp_path)
    step.load_state_dict(values)
    torch.set_rng_state(drawn)
    generator = torch.Generator().manual_seed(5)
    batches = [case.batch(number, 0, generator) for number in range(STEPS)]
    for number, (args, kwargs) in enumerate(batches[SAVED_AFTER:], start=SAVED_AFTER):
        assert torch.equal(step(*args, **kwargs), expected.values[f"loss {number}"]), f"loss {number}"
    for label, value in optimizer_state(model, optimizer).items():
        assert compare(label, expected.values[label], value) is None


def test_a_state_dict_with_other_keys_is_refused() -> None:
    step, _ = start("adamw", fxzero.Plan())
    values = step.state_dict()
    del values["model.body.weight"]
    values["model.body.weights"] = torch.zeros(1)
    with pytest.raises(PlanError, match=r"1 missing \['model\.body\.weight'\], 1 unknown \['model\.body\.weights'\]"):
        step.load_state_dict(values)


def test_a_state_dict_of_other_shapes_is_refused() -> None:
    step, _ = start("adamw", fxzero.Plan())
    values = step.state_dict() | {"model.body.weight": torch.zeros(2, 2)}
    with pytest.raises(FxzeroError, match=r"model\.body\.weight: expected shape \(17, 17\), got \(2, 2\)"):
        step.load_state_dict(values)


def test_a_refused_state_dict_changes_nothing() -> None:
    step, scheduler = start("adamw", fxzero.Plan())
    train(step, scheduler, range(2))
    before = {key: value.clone() for key, value in step.state_dict().items()}
    values = {key: torch.zeros_like(value) for key, value in before.items()}
    values["model.norm.weight"] = torch.zeros(2, 2)
    with pytest.raises(FxzeroError):
        step.load_state_dict(values)
    after = step.state_dict()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []


def test_the_state_dicts_of_torch_resume_too() -> None:
    """`model.state_dict()` and `optimizer.state_dict()`, as scripts without fxzero save them."""
    step, scheduler = start("adamw", fxzero.Plan())
    train(step, scheduler, range(SAVED_AFTER))
    saved = copy.deepcopy((step.model.state_dict(), step.optimizer.state_dict()))
    expected = train(step, scheduler, range(SAVED_AFTER, STEPS))

    step, scheduler = start("adamw", fxzero.Plan())
    train(step, scheduler, range(1))
    step.model.load_state_dict(saved[0])
    step.optimizer.load_state_dict(saved[1])
    scheduler.last_epoch = SAVED_AFTER
    assert train(step, scheduler, range(SAVED_AFTER, STEPS)) == expected


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
