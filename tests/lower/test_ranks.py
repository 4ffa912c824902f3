"""Two ranks over gloo: compiled regions train as eager calls do, and ranks share the work of compiling them."""

from typing import Any

import pytest

from fxzero import compat_inductor
from tests.lower.worker import PLANS
from tests.numerics.worker import launch_for_results

pytestmark = [
    pytest.mark.multirank,
    pytest.mark.skipif(compat_inductor.find_cpp_compiler() is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launch_for_results("tests.lower.worker", tmp_path_factory.mktemp("ranks"), ranks=2, timeout_s=600)


@pytest.mark.parametrize("name", PLANS)
def test_two_ranks_train_as_by_the_eager_lowering(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found[name]:
        assert rank["loss"] < 1e-5
        assert rank["parameters"] < 1e-4
        assert not rank["equal"], "nothing was compiled"
    assert found[name][0]["distinct"] == found[name][1]["distinct"]
