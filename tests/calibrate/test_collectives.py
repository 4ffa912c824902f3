"""Rates of collectives: found again from what was planted, and counted as estimates count them."""

import json
from typing import Any

import pytest
import torch

from fxzero.calibrate import collectives
from fxzero.calibrate.beside_compute import BesideCompute
from fxzero.calibrate.collectives import collective_rates, steps_and_bytes
from fxzero.cost.communication import Layout, collective_seconds
from fxzero.cost.hardware import Hardware
from fxzero.errors import HardwareError


def test_ranks_that_fail_are_an_error_with_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode, stderr = 1, "RuntimeError: no free port"

    monkeypatch.setattr(collectives.subprocess, "run", lambda *args, **kwargs: Failed())
    with pytest.raises(HardwareError, match=r"calibration over 2 ranks: expected .* no free port"):
        collectives.measure(2, threads=1)


def timed(latency_s: float, rate: float, kinds: dict[str, tuple[float, float]], ranks: int) -> dict[str, Any]:
    """Medians as they would be on a machine of these figures: kind -> (overhead, efficiency)."""
    seconds: dict[str, Any] = {}
    for kind, (overhead_s, efficiency) in kinds.items():
        seconds[kind] = {}
        for size in (2**14, 2**20, 2**24):
            steps, moved = steps_and_bytes(kind, size, ranks)
            total = overhead_s + steps * latency_s + moved / rate / efficiency
            seconds[kind][str(size)] = {"total": total, "launch": 1e-5}
    return {"ranks": ranks, "seconds": seconds, "steps": {}, "slowdown": 1.25}


def test_figures_of_collectives_are_found_again() -> None:
    kinds = {"all_gather": (5e-5, 0.5), "all_reduce": (1e-4, 0.8), "send_recv": (0.0, 1.0)}
    found = collective_rates(json.loads(json.dumps(timed(1e-4, 2e9, kinds, 4))))
    assert found.link.latency_s == pytest.approx(1e-4) and found.link.bytes_s == pytest.approx(2e9)
    assert found.beside == BesideCompute(1e-5, slowdown=1.25)
    for kind, (overhead_s, efficiency) in kinds.items():
        assert found.rates[kind].efficiency == pytest.approx([efficiency] * 3)
        assert found.rates[kind].overhead_s == pytest.approx(overhead_s, abs=1e-9)
    assert all(abs(row.residual) < 1e-6 for row in found.rows)


def test_a_size_of_its_own_rate_has_it() -> None:
    planted = timed(1e-4, 2e9, {"all_gather": (0.0, 1.0), "send_recv": (0.0, 1.0)}, 2)
    slow = planted["seconds"]["all_gather"]["16777216"]
    slow["total"] *= 2
    found = collective_rates(planted)
    _, middle, large = found.rates["all_gather"].efficiency
    assert large < 0.6 and middle > 0.9
    by_case = {(row.what, row.case): row for row in found.rows}
    assert abs(by_case["collectives.all_gather", "16,777,216 bytes over 2"].residual) < 0.01
    planted["seconds"]["send_recv"]["1048576"]["total"] = 1.0  # the twin: no message takes longer than a larger one
    assert max(abs(row.residual) for row in collective_rates(planted).rows) > 0.9
    assert collective_rates(planted).rates["send_recv"].efficiency[1] == pytest.approx(1 / 16)  # as long as 16 MiB


def test_time_that_falls_with_size_gives_figures_that_can_be() -> None:
    found = timed(1e-4, 2e9, {"all_gather": (0.0, 1.0)}, 2)
    for number, times in enumerate(found["seconds"]["all_gather"].values()):
        times["total"] = 1e-3 / (number + 1)
    rates = collective_rates(found)
    assert rates.link.bytes_s > 0 and rates.link.latency_s >= 0 and 0 < min(rates.rates["all_gather"].efficiency) <= 1


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_fitted_is_what_estimates_count(kind: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two files count steps and bytes by themselves; a change of one must show."""
    from fxzero.cost import communication
    from fxzero.cost.hardware import Link

    hardware = Hardware("x", {torch.float32: 1.0}, 1, 1, 1, 1, 0, ranks_per_node=ranks, node_link=Link(3.0, 0.5))
    monkeypatch.setattr(communication, "algorithm_of", lambda node: kind)
    monkeypatch.setattr(communication, "layout_of", lambda *args: Layout(ranks, ranks))
    monkeypatch.setattr(communication, "message_bytes", lambda node: 1e6)
    monkeypatch.setattr(communication, "fresh_seconds", lambda *args: 0.0)
    monkeypatch.setattr(communication.c10d, "axis_of", lambda node: "dp")
    steps, moved = steps_and_bytes(kind, 1e6, ranks)
    node: Any = None
    assert collective_seconds(node, {"dp": ranks}, hardware) == pytest.approx(steps * 3.0 + moved / 0.5)
