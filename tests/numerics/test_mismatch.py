"""Ranks that do not agree, fail or die: an error on every rank that says what is wrong, in good time; never a hang.

Run as a module, this file is what each rank does.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph.edit import Editor
from fxzero.pass_manager import Pipeline
from tests.numerics.models import VOCAB, ScaledByNorms, Smooth, tokens
from tests.numerics.reference import planted
from tests.numerics.worker import ROOT, launch, rank_environment

pytestmark = pytest.mark.multirank

RANKS, ODD = 3, 1  # rank 1 is the odd one out, so that one rank beside rank 0 agrees with it
TIMEOUT_S = 4.0  # how long ranks wait for one that does not come
DIES_AT, SAVED_AT, GROUP_TIMEOUT_S = 5, 3, 20


class Plain(nn.Module):
    """Two layers; the width of the first is the rank's choice, and so is whether it can be captured."""

    def __init__(self, width: int = 8, *, broken: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.head = nn.Linear(width, VOCAB)
        self.broken = broken

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        if self.broken and hidden.sum() > 0:
            hidden = hidden * 2
        return F.cross_entropy(self.head(hidden), y)


class EitherLayer(nn.Module):
    """Two layers of one shape, of which a step trains one: two programs whose collectives look the same."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor, *, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(x).pow(2).mean()


def step_of(model: nn.Module, kind: Any = torch.optim.AdamW, **plan: Any) -> fxzero.TrainStep:
    """A step that does not wait long."""
    return fxzero.compile(model, kind(model.parameters(), lr=0.1), fxzero.Plan(timeout_s=TIMEOUT_S, **plan))


@contextlib.contextmanager
def other_order() -> Iterator[None]:
    """The same passes, the last two the other way round."""
    page = importlib.import_module("fxzero.decide.search")
    recipe = page.recipe

    def swapped(plan: fxzero.Plan, **how: Any) -> Pipeline:
        *first, a, b = recipe(plan, **how).passes
        return Pipeline([*first, b, a])

    with mock.patch.object(page, "recipe", swapped):
        yield


# ---- what ranks do: each function is one scenario, called on every rank


def other_width(rank: int) -> None:
    """One rank has wider layers."""
    step_of(Plain(10 if rank == ODD else 8))(*tokens(torch.Generator()))


def other_stage(rank: int) -> None:
    """One rank has another plan."""
    step_of(Plain(), zero=2 if rank == ODD else 3)(*tokens(torch.Generator()))


def other_buckets(rank: int) -> None:
    """One rank cuts other buckets."""
    step_of(Plain(), bucket_bytes=0 if rank == ODD else 2**20)(*tokens(torch.Generator()))


def other_pass_order(rank: int) -> None:
    """One rank runs its passes in another order."""
    with other_order() if rank == ODD else contextlib.nullcontext():
        step_of(Plain())(*tokens(torch.Generator()))


def other_optimizer(rank: int) -> None:
    """One rank has another optimizer."""
    step_of(Plain(), torch.optim.SGD if rank == ODD else torch.optim.AdamW)(*tokens(torch.Generator()))


def other_dtype(rank: int) -> None:
    """One rank has another dtype."""
    step_of(Plain().to(torch.bfloat16 if rank == ODD else torch.float32))(*tokens(torch.Generator()))


def not_captured(rank: int) -> None:
    """One rank cannot capture its model."""
    step_of(Plain(broken=rank == ODD))(*tokens(torch.Generator()))


def not_captured_by_first(rank: int) -> None:
    """Rank 0, which judges, cannot capture its model."""
    step_of(Plain(broken=rank == 0))(*tokens(torch.Generator()))


def absent(rank: int) -> None:
    """One rank never calls its step."""
    step = step_of(Plain())
    if rank != ODD:
        step(*tokens(torch.Generator()))


def first_absent(rank: int) -> None:
    """Rank 0, which judges, never calls its step."""
    step = step_of(Plain())
    if rank != 0:
        step(*tokens(torch.Generator()))


def other_batch(rank: int) -> None:
    """No mismatch: ranks may have batches of different lengths."""
    step = step_of(Plain())
    for rows in (8, 6 + rank, 8):
        step(*tokens(torch.Generator(), rows))


def other_known_program(rank: int) -> None:
    """All ranks have agreed on two programs; then one runs the one and the others the other."""
    step = step_of(EitherLayer(), zero=0)
    for left in (True, False, rank == ODD):
        step(torch.ones(2, 4), left=left)


def state_from_whole_values(rank: int) -> None:
    """An optimizer whose first state needs a parameter's whole values, which ranks will not have."""
    step_of(Plain(), ScaledByNorms, zero=1)(*tokens(torch.Generator()))


def other_new_program(rank: int) -> None:
    """After a common step, one rank comes with a program that no rank has run yet, the others go on."""
    step = step_of(EitherLayer(), zero=0)
    for left in (True, rank != ODD):
        step(torch.ones(2, 4), left=left)


def fails_later(rank: int) -> None:
    """After a common step, one rank has a batch that its model does not take; then all have good ones."""
    step = step_of(Plain())
    step(*tokens(torch.Generator()))
    try:
        step(*tokens(torch.Generator())[: 1 if rank == ODD else 2])
    finally:
        step(*tokens(torch.Generator()))


MISMATCHES = (other_width, other_stage, other_buckets, other_pass_order, other_optimizer, other_dtype)
SCENARIOS = (
    *MISMATCHES,
    not_captured,
    not_captured_by_first,
    absent,
    first_absent,
    other_batch,
    state_from_whole_values,
    other_new_program,
    fails_later,
    other_known_program,
)


def observe(scenario: Callable[[int], None], rank: int) -> dict[str, Any]:
    """How a scenario ends on this rank, after how long, and whether the model was left alone."""
    made: list[Any] = []
    begin, kind, message = time.monotonic(), "", ""
    compiled = importlib.import_module("fxzero.compile").TrainStep
    build = compiled.__init__

    def build_and_remember(self: Any, model: nn.Module, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        made.append((model, optimizer, list(model.parameters())))
        build(self, model, optimizer, *args, **kwargs)

    with mock.patch.object(compiled, "__init__", build_and_remember):
        try:
            scenario(rank)
        except Exception as error:
            kind, message = type(error).__name__, str(error)
    model, optimizer, parameters = made[-1]
    same = all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    return {
        "kind": kind,
        "message": message,
        "seconds": time.monotonic() - begin,
        "untouched": same and not optimizer.state,
    }


def run_scenarios(folder: Path) -> None:
    """All scenarios, one after the other, in the same processes: none may spoil the next."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, found = dist.get_rank(), {}
    for scenario in SCENARIOS:
        ends: list[Any] = [None] * RANKS
        dist.all_gather_object(ends, observe(scenario, rank))
        found[scenario.__name__] = ends
        if rank == 0:
            (folder / "scenarios.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def die_in_backward(step: StepGraph) -> int:
    """Rank 1 ends without a word in the middle of a step."""
    calls = [0]

    def die(gradient: torch.Tensor) -> torch.Tensor:
        if not compat.is_fake(gradient):
            calls[0] += 1
            if calls[0] == DIES_AT and dist.get_rank() == 1:
                os._exit(9)
        return gradient

    gradient = list(step.gradients().values())[-1]
    editor = Editor(step, phase="backward")
    with editor.after(gradient):
        call = editor.call(die, gradient)
    for user in [user for user in gradient.users if user is not call]:
        user.replace_input_with(gradient, call)
    return 1


def run_until_death(folder: Path) -> None:
    """Train, save, and write down how the end of the other rank looks from here."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    torch.manual_seed(0)
    model = Smooth()
    found: dict[str, Any] = {"steps": 0}
    with planted(die_in_backward, verified=False):
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2), fxzero.Plan(zero=3))
        for number in range(2 * DIES_AT):
            begin = time.monotonic()
            try:
                step(*tokens(torch.Generator().manual_seed(number)))
            except Exception as error:
                found |= {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - begin}
                break
            found["steps"] += 1
            if found["steps"] == SAVED_AT:
                dcp.save(step.state_dict(), checkpoint_id=folder / "checkpoint")
                whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
                torch.save(whole, folder / f"whole{dist.get_rank()}.pt")
    (folder / f"survivor{dist.get_rank()}.json").write_text(json.dumps(found))
    os._exit(0)  # not through the destructors of a group that has lost a member


# ---- tests


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """How each scenario ended, by rank."""
    folder = tmp_path_factory.mktemp("mismatch")
    try:
        launch("tests.numerics.test_mismatch", "scenarios", str(folder), ranks=RANKS, timeout_s=120)
    except AssertionError as error:
        print(error)
    path = folder / "scenarios.json"
    return json.loads(path.read_text()) if path.exists() else {}


DIFFERENCES = {
    other_width: rf"line \d+ of the program: .*parameter embed\.weight \[{VOCAB}, 8\].*rank 1 has .*\[{VOCAB}, 10\]",
    other_stage: r"^Plan.zero: .* rank 0 has zero=3, got rank 1 has zero=2; give every rank the same plan$",
    other_buckets: r"^Plan.bucket_bytes: .* rank 0 has bucket_bytes=1048576, got rank 1 has bucket_bytes=0; give",
    other_pass_order: r"line \d+ of the program: .*pass place_updates.*rank 1 has 'pass gather_in_place",
    other_optimizer: r"line \d+ of the program: .*optimizer embed\.weight:",
    other_dtype: r"line \d+ of the program: .*torch\.float32.*rank 1 has .*torch\.bfloat16",
}


@pytest.mark.parametrize("scenario", MISMATCHES, ids=lambda s: s.__name__)
def test_all_ranks_name_the_first_line_that_differs(scenario: Callable[[int], None], ends: Any) -> None:
    for found in ends[scenario.__name__]:
        assert found["kind"] == "RankMismatchError", found
        assert found["seconds"] < 20
        assert found["untouched"]
    messages = {found["message"] for found in ends[scenario.__name__]}
    assert len(messages) == 1
    assert re.search(DIFFERENCES[scenario], messages.pop())


@pytest.mark.parametrize(("scenario", "culprit"), [(not_captured, ODD), (not_captured_by_first, 0)])
def test_a_rank_that_cannot_capture_ends_the_others(scenario: Callable[[int], None], culprit: int, ends: Any) -> None:
    for rank, found in enumerate(ends[scenario.__name__]):
        assert found["kind"] == ("CaptureError" if rank == culprit else "RankMismatchError"), found
        assert rank == culprit or found["message"].startswith(f"rank {culprit}: expected every rank to reach")
        assert "hidden.sum() > 0" in found["message"]
        assert found["seconds"] < 20
        assert found["untouched"]


@pytest.mark.parametrize(("scenario", "missing"), [(absent, ODD), (first_absent, 0)])
def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_plan_says(
    scenario: Callable[[int], None], missing: int, ends: Any
) -> None:
    for rank, found in enumerate(ends[scenario.__name__]):
        if rank == missing:
            assert found["kind"] == ""
            continue
        assert found["kind"] == "RankMismatchError", found
        assert f"ranks {missing}: " in found["message"] and "no word from them" in found["message"]
        assert TIMEOUT_S - 1 < found["seconds"] < TIMEOUT_S + 15
        assert found["untouched"]


def test_batches_of_other_lengths_are_no_mismatch(ends: Any) -> None:
    assert [found["kind"] for found in ends["other_batch"]] == [""] * RANKS


def test_an_optimizer_that_ranks_cannot_shard_is_refused_before_anything_is_sharded(ends: Any) -> None:
    for found in ends["state_from_whole_values"]:
        assert found["kind"] == "CaptureError" and found["untouched"], found
        assert "ScaledByNorms.param_groups[0], state 'row'" in found["message"]


@pytest.mark.parametrize("scenario", [other_known_program, other_new_program])
def test_ranks_that_run_different_programs_are_stopped(scenario: Callable[[int], None], ends: Any) -> None:
    """Each of the two programs may have been agreed upon before; mixed, they would average other weights' gradients."""
    for found in ends[scenario.__name__]:
        assert found["kind"] == "RankMismatchError", found
        assert re.search(r"line \d+ of the program: .*rank 1 has ", found["message"])
        assert found["seconds"] < 20


def test_a_rank_that_fails_after_the_first_step_ends_the_others_and_votes_stay_paired(ends: Any) -> None:
    for rank, found in enumerate(ends["fails_later"]):
        assert found["kind"] == ("CaptureError" if rank == ODD else "RankMismatchError"), found
        assert "missing 1 required positional argument: 'y'" in found["message"]
        assert found["seconds"] < 20


@pytest.fixture(scope="module")
def grave(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks trained, until one of them died.

    Started by hand: torchrun itself would end the survivor.
    """
    folder = tmp_path_factory.mktemp("grave")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = rank_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.numerics.test_mismatch", "death", str(folder)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=common | {"RANK": str(rank)}, start_new_session=True)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            process.wait(timeout=90)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert ranks[1].returncode == 9, "rank 1 was to die"
    return folder


def test_a_rank_that_dies_ends_the_others_with_an_error(grave: Path) -> None:
    found = json.loads((grave / "survivor0.json").read_text())
    assert found["steps"] == DIES_AT - 1
    assert found["error"]
    assert found["seconds"] < GROUP_TIMEOUT_S + 5


def test_the_last_checkpoint_of_a_run_that_died_loads(grave: Path) -> None:
    model = Smooth()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2), fxzero.Plan())
    values = step.state_dict()
    dcp.load(values, checkpoint_id=grave / "checkpoint")
    step.load_state_dict(values)
    saved = torch.load(grave / "whole0.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    assert {state["step"].item() for state in step.optimizer.state.values()} == {SAVED_AT}
    assert torch.isfinite(step(*tokens(torch.Generator())))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"scenarios": run_scenarios, "death": run_until_death}[sys.argv[1]](Path(sys.argv[2]))
