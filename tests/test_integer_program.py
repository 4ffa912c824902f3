"""Solving is silent on stdout, whatever the library prints."""

import os
from unittest import mock

import numpy as np
import pytest
import scipy.optimize

from fxzero.integer_program import search, solve


def test_an_answer_and_none() -> None:
    ask = {"integral": np.ones(2), "upper": 1, "max_nodes": 10, "gap": 0.0}
    assert list(solve(np.array([1.0, 2.0]), [(np.ones((1, 2)), 1, 1)], **ask)) == [1, 0]
    assert solve(np.array([1.0, 2.0]), [(np.ones((1, 2)), 3, np.inf)], **ask) is None


def test_a_bound_is_what_integers_cost_at_least() -> None:
    """Of 2 x + 2 y >= 3, three halves are enough for fractions, two for integers."""
    ask = {"upper": 1, "max_nodes": 10, "gap": 0.0}
    rows = [(np.full((1, 2), 2.0), 3, np.inf)]
    assert search(np.ones(2), rows, integral=np.zeros(2), **ask).bound == pytest.approx(1.5)
    assert search(np.ones(2), rows, integral=np.ones(2), **ask).bound == pytest.approx(2)
    assert search(np.ones(2), [(np.ones((1, 2)), 3, np.inf)], integral=np.ones(2), **ask).values is None


def test_what_the_library_prints_is_no_part_of_a_commands_output(capfd: pytest.CaptureFixture[str]) -> None:
    real = scipy.optimize.milp

    def loud(*args: object, **kwargs: object) -> object:
        os.write(1, b"HighsMipSolverData\n")
        return real(*args, **kwargs)

    with mock.patch.object(scipy.optimize, "milp", loud):
        solve(np.ones(1), [(np.ones((1, 1)), 1, 1)], integral=np.ones(1), upper=1, max_nodes=1, gap=0.0)
    print("after")
    out, err = capfd.readouterr()
    assert (out, err) == ("after\n", "HighsMipSolverData\n")
