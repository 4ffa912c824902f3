"""Runs passes: order checked before, each one verified after, everything kept that a person may want to read."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fxzero.errors import FxzeroError, PipelineError, RewriteError
from fxzero.graph import StepGraph
from fxzero.graph.contract import Pass
from fxzero.graph.rules import Summary
from fxzero.graph.verify import verify

log = logging.getLogger("fxzero")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Args:
        name: the pass with its options.
        edits: as it counted them.
        op_diff: op -> how many more (or fewer) of it there are.
        seconds, verify_seconds: time of the pass and of the verifier after it.
    """

    name: str
    edits: int
    op_diff: dict[str, int]
    seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class _Before:
    """What is kept of a graph while a pass changes it."""

    ops: collections.Counter[str]
    summary: Summary | None


@dataclass
class Pipeline:
    """An ordered, checked list of passes.

    Args:
        passes: in order.
        disable: names to leave out.

    Raises:
        PipelineError: if a pass requires a fact that nothing before it provides, or an unknown pass is disabled.
    """

    passes: Sequence[Pass]
    disable: tuple[str, ...] = ()
    records: list[PassRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.passes = [p for p in self.passes if p.name not in self.disable]
        check_order(self.passes)

    def run(
        self,
        step: StepGraph,
        *,
        until: str | None = None,
        check: bool = True,
        snapshot: Callable[[str, StepGraph], None] | None = None,
    ) -> StepGraph:
        """Rewrite one copy of `step`, pass by pass.

        Args:
            step: a captured step; it is not changed.
            until: stop after this pass.
            check: verify after each pass.
            snapshot: called with (pass name, graph) after each pass, and with "capture" first; the graph changes
                afterwards, so keep its text or a copy.

        Raises:
            RewriteError: if a pass cannot handle this graph.
            VerifyError: if a pass broke a rule (a bug of fxzero's).
        """
        self.records.clear()
        current = step.copy()
        before = _Before(_op_counts(current), Summary.of(current) if check else None)
        if snapshot:
            snapshot("capture", current)
        for rewrite in self.passes:
            before = self._run_one(rewrite, current, before)
            if snapshot:
                snapshot(rewrite.name, current)
            if rewrite.name == until:
                break
        return current

    def _run_one(self, rewrite: Pass, step: StepGraph, before: _Before) -> _Before:
        """Let one pass change `step`; returns what the next one will be compared with."""
        start = time.perf_counter()
        try:
            edits = rewrite.run(step, **rewrite.options)
        except FxzeroError:
            raise
        except Exception as error:
            raise RewriteError.of(
                where=f"pass {rewrite.name!r}",
                expected="a graph that it can rewrite",
                got=f"{type(error).__name__}: {error}",
                fix=f"disable it ({rewrite.name!r} in the plan's `disable`) and report the graph",
            ) from error
        seconds = time.perf_counter() - start
        step.facts |= rewrite.provides
        step.title = f"after {rewrite.name}"
        start = time.perf_counter()
        summary = None if before.summary is None else verify(step, before=before.summary)
        verify_seconds = time.perf_counter() - start
        now = _Before(_op_counts(step), summary)
        diff = {op: now.ops[op] - before.ops[op] for op in sorted({*before.ops, *now.ops})}
        changed = {op: number for op, number in diff.items() if number}
        self.records.append(PassRecord(rewrite.name, edits, changed, seconds, verify_seconds))
        log.debug("%s: %d edits, %.3f s", rewrite.name, edits, seconds)
        return now

    def describe(self) -> str:
        """One line a pass, with its options: what ranks must agree on."""
        return "\n".join(str(p) for p in self.passes)


def check_order(passes: Iterable[Pass]) -> None:
    """Check that each pass finds the facts that it requires.

    Raises:
        PipelineError: naming the pass, the fact, and the facts at that point.
    """
    facts = {"captured"}
    for number, rewrite in enumerate(passes, start=1):
        missing = rewrite.requires - facts
        if missing:
            raise PipelineError.of(
                where=f"pass {number} {rewrite.name!r}",
                expected=f"{', '.join(sorted(missing))} before it",
                got=f"facts at that point: {', '.join(sorted(facts))}",
                fix="put a pass that provides it earlier, or leave this one out",
            )
        facts |= rewrite.provides


def _op_counts(step: StepGraph) -> collections.Counter[str]:
    return collections.Counter(getattr(n.target, "__name__", str(n.target)) for n in step.calls())
