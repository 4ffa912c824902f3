"""Two ranks over gloo: a model that fxzero.shard has sharded trains through the door as under FSDP2."""

import re
from typing import Any

import pytest

from tests.backend.shard_worker import CASES
from tests.numerics.worker import launch_for_results

pytestmark = pytest.mark.multirank

# its weight is read in two graphs, so two means are added: elsewhere the sum of both is averaged
ROUNDED = {"graph breaks, tied": 1e-6}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launch_for_results("tests.backend.shard_worker", tmp_path_factory.mktemp("shard"), ranks=2, timeout_s=300)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_trains_as_under_fsdp2(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found[name]:
        assert "error" not in rank, rank["error"]
        assert rank["losses"] <= ROUNDED.get(name, 0)
        assert rank["parameters"] <= ROUNDED.get(name, 0)
        assert rank["names"]
        unused = {"unused.weight", "unused.bias", "frozen.weight", "frozen.bias"}
        assert set(rank["without gradient"]) == (unused if "unused.weight" in rank["of"] else set())


def test_what_it_saves_plain_and_fsdp2_models_load(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found["checkpoints"]:
        assert "error" not in rank, rank["error"]
        assert rank["plain"] and rank["fsdp2"] and rank["sharded"]
        assert rank["sharded goes on"] == rank["fsdp2 goes on"]


MISMATCH = "RankMismatchError: "
TOLD = {
    "plans": (f"{MISMATCH}Plan.prefetch: .*rank 0 has prefetch=1, got rank 1 has prefetch=2",) * 2,
    "models": (MISMATCH + r"line \d+ .*parameter 1.weight", MISMATCH + r"line \d+ .*parameter 1.weight"),
    "one_cannot_shard": (MISMATCH + r"rank 1: .*_flat_weights", r"CaptureError: .*_flat_weights"),
    "options": (f"{MISMATCH}Plan.prefetch: .*rank 0 has prefetch=2, got rank 1 has prefetch=3",) * 2,
    "one_contradicts": (
        MISMATCH + r"rank 1: .*Plan.zero: expected 3",
        r"PlanError: Plan.zero: expected 3, as fxzero.shard was given, got 0 from torch.compile",
    ),
    "one_cannot_compile": (MISMATCH + r"rank 1: .*weight", r"BackendCompilerFailed: .*a DTensor that to_local reads"),
    "one_skips_backward": (MISMATCH + r"line 1 .*backward of a", MISMATCH + r"line 1 .*forward of a"),
}


@pytest.mark.parametrize("name", TOLD)
def test_ranks_that_differ_are_told_and_do_not_wait(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for rank, expected in zip(found["differing"], TOLD[name], strict=True):
        assert "error" not in rank, rank["error"]
        assert re.match(expected, rank[name], re.DOTALL), rank[name]
