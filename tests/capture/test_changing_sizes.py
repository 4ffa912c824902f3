"""Which sizes of batches become symbols, and what is then captured: the right program, no more often than needed."""

from __future__ import annotations

import logging
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fxzero
from fxzero import programs
from fxzero.capture import trace
from fxzero.capture.changing_sizes import MOST_TRACES, ChangingSizes, contiguous
from fxzero.capture.symbolic import SymbolicStep
from fxzero.errors import CaptureError
from tests.lower.models import Decoder

SIZES = ((4, 16), (2, 24), (3, 10), (4, 16), (1, 5), (1, 7))


def leaves(*shapes: tuple[int, ...]) -> list[tuple[str, torch.Tensor]]:
    return [(f"args.{index}", torch.zeros(shape, dtype=torch.int64)) for index, shape in enumerate(shapes)]


def test_dims_that_have_changed_are_named_and_those_that_changed_together_share_a_name() -> None:
    batches = [
        leaves((4, 16), (4, 16, 8), (7,)),
        leaves((2, 16), (2, 16, 8), (7,)),
        leaves((2, 24), (2, 24, 8), (7,)),
        leaves((2, 24), (2, 24, 8), (9,)),
    ]
    changing = ChangingSizes(batches[0])
    assert changing.dims(batches[0]) == {}
    found = []
    for batch in batches[1:]:
        changing.note(batch)
        found.append(changing.dims(batch))
    both = {0: "batch", 1: "sequence"}
    assert found[0] == {"args.0": {0: "batch"}, "args.1": {0: "batch"}}
    assert found[1] == {"args.0": both, "args.1": both}
    assert found[2] == {"args.0": both, "args.1": both, "args.2": {0: "args_2_0"}}
    one = leaves((1, 24), (1, 24, 8), (9,))
    assert changing.dims(one) == {"args.0": {1: "sequence"}, "args.1": {1: "sequence"}, "args.2": {0: "args_2_0"}}
    none = leaves((0, 24), (0, 24, 8), (9,))
    assert len({changing.key(leaves) for leaves in (one, none, batches[3])}) == 3


def test_dims_that_were_equal_by_chance_get_two_names_when_they_differ() -> None:
    changing = ChangingSizes(leaves((4, 8), (4, 3)))
    changing.note(leaves((6, 8), (6, 3)))
    assert changing.dims(leaves((6, 8), (6, 3))) == {"args.0": {0: "batch"}, "args.1": {0: "batch"}}
    apart = leaves((6, 8), (5, 3))
    changing.note(apart)
    assert changing.dims(apart) == {"args.0": {0: "batch"}, "args.1": {0: "args_1_0"}}


def test_what_looks_like_batch_and_sequence_can_be_named_from_the_first_batch_on() -> None:
    square = leaves((4, 4))
    assert ChangingSizes(square, all_named=True).dims(square) == {"args.0": {0: "batch", 1: "sequence"}}


def test_slices_become_contiguous_and_other_orders_stay() -> None:
    whole = torch.arange(12).view(3, 4)
    (one, same, turned), _ = contiguous(((whole[:, 1:], whole, whole.t()), {}))
    assert one.is_contiguous() and torch.equal(one, whole[:, 1:])
    assert same is whole and turned.stride() == (1, 4)


# ---- training


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(50, (rows, length + 1), generator=torch.Generator().manual_seed(rows * length))
    return text[:, :-1], text[:, 1:]  # two slices: they are not contiguous


def step_of(model: nn.Module, optimizer: Any = None, **keys: Any) -> fxzero.TrainStep:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fxzero.compile(model, optimizer, fxzero.Plan(**{"zero": 0, "lowering": "eager", **keys}))


def losses_of(dynamic: bool | str, sizes: Any = SIZES) -> tuple[list[float], int, fxzero.TrainStep]:
    """Losses, how often the step was traced, and the step."""
    torch.manual_seed(0)
    step = step_of(Decoder(1), dynamic=dynamic)
    with mock.patch.object(trace, "_trace", wraps=trace._trace) as traces:
        return [step(*batch(*size)).item() for size in sizes], traces.call_count, step


@pytest.fixture(scope="module")
def expected() -> list[float]:
    found, count, _ = losses_of(False)
    assert count == len(set(SIZES))
    return found


@pytest.mark.parametrize(("dynamic", "traces"), [("auto", 3), (True, 2)])
def test_batches_of_new_sizes_are_not_traced_and_train_to_the_bit(
    dynamic: bool | str, traces: int, expected: list[float]
) -> None:
    found, count, _ = losses_of(dynamic)
    assert found == expected
    assert count == traces, "one of them for batches of one row"


class Longer(nn.Module):
    """Another program for long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out = self.lin(x)
        return (out.relu() if x.shape[1] > 16 else out.sigmoid()).square().mean()


def train(lengths: Any, *, optimizer: Any = torch.optim.SGD, **keys: Any) -> tuple[list[float], int]:
    torch.manual_seed(0)
    model = Longer()
    step = step_of(model, optimizer(model.parameters(), lr=0.1), **keys)
    with mock.patch.object(trace, "_trace", wraps=trace._trace) as traces:
        found = []
        for length in lengths:
            found.append(step(torch.linspace(-1, 1, 2 * 8 * length).view(2, length, 8)).item())
            model.calls += 1  # an attribute that means nothing
        return found, traces.call_count


def test_sizes_at_which_the_model_branches_have_a_trace_for_each_branch() -> None:
    lengths = (14, 15, 17, 13, 18, 12, 19)
    found, count = train(lengths)
    assert found == train(lengths, dynamic=False)[0]
    assert count == 5, "at 14; with symbols at 15 and 17; once each to learn that the count of calls means nothing"


def test_an_optimizer_that_changes_its_ways_is_traced_again() -> None:
    """RAdam rectifies from its sixth step on: the guard of what was traced at the second does not hold then."""
    lengths = range(3, 13)
    how: Any = {"optimizer": torch.optim.RAdam}
    found, _ = train(lengths, **how)
    assert found == train(lengths, dynamic=False, **how)[0]


class Unlike(nn.Module):
    """A program for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.lin(row).square().mean() for row in x) / len(x)


def test_a_model_with_a_program_for_each_size_is_captured_for_each(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    step = step_of(Unlike())
    with caplog.at_level(logging.INFO, logger="fxzero"):
        for rows in range(2, 5 + MOST_TRACES):
            step(torch.ones(rows, 4))
    assert f"captured for one shape: {MOST_TRACES} traces with symbols do not take it" in caplog.text
    assert f"2 captured for one shape, the last as {MOST_TRACES} traces with symbols do not take it" in step.report()


def test_a_model_that_cannot_be_traced_with_symbols_is_captured_for_each_size(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: SymbolicStep) -> None:
        raise CaptureError("this cannot be traced with symbols")

    monkeypatch.setattr(SymbolicStep, "trace", refuse)
    torch.manual_seed(0)
    step = step_of(Longer())
    with caplog.at_level(logging.INFO, logger="fxzero"):
        found = [step(torch.full((2, length, 8), 0.5)).item() for length in (5, 6, 7)]
    torch.manual_seed(0)
    alone = step_of(Longer(), dynamic=False)
    assert found == [alone(torch.full((2, length, 8), 0.5)).item() for length in (5, 6, 7)]
    assert caplog.text.count("sizes cannot be symbols: this cannot be traced with symbols") == 1
    assert "2 captured for one shape, the last as this cannot be traced with symbols" in step.report()


def test_only_so_many_programs_are_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(programs, "MOST_SHAPES", 2)
    sizes = SIZES[:2] + SIZES[:1] + SIZES[2:4]
    with caplog.at_level(logging.INFO, logger="fxzero"):
        found, _, step = losses_of("auto", sizes)
    kept = {signature.batch[0][0] for signature, _ in step._programs._compiled}
    assert kept == {(4, 16), (3, 10)}, "the least used one goes, not the oldest"
    assert caplog.text.count("more than 2 kinds of batches") == 1
    assert len(found) == 5


def test_no_tensor_of_an_example_is_held() -> None:
    torch.manual_seed(0)
    step = step_of(Decoder(1), dynamic=True)
    args = tuple(part.contiguous() for part in batch(3, 8))
    of_batch = weakref.ref(args[0])
    step(*args)
    del args
    assert of_batch() is None
