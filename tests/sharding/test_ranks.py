"""Models split over tp by real ranks over gloo, with ZeRO over dp beside it, trained as one rank trains them.

`torchrun --nproc-per-node 4 -m tests.sharding.worker out.json machine.toml all` runs
all eight models at every stage of ZeRO; here a few of each.
"""

import json
from typing import Any

import pytest

from tests.numerics.worker import launch
from tests.sharding.machines import free_network_file

TOLERANCE = 1e-5
TIMEOUT_S = 300
FEW = {
    2: ["llama dp=1 tp=2 zero=0"],
    4: ["gpt2 dp=2 tp=2 zero=1", "mixtral dp=2 tp=2 zero=2", "llama dp=2 tp=2 zero=3", "qwen3 dp=1 tp=4 zero=0"],
}

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(2 * TIMEOUT_S)]
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ranks found, by case."""
    folder = tmp_path_factory.mktemp("split")
    results = {}
    for ranks in FEW:
        path = folder / f"{ranks}.json"
        launch("tests.sharding.worker", str(path), free_network_file(folder), ranks=ranks, timeout_s=TIMEOUT_S)
        results |= json.loads(path.read_text())
    return results


@pytest.mark.parametrize("case", [case for cases in FEW.values() for case in cases])
def test_ranks_train_a_split_model_as_one_rank_trains_the_model(case: str, found: dict[str, Any]) -> None:
    assert found[case]["split"] > found[case]["parameters"] // 2
    assert found[case]["loss_difference"] <= TOLERANCE
    assert found[case]["difference"] <= TOLERANCE
