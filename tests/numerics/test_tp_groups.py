"""Ranks of a tp group that are called with different batches, or draw different numbers: an error on every rank.

Run as a module, this file is what each rank does.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import fxzero
from fxzero.errors import FxzeroError, RankMismatchError
from fxzero.runtime.agreement import Agreement
from fxzero.runtime.in_common import CHEAP_BYTES, InCommon
from fxzero.runtime.microbatches import Batch
from tests.numerics.sparing import verifying_less
from tests.numerics.worker import launch_for_results

pytestmark = pytest.mark.multirank

RANKS, ODD = 4, 3  # ranks 2 and 3 are a tp group
MESH = {"dp": 2, "tp": 2}
LARGE = CHEAP_BYTES // 16 + 1  # rows of 4 floats that a later call does not look at

Call = Callable[..., Any]


def rows(number: int = 4, *, odd: float = 0.0) -> torch.Tensor:
    """The same on ranks of a tp group, but for what the odd one out adds to its last element."""
    x = torch.full((number, 4), 1.0 + dist.get_rank() // 2)
    x[-1, -1] += odd * (dist.get_rank() == ODD)
    return x


def agreeing() -> Call:
    """What a step does to agree, its program being the same for all batches."""
    agreement = Agreement(timeout_s=10, alike=[[0, 1], [2, 3]])

    def call(*args: Any, **kwargs: Any) -> None:
        if "unknown" in kwargs:
            agreement.fail("unknown")
            raise FxzeroError("unknown")
        batch = Batch.of(args, kwargs, number=1, device=torch.device("cpu"))
        agreement.settle("program", common=InCommon(batch, torch.device("cpu")))

    return call


# ---- what ranks do with something that agrees


def alike(call: Call) -> None:
    """What is right: ranks of dp have other batches and numbers."""
    for number in (4, 4, 3, 4):
        call(rows(number))
        torch.rand(2 + dist.get_rank() // 2)


def other_batch(call: Call) -> None:
    call(rows(odd=1.0))


def other_shape(call: Call) -> None:
    call(rows(4 + (dist.get_rank() == ODD)))


def other_number(call: Call) -> None:
    call(rows(), scale=2.0 + (dist.get_rank() == ODD))


def other_generator(call: Call) -> None:
    torch.rand(1 + (dist.get_rank() == ODD))
    call(rows())


def other_batch_later(call: Call) -> None:
    call(rows())
    call(rows(odd=1.0))


def other_generator_later(call: Call) -> None:
    call(rows())
    other_generator(call)


def other_large_batch_later(call: Call) -> None:
    """What ranks agree on may be the same for batches of both sizes; the first of each is looked at all the same."""
    call(rows())
    call(rows(LARGE, odd=1.0))


def after_a_failure(call: Call) -> None:
    """A batch that one rank did not get to is new to all at the next call."""
    call(rows())
    try:
        call(rows(LARGE), **({"unknown": 1} if dist.get_rank() == 1 else {}))
    except FxzeroError as error:
        assert "unknown" in str(error), error
    call(rows(LARGE))
    call(rows(3, odd=1.0))


SCENARIOS: list[tuple[Callable[[Call], None], str]] = [
    (alike, ""),
    (other_batch, r"batch input args.0: .*, [2, 3]; rank 2 has torch.float32[4, 4] digest "),
    (other_shape, r"batch input args.0: .*rank 2 has torch.float32[4, 4] .*rank 3 has torch.float32[5, 4]"),
    (other_number, r"batch input kwargs.scale: .*rank 2 has 2.0, got rank 3 has 3.0;"),
    (other_generator, r"random number generator: .*torch.manual_seed(seed + dp index)"),
    (other_batch_later, r"batch input args.0: .*, [2, 3]; rank 2 has torch.float32[4, 4] digest "),
    (other_large_batch_later, rf"batch input args.0: .*, [2, 3]; rank 2 has torch.float32[{LARGE}, 4] digest"),
    (other_generator_later, r"random number generator: .*, [2, 3]; rank 2 has digest "),
    (after_a_failure, r"batch input args.0: .*rank 2 has torch.float32[3, 4] digest "),
]


def end_of(scenario: Callable[[Call], None], call: Call) -> str:
    """What is raised here."""
    torch.manual_seed(dist.get_rank() // 2)
    try:
        scenario(call)
    except RankMismatchError as error:
        return str(error)
    return ""


# ---- what ranks do with steps


def compiled(**keys: Any) -> fxzero.TrainStep:
    """A step, from the same values everywhere."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = fxzero.compile(model, optimizer, fxzero.Plan(mesh=MESH, **keys), loss=loss)
    torch.manual_seed(dist.get_rank() // 2)
    return step


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a batch."""
    return model(x).pow(2).mean()


def parameters(step: fxzero.TrainStep) -> list[list[float]]:
    """All of them, whole."""
    return [p.full_tensor().flatten().tolist() for p in step.model.parameters()]  # type: ignore[attr-defined]


def plain() -> list[list[float]]:
    """Parameters after three steps of one process on the batches of both tp groups."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(3):
        optimizer.zero_grad()
        loss(model, torch.tensor([[1.0] * 4] * 4 + [[2.0] * 4] * 4) * (number + 1)).backward()
        optimizer.step()
    return [p.flatten().tolist() for p in model.parameters()]


KEYS: list[dict[str, Any]] = [
    {"cross_step": True},
    {"offload_optimizer": "host", "offload_parameters": "host", "offload_below": 0},
    {"compress_gathers": "int8", "compress_reductions": "int8", "compress_below": 0},
]


def run_steps(folder: Path) -> dict[str, Any]:
    """Steps whose ranks differ; what options of a plan come to; a checkpoint loaded before the first call."""
    first = compiled()
    kept = [p.detach().clone() for p in first.model.parameters()]
    found: dict[str, Any] = {"first call": end_of(other_batch, first)}
    found["untouched"] = all(torch.equal(a, b) for a, b in zip(kept, first.model.parameters(), strict=True))
    found["later call"] = end_of(other_generator_later, first)
    dcp.save(first.state_dict(), checkpoint_id=folder / "checkpoint")
    second = compiled()
    values = second.state_dict()
    dcp.load(values, checkpoint_id=folder / "checkpoint")
    second.load_state_dict(values)
    torch.manual_seed(dist.get_rank() // 2)
    for name, step in (("uninterrupted", first), ("resumed", second)):
        step(rows())
        found[name] = parameters(step)
    for keys in KEYS:
        step = compiled(**keys)
        for number in range(3):
            step(rows() * (number + 1))
        found[str(keys)] = parameters(step)
    return found


def main(path: Path) -> None:
    """One rank; rank 0 writes what all have found."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: list[Any] = [None] * RANKS
    ends = {scenario.__name__: end_of(scenario, agreeing()) for scenario, _ in SCENARIOS}
    with verifying_less({}, broken=False):
        dist.all_gather_object(found, {"ends": ends, "steps": run_steps(path.parent)})
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("tp_groups")
    return launch_for_results("tests.numerics.test_tp_groups", folder, ranks=RANKS, timeout_s=120)


def is_said(end: str, said: str) -> bool:
    """Whether an error has these parts in this order."""
    start = 0
    for part in said.split(".*"):
        if part not in end[start:]:
            return False
        start = end.index(part, start) + len(part)
    return True


@pytest.mark.parametrize(("scenario", "said"), SCENARIOS, ids=lambda s: getattr(s, "__name__", ""))
def test_all_ranks_are_told_what_a_tp_group_has_not_in_common(scenario: Any, said: str, found: Any) -> None:
    ends = {rank["ends"][scenario.__name__] for rank in found}
    assert len(ends) == 1, ends
    assert is_said(end := ends.pop(), said) and bool(end) == bool(said), end


def test_a_step_compares_at_each_call_and_before_anything_is_touched(found: Any) -> None:
    for rank in found:
        steps = rank["steps"]
        assert is_said(steps["first call"], "batch input args.0: .*, [2, 3]; rank 2 has torch.float32[4, 4] digest ")
        assert steps["untouched"]
        assert is_said(steps["later call"], "random number generator: .*, [2, 3]; rank 2 has digest ")


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_options_of_a_plan_hold_beside_tp(keys: dict[str, Any], found: Any) -> None:
    tolerance = 2e-2 if "compress_gathers" in keys else 1e-5
    for rank in found:
        for mine, alone in zip(rank["steps"][str(keys)], plain(), strict=True):
            assert mine == pytest.approx(alone, rel=tolerance, abs=tolerance)


def test_a_checkpoint_is_loaded_before_the_first_call(found: Any) -> None:
    for rank in found:
        assert rank["steps"]["resumed"] == rank["steps"]["uninterrupted"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
