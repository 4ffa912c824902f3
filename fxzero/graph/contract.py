"""What a pass declares about itself; the pass manager holds it to that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pass:
    """One rewrite of a step graph.

    Args:
        name: a verb phrase; file, function and printed name are the same.
        run: (step, **options) -> number of edits; changes the step in place.
        requires, provides: facts that must hold before, that hold after.
        numerics: "bitwise", or the tolerance and its reason.
        summary: first line of the function's docstring.
        options: what the recipe passes to `run`.
    """

    name: str
    run: Callable[..., int]
    requires: frozenset[str]
    provides: frozenset[str]
    numerics: str
    summary: str
    options: dict[str, Any] = field(default_factory=dict)

    def using(self, **options: Any) -> Pass:
        """The same pass with these options."""
        return Pass(
            self.name,
            self.run,
            self.requires,
            self.provides,
            self.numerics,
            self.summary,
            {**self.options, **options},
        )

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in sorted(self.options.items()))
        return f"{self.name}({options})"


def graph_pass(
    *, requires: tuple[str, ...] = (), provides: tuple[str, ...] = (), numerics: str = "bitwise"
) -> Callable[[Callable[..., int]], Pass]:
    """Declare a function on a StepGraph a pass."""

    def declare(run: Callable[..., int]) -> Pass:
        summary = (run.__doc__ or "").strip().splitlines()[0]
        return Pass(run.__name__, run, frozenset(requires), frozenset(provides), numerics, summary)

    return declare
