"""Rates of ops and products: calls take turns, and what was planted is found again."""

import itertools
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from fxzero.calibrate import matrix_ops, memory_ops, timing
from fxzero.calibrate.matrix_ops import Case
from fxzero.calibrate.timing import Clock
from fxzero.cost.hardware import MatrixRate

CPU = torch.device("cpu")


@dataclass
class Machine:
    """Calls that take so long, by a clock that only they move."""

    now: float = 0.0
    numbers: list[int] = field(default_factory=list)
    made: list["weakref.ref[torch.Tensor]"] = field(default_factory=list)

    def call(self, seconds: float):
        def run(number: int) -> torch.Tensor:
            self.now += seconds
            self.numbers.append(number)
            result = torch.empty(1)
            self.made.append(weakref.ref(result))
            return result

        return run


@pytest.fixture(autouse=True)
def _rounds_take_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or less, by the clock that says for how long calls take turns, however busy the machine is."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 1e-3 * next(ticks), thread_time=time.thread_time)
    monkeypatch.setattr(timing, "time", clock)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(Clock, "_now", property(lambda self: lambda: found.now))
    return found


def test_calls_in_turns_are_told_apart(machine: Machine) -> None:
    calls = [machine.call(seconds) for seconds in (1.0, 3.0, 0.25)]
    assert Clock(CPU, turns_s=0.05).in_turns(calls) == [1.0, 3.0, 0.25]
    rounds = len(machine.numbers) // (len(calls) * timing.IN_A_ROW)
    assert rounds > 2 and len(machine.numbers) == rounds * len(calls) * timing.IN_A_ROW
    assert len(set(machine.numbers)) == len(machine.numbers)  # each call takes turns with inputs
    assert [ref() is not None for ref in machine.made] == [False] * len(machine.made)


def test_what_calls_make_lives_on_for_a_while(machine: Machine) -> None:
    alive: list[int] = []

    def look(number: int) -> None:
        alive.append(sum(ref() is not None for ref in machine.made))

    Clock(CPU, turns_s=0.05).in_turns([*[machine.call(1.0)] * 3, look])
    assert timing.IN_A_ROW < max(alive) <= timing.KEPT


def test_turns_come_in_another_order_each_time() -> None:
    order: list[str] = []
    calls = [lambda number, name=name: order.append(name) for name in "abc"]
    Clock(CPU, turns_s=1.0).in_turns(calls)
    turns = order[3 * timing.IN_A_ROW :: timing.IN_A_ROW]
    assert len({tuple(turns[at : at + 3]) for at in range(0, 60, 3)}) == 6
    assert Counter(order[3 * timing.IN_A_ROW :])["a"] == len(turns)  # a few of the same in a row


def test_rates_of_memory_are_found_again() -> None:
    cases = memory_ops.memory_cases(CPU)
    rates, rows = memory_ops.op_rates({case: 2e-5 + case.moved / 5e9 for case in cases if case.name})
    for rate in rates.values():
        assert rate.overhead_s == pytest.approx(2e-5, rel=0.5)  # the smallest ops move a few bytes, too
        assert rate.bytes_s == pytest.approx([5e9] * len(rate.bytes_s), rel=0.2)
    assert max(abs(row.residual) for row in rows) < 0.1
    views = {case: 3e-6 for case in cases if not case.name}
    assert memory_ops.overheads({case: 2e-5 for case in cases if case.name} | views) == pytest.approx((2e-5, 3e-6))


def test_all_cases_run() -> None:
    for case in memory_ops.memory_cases(CPU, fast=True):
        case.call(0)
    for product in matrix_ops.matrix_cases(CPU, fast=True):
        product.call(0)


def test_a_saturating_curve_is_found_again() -> None:
    rate = MatrixRate(1.0, 64.0)
    cases = [Case("matmul", "", 1e9, smallest, lambda _: None) for smallest in (16, 64, 256, 1024)]
    found = matrix_ops._fit([(case, case.flops / (2e11 * rate.part(case.smallest))) for case in cases])
    assert found == pytest.approx((2e11, 64.0))
    assert matrix_ops._fit([(case, 1e-3 * case.smallest) for case in cases])[1] == 0.0
