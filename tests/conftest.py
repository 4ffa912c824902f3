"""Fixtures of all tests: golden texts, and the step graph of a model and its optimizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fxzero.capture import Inventory, capture_step
from fxzero.graph import StepGraph

GOLDEN = Path(__file__).parent / "golden"

Capture = Callable[..., StepGraph]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write golden texts instead of comparing with them")


# Tests that show a defect which is known and not mended yet; docs/known_defects.md says what each one means for a user.
KNOWN_DEFECTS = (
    "[recurrent]",
    "[strided]",
    "test_a_batch_of_another_structure",
    "test_a_model_that_has_a_step_already",
    "test_an_optimizer_that_ranks_cannot_shard_works_or_is_refused_before_anything_is_sharded",
    "test_ranks_that_run_different_known_programs_are_stopped",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(part in item.nodeid for part in KNOWN_DEFECTS):
            item.add_marker(pytest.mark.xfail(reason="see docs/known_defects.md", strict=False))


@dataclass(frozen=True)
class Golden:
    """Compares a text with `folder/name.txt`, or writes that file where `accept` is set."""

    folder: Path
    accept: bool
    test: str = ""

    def __call__(self, name: str, text: str) -> None:
        path = self.folder / f"{name}.txt"
        if self.accept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        how = f"to accept what it is now: pytest --accept '{self.test}', then read `git diff -w`"
        if not path.exists():
            pytest.fail(f"golden/{name}.txt does not exist; {how}", pytrace=False)
        if path.read_text() != text:
            pytest.fail(f"{how}\n{difference(path.read_text(), text, name=f'golden/{name}.txt')}", pytrace=False)


def difference(old: str, new: str, *, name: str) -> str:
    """A unified diff that leaves out lines of which only the alignment changed, unless that is all there is."""

    def diff(squeeze: Callable[[str], str]) -> str:
        sides = [[squeeze(line) for line in side.splitlines()] for side in (old, new)]
        return "\n".join(difflib.unified_diff(*sides, name, "now", lineterm="", n=2))

    return diff(lambda line: re.sub(r"(?<=\S) {2,}", "  ", line)) or diff(str)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)` fails, with a diff, where tests/golden/name.txt is another text."""
    return Golden(GOLDEN, request.config.getoption("--accept"), request.node.nodeid)


@pytest.fixture
def capture() -> Capture:
    """`capture(model, optimizer, *batch)` is the graph of a step that is not the optimizer's first."""

    def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> StepGraph:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return capture_step(Inventory.of(model, optimizer), None, batch, {}).step

    return run
