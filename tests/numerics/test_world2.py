"""Real processes over gloo: bit-equal to DDP with two ranks, within 1e-6 with four; each planted fault is seen."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.worker import Job, cases, features, four_ranks, launch, optimizers, scheduled

pytestmark = pytest.mark.multirank

Results = dict[str, list[dict[str, Any]]]


def run(which: str, folder: Path, *, ranks: int, timeout_s: float = 800) -> tuple[Results, str]:
    """Results of one start by job, and why it ended early, if it did."""
    path, failure = folder / "results.json", ""
    try:
        launch("tests.numerics.worker", which, str(path), ranks=ranks, timeout_s=timeout_s)
    except AssertionError as error:
        failure = str(error)
    return (json.loads(path.read_text()) if path.exists() else {}), failure


@pytest.fixture(scope="module")
def optimizer_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    return run("optimizers", tmp_path_factory.mktemp("optimizers"), ranks=2)


@pytest.fixture(scope="module")
def feature_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    return run("features", tmp_path_factory.mktemp("features"), ranks=2)


@pytest.fixture(scope="module")
def four_rank_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    return run("four_ranks", tmp_path_factory.mktemp("four"), ranks=4)


@pytest.fixture(scope="module")
def scheduled_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    return run("scheduled", tmp_path_factory.mktemp("scheduled"), ranks=2)


def check(job: Job, outcome: tuple[Results, str]) -> None:
    """A job agrees with DDP on every rank; or, with a fault in it, does not."""
    results, failure = outcome
    assert job.name in results, f"not run: {failure}"
    for rank, found in enumerate(results[job.name]):
        if job.fault is None:
            assert not found["error"], f"rank {rank}: {found['error']}"
            assert not found["difference"], f"rank {rank}: {found['difference']}"
            assert found["programs"] == cases()[job.case].captures
    if job.fault is not None:
        errors = [found["error"] for found in results[job.name]]
        assert all(not error or error.startswith("VerifyError") for error in errors), errors
        assert any(found["difference"] or found["error"] for found in results[job.name]), "the fault was not seen"


@pytest.mark.parametrize("job", optimizers(), ids=lambda job: job.name)
def test_two_ranks_are_bit_equal_to_ddp(job: Job, optimizer_results: tuple[Results, str]) -> None:
    check(job, optimizer_results)


@pytest.mark.parametrize("job", features(), ids=lambda job: job.name)
def test_features_and_options_are_bit_equal_to_ddp(job: Job, feature_results: tuple[Results, str]) -> None:
    check(job, feature_results)


@pytest.mark.parametrize("job", scheduled(), ids=lambda job: job.name)
def test_schedules_by_cost_are_bit_equal_to_ddp(job: Job, scheduled_results: tuple[Results, str]) -> None:
    check(job, scheduled_results)


@pytest.mark.parametrize("job", four_ranks(), ids=lambda job: job.name)
def test_four_ranks_are_close_to_ddp(job: Job, four_rank_results: tuple[Results, str]) -> None:
    check(job, four_rank_results)
