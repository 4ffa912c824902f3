"""A look inside: the graphs that torch.compile(backend="fxzero") has compiled in this process."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path

from fxzero.errors import PlanError
from fxzero.graph import StepGraph


class Shown:
    """The compiled graphs that are in use still, in the order in which they were compiled."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._graphs: weakref.WeakValueDictionary[tuple[int, str], StepGraph] = weakref.WeakValueDictionary()

    def number(self) -> int:
        """That of the next captured graph."""
        return next(self._numbers)

    def add(self, number: int, title: str, step: StepGraph) -> None:
        """A half of a captured graph is compiled."""
        self._graphs[(number, title)] = step

    def graphs(self) -> list[StepGraph]:
        """All of them."""
        return [
            step for _, step in sorted(self._graphs.items(), key=lambda item: (item[0][0], item[0][1] != "forward"))
        ]


_SHOWN = Shown()  # it holds none of them: a graph is gone with the function that runs it


class Compiled:
    """What one captured graph has become, as people can read it.

    Args:
        number: of the graph in this process, from 0.
        dump: a folder for texts, if any.
    """

    def __init__(self, number: int, dump: Path | None) -> None:
        self.number = number
        self._dump = dump

    def add(self, title: str, step: StepGraph) -> None:
        """A half, "forward" or "backward", is compiled.

        Raises:
            PlanError: if the folder cannot be written to.
        """
        _SHOWN.add(self.number, title, step)
        if self._dump is None:
            return
        try:
            self._dump.mkdir(parents=True, exist_ok=True)
            (self._dump / f"{self.number:03d}_{title}.txt").write_text(f"{step}\n")
        except OSError as error:
            fix = "pass another one, or leave it out"
            raise PlanError.of("options['dump']", expected="a folder to write to", got=str(error), fix=fix) from error


def show(dump: Path | None) -> Compiled:
    """The place of the next captured graph."""
    return Compiled(_SHOWN.number(), dump)


def programs() -> list[StepGraph]:
    """The graphs that fxzero runs for torch.compile in this process, newest last; print one to read it.

    A captured graph is two: forward, and backward where there is one. They are gone from the list with the compiled
    function that they belong to.
    """
    return _SHOWN.graphs()
