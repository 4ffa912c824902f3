"""The cheapest way for each unit of a problem: an integer program, and the bound of its relaxation.

    minimise    sum of seconds x[u, s]  +  sum of seconds y[v, a, q]
    one way     sum over s of x[u, s] = 1
    offered     x of a reader's ways that ask q  <=  x of the ways of v's unit that yield q  +  sum over a of y[v, a, q]
    source      y[v, a, q]  <=  x of the ways of v's unit that yield a
    state       x of the ways of an input that lie as q  <=  what the value that goes out for it offers as q

x says which way a unit takes, y that a value is converted from a to q. y needs no integrality: costs are positive.
Source: Alpa (Zheng et al., 2022), section 4, where conversions are paid by edge; here by value, as they are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from fxzero.graph.axis_placement import REPLICATED, Placement
from fxzero.integer_program import solve as solve_program
from fxzero.sharding.problem import Problem, Unit, Value
from fxzero.sharding.strategy import Strategy

_MAX_NODES = 2000
_RELATIVE_GAP = 1e-4
_SURE = 0.999  # of a way, in an answer of the relaxation
_CLOSE = 2e-3  # of the bound: an answer that is so near it is not made better


@dataclass(frozen=True)
class Answer:
    """How each call is made.

    Args:
        chosen: number of a unit -> its way.
        seconds: what it costs by the model.
        bound_s: what any answer costs at least.
        problem: that was solved.
    """

    chosen: tuple[Strategy, ...]
    seconds: float
    bound_s: float
    problem: Problem

    def strategy(self, node: fx.Node) -> Strategy:
        """The way of a call or an input."""
        return self.chosen[self.problem.of_node[node]]


def solve(problem: Problem) -> Answer:
    """The cheapest answer to the problem of a step and an axis."""
    return _Program(problem).solve()


class _Program:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cost: list[float] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.first: list[int] = []  # column of a unit's first way: its leader's, where it follows one
        for unit in problem.units:
            self._add_unit(unit)
        self.num_ways = len(self.cost)
        for value in problem.values:
            self._add_value(value)
        self._add_results()

    def _add_unit(self, unit: Unit) -> None:
        seconds = [one * unit.count for one in unit.seconds]
        if unit.leader >= 0:
            start = self.first[unit.leader]
            for column, one in enumerate(seconds, start):
                self.cost[column] += one
            self.first.append(start)
            return
        start = len(self.cost)
        self.first.append(start)
        self.cost += seconds
        self.rows.append(({start + i: 1.0 for i in range(len(seconds))}, 1.0, 1.0))

    def _ways(self, unit: int) -> Iterable[tuple[int, Strategy]]:
        return enumerate(self.problem.units[unit].strategies, self.first[unit])

    def _yields(self, unit: int, output: int) -> dict[Placement, list[int]]:
        """Placement of an output -> the ways that yield it."""
        found: dict[Placement, list[int]] = {}
        for column, strategy in self._ways(unit):
            placement = strategy.outputs[output]
            assert placement is not None
            found.setdefault(placement, []).append(column)
        return found

    def _add_value(self, value: Value) -> None:
        native = self._yields(value.unit, value.output)
        asked: list[dict[Placement, list[int]]] = []
        for reader, index in value.readers:
            by: dict[Placement, list[int]] = {}
            for column, strategy in self._ways(reader):
                by.setdefault(strategy.inputs[index], []).append(column)
            asked.append(by)
        if value.kept:
            self._pay_for_keeping(value, native)
        made = self._conversions(value, native, {placement for by in asked for placement in by})
        for by in asked:
            for placement, columns in by.items():
                self._offer(dict.fromkeys(columns, -1.0), placement, native, made)

    def _pay_for_keeping(self, value: Value, native: dict[Placement, list[int]]) -> None:
        """What waits for backward costs as if it were moved once: a smaller part is better, if all else is equal."""
        seconds = value.kept * value.count / self.problem.hardware.memory_bytes_s
        for placement, columns in native.items():
            for column in columns:
                self.cost[column] += seconds * placement.share(self.problem.ranks)

    def _conversions(
        self, value: Value, native: dict[Placement, list[int]], wanted: set[Placement]
    ) -> dict[Placement, list[int]]:
        """Placement -> the columns of the conversions that make it."""
        made: dict[Placement, list[int]] = {}
        for after in sorted(wanted, key=str):
            for before, columns in native.items():
                if before == after:
                    continue
                seconds = self.problem.conversion_seconds(value, before, after)
                if math.isinf(seconds):
                    continue
                column = len(self.cost)
                self.cost.append(seconds * value.count)
                made.setdefault(after, []).append(column)
                self.rows.append(({**dict.fromkeys(columns, 1.0), column: -1.0}, 0.0, math.inf))
        return made

    def _offer(
        self,
        taken: dict[int, float],
        placement: Placement,
        native: dict[Placement, list[int]],
        made: dict[Placement, list[int]],
    ) -> None:
        row = dict(taken)
        for column in (*native.get(placement, ()), *made.get(placement, ())):
            row[column] = row.get(column, 0.0) + 1.0
        self.rows.append((row, 0.0, math.inf))

    def _add_results(self) -> None:
        for unit, output, lies_as in sorted(self.problem.results):
            native = self._yields(unit, output)
            wanted = {REPLICATED: []} if lies_as < 0 else self._yields(lies_as, 0)
            value = self._result_value(unit, output)
            made = self._conversions(value, native, set(wanted))
            for placement, columns in wanted.items():
                if lies_as == unit:
                    continue
                if columns:
                    self._offer(dict.fromkeys(columns, -1.0), placement, native, made)
                    continue
                row = dict.fromkeys((*native.get(placement, ()), *made.get(placement, ())), 1.0)
                self.rows.append((row, 1.0, math.inf))

    def _result_value(self, unit: int, output: int) -> Value:
        shape, itemsize = self.problem.result_shapes[(unit, output)]
        return Value(unit, output, shape, itemsize, 0, (), self.problem.units[unit].count)

    def solve(self) -> Answer:
        from scipy.sparse import csr_array  # imported here: it takes half a second

        cost = np.array(self.cost)
        scale = cost.max() or 1.0
        where = [(number, column) for number, (row, _, _) in enumerate(self.rows) for column in row]
        entries = [entry for row, _, _ in self.rows for entry in row.values()]
        matrix = csr_array((entries, tuple(np.array(where).T)), shape=(len(self.rows), len(cost)))
        bounds = (np.array([low for _, low, _ in self.rows]), np.array([high for _, _, high in self.rows]))
        integral = np.zeros(len(cost))
        ask: dict[str, Any] = {"max_nodes": _MAX_NODES, "gap": _RELATIVE_GAP, "integral": integral}

        def within(lower: Any, upper: Any) -> Any:
            return solve_program(cost / scale, [(matrix, *bounds)], lower=lower, upper=upper, **ask)

        zeros, ones = np.zeros(len(cost)), np.ones(len(cost))
        relaxed = within(zeros, ones)
        assert relaxed is not None, "every rank doing everything is always an answer"
        bound_s = float(cost @ relaxed)
        found = self._rounded(relaxed, within)
        if found is None or cost @ found > bound_s * (1 + _CLOSE):
            integral[: self.num_ways] = 1
            exact = within(zeros, ones)
            found = exact if found is None or (exact is not None and cost @ exact < cost @ found) else found
        chosen = tuple(
            unit.strategies[int(np.argmax(found[start : start + len(unit.strategies)]))]
            for unit, start in zip(self.problem.units, self.first, strict=True)
        )
        return Answer(chosen, float(cost @ found), min(bound_s, float(cost @ found)), self.problem)

    def _rounded(self, relaxed: Any, within: Callable[[Any, Any], Any]) -> Any:
        """An answer from one of the relaxation: what is nearly whole is fixed, and the rest asked for again.

        Costs a few relaxations; None where what was fixed does not fit together.
        """
        lower, upper = np.zeros(len(relaxed)), np.ones(len(relaxed))
        units = zip(self.problem.units, self.first, strict=True)
        open_units = [(start, len(unit.strategies)) for unit, start in units if unit.leader < 0]
        found = relaxed
        while open_units and found is not None:
            ways = [(start, count, int(np.argmax(found[start : start + count]))) for start, count in open_units]
            ways.sort(key=lambda way: (-found[way[0] + way[2]], way[0]))
            sure = sum(found[start + way] > _SURE for start, _, way in ways)
            taken = ways[: sure + max(1, (len(ways) - sure) // 4)]
            for start, count, way in taken:
                upper[start : start + count] = 0
                lower[start + way] = upper[start + way] = 1
            open_units = sorted((start, count) for start, count, _ in ways[len(taken) :])
            found = within(lower, upper)
        return found
