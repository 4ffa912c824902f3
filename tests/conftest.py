"""Fixtures of all tests: golden texts, and the step graph of a model and its optimizer."""

from __future__ import annotations

import difflib
import gc
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fxzero.capture import Inventory, capture_step
from fxzero.graph import StepGraph
from tests.numerics import rank_servers

GOLDEN = Path(__file__).parent / "golden"

Capture = Callable[..., StepGraph]


def pytest_configure(config: pytest.Config) -> None:
    """What tests compile is kept beside pytest's own cache, for all of its processes and the next run."""
    os.environ.setdefault("FXZERO_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "fxzero"))
    os.environ.setdefault("FXZERO_LOWERING", "eager")  # bits are compared; tests/lower compiles where it says so
    os.environ.setdefault("FXZERO_COMPILE_PROCESSES", "1")  # tests run beside each other already


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: collections of garbage need not look through it."""
    gc.collect()
    gc.freeze()


# Torch writes a record with two stacks for each symbol of a trace as soon as this logger has a handler, which pytest
# gives to all loggers that do not propagate.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    """A test that ran all ranks in this process leaves no process group to the next one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_sessionfinish() -> None:
    """Processes that ranks were forked from end with the tests."""
    rank_servers.close(GOLDEN.parents[1])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write golden texts instead of comparing with them")


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
