"""Steps cut into regions, without a compiler: state and losses are bit-equal to the plain loop's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxzero
from tests.lower.interpreted import interpreted
from tests.numerics.models import all_cases, clipped_cases, rarer_cases
from tests.numerics.reference import first_difference, num_programs, run_compiled, run_plain

aten = torch.ops.aten
CASES = {**all_cases(), **rarer_cases(), "clip_norm2": clipped_cases()["clip_norm2"]}
PLAN = fxzero.Plan(lowering="inductor")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regions_compute_what_the_plain_loop_does(case: Any) -> None:
    with interpreted() as store:
        got, step = run_compiled(case, PLAN)
    difference = first_difference(run_plain(case), got)
    assert difference is None, str(difference)
    assert num_programs(step) == case.captures
    assert store.texts, "no region"


def shifted(op: Any, by: float) -> Callable[[torch.fx.GraphModule], None]:
    """An op's results are off by a little."""

    def edit(module: torch.fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=op):
            with module.graph.inserting_after(node):
                moved = module.graph.call_function(aten.add.Tensor, (node, by))
            node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)

    return edit


@pytest.mark.parametrize("op", [aten.lerp.Scalar, aten.sqrt.default], ids=str)
def test_a_fault_in_a_region_is_seen(op: Any) -> None:
    case = CASES["adamw"]
    with interpreted(shifted(op, 1e-6)):
        got, _ = run_compiled(case, PLAN)
    assert first_difference(run_plain(case), got) is not None
