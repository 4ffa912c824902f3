"""Real processes over gloo: bit-equal to DDP with two ranks, within 1e-6 with four; each planted fault is seen."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.worker import Job, cases, four_ranks, launch, two_ranks

pytestmark = pytest.mark.multirank

Results = dict[str, list[dict[str, Any]]]


def run(which: str, folder: Path, *, ranks: int, timeout_s: float) -> tuple[Results, str]:
    """Results of one start by job, and why it ended early, if it did."""
    path, failure = folder / "results.json", ""
    try:
        launch("tests.numerics.worker", which, str(path), ranks=ranks, timeout_s=timeout_s)
    except AssertionError as error:
        failure = str(error)
    return (json.loads(path.read_text()) if path.exists() else {}), failure


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    return run("two_ranks", tmp_path_factory.mktemp("two"), ranks=2, timeout_s=280)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    return run("four_ranks", tmp_path_factory.mktemp("four"), ranks=4, timeout_s=280)


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


@pytest.mark.parametrize("job", two_ranks(), ids=lambda job: job.name)
def test_two_ranks_are_bit_equal_to_ddp(job: Job, two: tuple[Results, str]) -> None:
    check(job, two)


@pytest.mark.parametrize("job", four_ranks(), ids=lambda job: job.name)
def test_four_ranks_are_close_to_ddp(job: Job, four: tuple[Results, str]) -> None:
    check(job, four)
