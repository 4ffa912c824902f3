"""Which form of attention is taken over sp: the one that costs least by the model of costs, for other sizes another."""

from __future__ import annotations

import math

import pytest

from fxzero.sharding.attention import FORMS
from tests.benchmarks.split_attention import measured

# tokens, heads, heads of keys and values, ranks, causal -> what is chosen on H100s in nodes of eight
CHOSEN = {
    (32768, 32, 8, 8, True): "heads",  # half the work of tokens under a mask
    (131072, 20, 4, 8, True): "ring",  # ranks do not divide heads; messages are hidden by products
    (131072, 20, 20, 32, True): "gather",  # between nodes, where a ring has one link in use of eight
    (131072, 32, 8, 32, False): "gather",  # no mask: as much work, and keys are less than queries
}


@pytest.mark.parametrize(("case", "expected"), CHOSEN.items(), ids=str)
def test_the_form_that_costs_least_is_chosen(case: tuple[int, int, int, int, bool], expected: str) -> None:
    *sizes, causal = case
    found = measured(*sizes, causal=causal)
    seconds = {form: math.inf if found[form] is None else found[form] for form in FORMS}
    assert found["chosen"] == expected == min(seconds, key=lambda form: seconds[form])
    assert found["auto"] == pytest.approx(seconds[expected], rel=2e-3)
    assert (seconds["heads"] == math.inf) == (case[1] % case[3] != 0)
