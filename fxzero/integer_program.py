"""Integer programs, solved by HiGHS through `scipy.optimize.milp`: deterministic, bounded by counts, not by a clock."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Solution:
    """What a search has found.

    Args:
        values: of the variables; None where none were found.
        bound: what any values cost at least.
    """

    values: Any
    bound: float


def solve(cost: Any, rows: Sequence[tuple[Any, Any, Any]], **options: Any) -> Any:
    """The values that make cost @ x smallest; None where none were found.

    Args:
        cost, rows, options: as of `search`.
    """
    return search(cost, rows, **options).values


def search(
    cost: Any,
    rows: Sequence[tuple[Any, Any, Any]],
    *,
    integral: Any,
    upper: Any,
    lower: Any = 0,
    max_nodes: int,
    gap: float,
) -> Solution:
    """The values that make cost @ x smallest, from `lower` to `upper`, and a bound for it.

    Args:
        cost: of each variable.
        rows: (matrix, lower bounds, upper bounds) of constraints.
        integral: 1 for each variable that must be an integer.
        upper, lower: bounds of the variables.
        max_nodes: of the search.
        gap: by what fraction the answer may be worse than the best.
    """
    # Imported here: it takes half a second, and only plans with a decision need it.
    from scipy.optimize import Bounds, LinearConstraint, milp

    with _stdout_as_stderr():
        solved = milp(
            cost,
            constraints=[LinearConstraint(*row) for row in rows],
            integrality=integral,
            bounds=Bounds(lower, upper),
            options={"mip_rel_gap": gap, "node_limit": max_nodes},
        )
    bound = getattr(solved, "mip_dual_bound", None)
    if bound is None:  # no integers: what was found is the least
        bound = solved.fun
    return Solution(solved.x, -math.inf if bound is None else float(bound))


@contextlib.contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """HiGHS prints lines of its own, whatever its options say; a command's output must not have them."""
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError):  # closed
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
