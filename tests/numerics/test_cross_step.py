"""Gathers that one step launches for the next change no bit, whatever happens in between; and rank 0's recorded costs.

Run as a module, this file is what each rank does.
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero import compat
from fxzero.cost.recorded import RecordedCosts, costs_from
from fxzero.errors import FxzeroError, RankMismatchError
from fxzero.runtime import launched_ahead
from fxzero.runtime.agreement import Agreement
from tests.numerics.side_by_side import Values, check, first_difference, parameters, results_of, run_jobs
from tests.numerics.sparing import sharing_first_capture, verifying_less

WORDS, WIDTH, STEPS = 33, 8, 9  # rows that two ranks do not divide evenly
MESSAGES: dict[str, Any] = {"bucket_bytes": 0, "all_gather": "send_recv"}


class Words(nn.Module):
    """Words, dropout, a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, 11)
        self.mix.bias.requires_grad_(False)
        self.head = nn.Linear(11, WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(F.gelu(self.mix(self.embed(x))), 0.2)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), x.flatten())


# ---- what happens between two steps: each is called before the step of its number


def edited_by_one_rank(step: fxzero.TrainStep, model: Words, rank: int) -> None:
    with torch.no_grad():
        if rank == 1:
            model.embed.weight.mul_(0.5)


def edited_as_data_by_one_rank(step: fxzero.TrainStep, model: Words, rank: int) -> None:
    if rank == 0:
        model.embed.weight.data.mul_(0.5)


def loaded(step: fxzero.TrainStep, model: Words, rank: int) -> None:
    step.load_state_dict({name: value.clone() for name, value in SAVED.pop(model).items()})


def saved_state(step: fxzero.TrainStep, model: Words, rank: int) -> None:
    SAVED[model] = {name: value.clone() for name, value in step.state_dict().items()}


SAVED: dict[Words, dict[str, Any]] = {}


def loaded_into_model(step: fxzero.TrainStep, model: Words, rank: int) -> None:
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def written_back(step: fxzero.TrainStep, model: Words, rank: int) -> None:
    with step.unsharded(writeback=True) as whole, torch.no_grad():
        whole.embed.weight.add_(0.01)


def refused_batch(step: fxzero.TrainStep) -> None:
    """A call that fails before any rank runs it; what is under way stays so."""
    with contextlib.suppress(FxzeroError):
        step(torch.zeros(2, 5))


EVENTS: dict[int, Callable[[fxzero.TrainStep, Words, int], None]] = {
    1: saved_state,
    2: edited_by_one_rank,
    3: edited_as_data_by_one_rank,
    4: loaded,
    5: loaded_into_model,
    6: written_back,
}


def batch(number: int, rank: int, microbatches: int = 1) -> torch.Tensor:
    """Without microbatches of another length at steps 6 and 7: another program."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    length = 7 if number in (6, 7) and microbatches == 1 else 5
    return torch.randint(WORDS, (2 * microbatches, length), generator=generator)


def train(plan: dict[str, Any], rank: int) -> tuple[Values, fxzero.TrainStep]:
    """Losses and parameters of a run with all events, and its step."""
    torch.manual_seed(0)
    model = Words()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.3), fxzero.Plan(**plan))
    torch.manual_seed(1 + rank)
    found = {}
    for number in range(STEPS):
        if number == 8 and plan == {**MESSAGES, "cross_step": True}:
            refused_batch(step)
        EVENTS.get(number, lambda *_: None)(step, model, rank)
        found[f"loss {number}"] = step(batch(number, rank, plan.get("accumulate", 1)))
    return found | parameters(model), step


# ---- faults


@contextlib.contextmanager
def changes_not_seen() -> Iterator[None]:
    """A gather is used though what it gathered has changed."""
    with mock.patch.object(launched_ahead._UnderWay, "holds", lambda *_: True):
        yield


@contextlib.contextmanager
def counts_alone() -> Iterator[None]:
    """Only torch's counts of writes are asked, which miss what is written through `.data`."""
    with mock.patch.object(launched_ahead, "_same_bits", lambda a, b: True):
        yield


@dataclass(frozen=True)
class Job:
    """One plan, run with and without gathers carried over the end of a step."""

    label: str
    plan: dict[str, Any] = field(default_factory=dict)
    fault: Callable[[], contextlib.AbstractContextManager[None]] | None = None

    @property
    def name(self) -> str:
        return f"{self.label} {self.fault.__name__}" if self.fault else self.label


JOBS = [
    Job("messages", MESSAGES),
    Job("messages", MESSAGES, changes_not_seen),
    Job("messages", MESSAGES, counts_alone),
    Job("shared memory", {"bucket_bytes": 0, "all_gather": "shared_memory"}),
    Job("native", {"all_gather": "native", "bucket_form": "coalesced"}),
    Job(
        "microbatches, skipped steps",
        {"accumulate": 2, "precision": "fp16", "loss_scale": "dynamic", "loss_scale_init": 2.0**24, "prefetch": 0},
    ),
]
_captures: dict[str, Any] = {}
_plain: dict[str, Values] = {}


def run(job: Job, rank: int) -> str:
    if job.label not in _plain:
        with sharing_first_capture(_captures, ""), verifying_less({"zero": 0}):
            _plain[job.label] = train(job.plan, rank)[0]
    with (
        sharing_first_capture(_captures, ""),
        verifying_less({"zero": 0}),
        job.fault() if job.fault else contextlib.nullcontext(),
    ):
        found, step = train({**job.plan, "cross_step": True}, rank)
    assert step.graphs[0].inputs("launched"), "nothing is carried"
    return first_difference(_plain[job.label], found)


# ---- recorded costs


@dataclass(frozen=True)
class CostJob:
    """What both ranks do; they say what went wrong, if anything."""

    name: str
    run: Callable[[int], str]


@functools.cache
def costs_here(scale: float) -> RecordedCosts:
    """Costs of every call of the first step, which grow with its place in the program, or shrink."""
    model = Words()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), fxzero.Plan(cross_step=True))
    step(batch(0, 0))
    names = [node.name for node in step.graph.calls()]
    seconds = {name: 1e-3 * (1 + place) ** scale for place, name in enumerate(names)}
    return RecordedCosts.here(torch.device("cpu")).adding(costs_from(step.graph, seconds))


def by_file(path: Path, rank: int, **keys: Any) -> fxzero.TrainStep:
    """A step that has run, ordered by this path; each rank's file is in a folder of its own, under the same name."""
    torch.manual_seed(0)
    model = Words()
    plan = fxzero.Plan(schedule="cost", hardware="cpu", costs=path, timeout_s=60, **keys)
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    before = Path.cwd()
    os.chdir(path_of(rank))
    try:
        step(batch(0, rank))
    finally:
        os.chdir(before)
    return step


def path_of(rank: int) -> Path:
    return Path(sys.argv[1]).parent / str(rank)


def texts_of(step: fxzero.TrainStep) -> list[str]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(step.graph))
    return found


def other_files(rank: int) -> str:
    """Rank 1 has other costs: all are ordered by rank 0's, as when its file alone is there."""
    costs = costs_here(1.0 if rank == 0 else -1.0)
    path_of(rank).mkdir(exist_ok=True)
    costs.merged_into(path_of(rank) / "costs.json")
    first, second = texts_of(by_file(Path("costs.json"), rank))
    if rank == 1:
        (path_of(rank) / "costs.json").unlink()
    again = texts_of(by_file(Path("costs.json"), rank))
    return "" if first == second == again[0] == again[1] else "ranks have other programs"


def own_files(rank: int) -> str:
    """The planted fault: each rank decides by its own file, and the agreement finds it."""
    costs_here(1.0 if rank == 0 else -1.0).merged_into(path_of(rank) / "costs.json")
    with mock.patch.object(Agreement, "from_first", lambda self, make: make()):
        try:
            by_file(Path("costs.json"), rank)
        except RankMismatchError as error:
            return "" if "RecordedCosts" in str(error) else str(error)
    return "no error"


def no_file(rank: int) -> str:
    """Rank 0 has no file: all ranks say so."""
    try:
        by_file(Path("missing.json"), rank)
    except FxzeroError as error:
        return "" if "missing.json" in str(error) and "step.record" in str(error) else str(error)
    return "no error"


def recorded_now(rank: int) -> str:
    """A recording of this run orders the next steps, and the step trains on as it would have."""
    torch.manual_seed(0)
    model = Words()
    step = fxzero.compile(
        model, torch.optim.SGD(model.parameters(), lr=0.1), fxzero.Plan(schedule="cost", hardware="cpu")
    )
    recording = step.record(batch(0, rank), steps=1)
    step.schedule_by(recording)
    step(batch(0, rank))
    first, second = texts_of(step)
    assert "RecordedCosts(" in step._last[0].text
    return "" if first == second else "ranks have other programs"


COST_JOBS = [CostJob(run.__name__, run) for run in (other_files, own_files, no_file, recorded_now)]


# ---- under torch's profiler


def profiled(rank: int, *, known: bool = True) -> str:
    """Nothing is under way when a profile ends, and the next step is the same as without it."""
    losses = []
    for number in range(2):
        torch.manual_seed(0)
        model = Words()
        plan = fxzero.Plan(cross_step=True, **MESSAGES)
        step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
        with mock.patch.object(compat, "is_profiled", mock.Mock(return_value=known and number == 1)):
            step(batch(0, rank))
        under_way = any(gather.value.works for gather in step._ahead._kept.values())
        if under_way == (number == 1):
            return f"under way: {under_way}, profiled: {number == 1}"
        losses.append(step(batch(1, rank)))
    return "" if torch.equal(*losses) else "another loss"


def profiled_unseen(rank: int) -> str:
    """The planted fault: nobody asks for the profiler."""
    return profiled(rank, known=False)


PROFILE_JOBS = [CostJob(run.__name__, run) for run in (profiled, profiled_unseen)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return results_of("tests.numerics.test_cross_step", tmp_path_factory.mktemp("cross_step"), ranks=2)


@pytest.mark.multirank
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_gathers_of_the_next_step_change_no_bit(job: Job, results: list[dict[str, str]]) -> None:
    check(job, results, differs=job.fault is not None)


@pytest.mark.multirank
@pytest.mark.parametrize("job", COST_JOBS, ids=lambda job: job.name)
def test_all_ranks_are_ordered_by_the_costs_of_rank_0(job: CostJob, results: list[dict[str, str]]) -> None:
    check(job, results, differs=False)


@pytest.mark.multirank
@pytest.mark.parametrize("job", PROFILE_JOBS, ids=lambda job: job.name)
def test_a_profile_ends_with_nothing_under_way(job: CostJob, results: list[dict[str, str]]) -> None:
    check(job, results, differs=job.run is profiled_unseen)


def run_either(job: Job | CostJob, rank: int) -> str:
    if isinstance(job, Job):
        return run(job, rank)
    with sharing_first_capture(_captures, "ordered by cost"), verifying_less({"zero": 0}):
        return job.run(rank)


if __name__ == "__main__":
    here = importlib.import_module("tests.numerics.test_cross_step")
    run_jobs(sys.argv[1], [*here.JOBS, *here.COST_JOBS, *here.PROFILE_JOBS], here.run_either)
