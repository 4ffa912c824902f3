"""What a step would take with another batch, another depth, another plan: answered without a new capture if possible.

Batches of other sizes come from one symbolic capture ([Note: symbolic sizes] in `capture/symbolic.py`), great depths
from three small ones ([Note: depth] in `cost/memory_at_depth.py`); where either does not hold, the step is captured at
these sizes. Graphs are not verified between passes here: `fxzero dump` verifies the same recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fxzero.capture import Inventory, capture_step
from fxzero.capture.batch_dims import BATCH, find_dims, resized, sizes_of
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.signature import flatten_batch
from fxzero.capture.symbolic import SymbolicStep
from fxzero.cli.progress import Progress
from fxzero.cli.target import Target, load_target
from fxzero.cost.course_at_depth import course_at
from fxzero.cost.memory_at_depth import DepthLines, Predicted
from fxzero.cost.memory_course import Course, memory_course
from fxzero.errors import CaptureError
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import CARRIED_KINDS
from fxzero.plan import Plan
from fxzero.recipe import captured_as, recipe

Sizes = Mapping[str, int]


class CapturedTarget:
    """The user's function at one depth: captured directly for its own batch, with a symbol for other batch sizes.

    Args:
        target: what the function returned.
        options: what the plan says of captures.
    """

    def __init__(self, target: Target, plan: Plan) -> None:
        self.target = target
        self.plan = plan
        self.inventory, self.fresh = rehearse(Inventory.of(target.model, target.optimizer))
        leaves = flatten_batch(target.args, target.kwargs)[0]
        self.dims = find_dims(leaves)
        self.sizes = sizes_of(leaves, self.dims)
        self._steps: dict[tuple[tuple[str, int], ...], list[StepGraph]] = {}
        self._symbolic: list[SymbolicStep] | None = None

    def at(self, sizes: Sizes) -> list[StepGraph]:
        """The step's programs before any pass, one for each kind of microbatch."""
        key = tuple(sorted({**self.sizes, **sizes}.items()))
        if key not in self._steps:
            own = dict(key) == self.sizes
            self._steps = {k: steps for k, steps in self._steps.items() if dict(k) == self.sizes}  # no others are kept
            self._steps[key] = self._directly(dict(key)) if own else self._specialised(dict(key))
        return self._steps[key]

    def _specialised(self, sizes: Sizes) -> list[StepGraph]:
        try:
            if self._symbolic is None:
                self._symbolic = list(self._symbolic_programs())
            return [step.at(**{BATCH: sizes[BATCH]}) for step in self._symbolic]
        except CaptureError:  # another program at these sizes, or one that cannot be traced with symbols
            return self._directly(sizes)

    def _directly(self, sizes: Sizes) -> list[StepGraph]:
        args, kwargs = self.target.args, self.target.kwargs
        if sizes != self.sizes:
            args, kwargs = resized(args, kwargs, dims=self.dims, sizes=sizes)
        steps: list[StepGraph] = []
        for how in self._microbatches(steps):
            steps.append(capture_step(self.inventory, self.target.loss, args, kwargs, **how).step)
        return steps

    def _symbolic_programs(self) -> Iterable[SymbolicStep]:
        args, kwargs = self.target.args, self.target.kwargs
        batch = {path: {d: n for d, n in dims.items() if n == BATCH} for path, dims in self.dims.items()}
        batch = {path: dims for path, dims in batch.items() if dims}  # a symbol that does not vary only costs time
        for how in self._microbatches(self.at({})):
            yield SymbolicStep(self.inventory, self.target.loss, args, kwargs, dims=batch, **how)

    def _microbatches(self, first: list[StepGraph]) -> Iterable[dict[str, Any]]:
        """How each program of a step is captured; `first` holds at least the first program after the first of these."""
        options = captured_as(self.plan)
        for index in sorted({0, min(1, self.plan.accumulate - 1), self.plan.accumulate - 1}):
            carried = [name for kind, name in first[0].results if kind in CARRIED_KINDS] if index else []
            place = options.accumulation.at(index, carried=carried)
            yield {"fresh": self.fresh, "options": replace(options, accumulation=place)}


@dataclass
class WhatIf:
    """Predictions of memory for one function and plan.

    Args:
        text: FILE.py:FUNCTION.
        keywords: of the function.
        plan: resolved.
        backend: what carries collectives.
        progress: what to tell.
        depth_key: the keyword that says how many blocks the model has, if any.
        depth: its value.
    """

    text: str
    keywords: dict[str, Any]
    plan: Plan
    backend: str
    progress: Progress
    depth_key: str | None
    depth: int | None
    notes: list[str] = field(default_factory=list)
    _targets: dict[int | None, CapturedTarget] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], Predicted] = field(default_factory=dict)
    _lines: dict[tuple[Any, ...], DepthLines | None] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the example's batch."""
        return self._target(self._depths[0] if self._extrapolates(self.depth, self.plan) else self.depth).sizes

    def predict(self, *, depth: int | None = None, sizes: Sizes | None = None, plan: Plan | None = None) -> Predicted:
        """What a step takes.

        Args:
            depth: blocks; default: the function's.
            sizes: of the batch; default: the example's.
            plan: another than asked for, that captures the same step.
        """
        depth = self.depth if depth is None else depth
        sizes, plan = dict(sizes or {}), plan or self.plan
        key = (depth, tuple(sorted(sizes.items())), plan)
        if key not in self._known:
            lines = self._lines_for(sizes, plan) if self._extrapolates(depth, plan) else None
            if lines is not None:
                assert depth is not None
                self._known[key] = lines.at(depth)
            else:
                self._known[key] = Predicted.of(self._course(depth, sizes, plan))
        return self._known[key]

    def course(self) -> Course:
        """The whole course of the step as asked for."""
        lines = self._lines_for({}, self.plan) if self._extrapolates(self.depth, self.plan) else None
        if lines is not None:
            assert self.depth is not None
            try:
                return course_at(lines, self.depth)
            except ValueError as reason:
                self.notes.append(f"the picture is of the whole model, captured: {reason}")
        return self._course(self.depth, {}, self.plan)

    @property
    def _edge(self) -> int:
        # what leaves the device is on its way for one block more
        return 1 + max(1, self.plan.prefetch) + (self.plan.offload_activations != "none")

    @property
    def _depths(self) -> list[int]:
        return [2 * self._edge + extra for extra in range(3)]

    def _extrapolates(self, depth: int | None, plan: Plan) -> bool:
        """Whether a depth is to be had from three smaller ones; not where a pass decides by bytes of the whole."""
        by_block = plan.recompute in ("none", "blocks") and plan.update_on_host in (0.0, 1.0)
        return depth is not None and depth > self._depths[-1] and by_block

    def _lines_for(self, sizes: Sizes, plan: Plan) -> DepthLines | None:
        key = (tuple(sorted(sizes.items())), plan)
        if key not in self._lines:
            courses = {depth: self._course(depth, sizes, plan) for depth in self._depths}
            try:
                self._lines[key] = DepthLines(courses, edge=self._edge)
            except ValueError as reason:
                self.notes.append(
                    f"{self.depth_key} is not extrapolated: {reason}; the whole model is captured instead"
                )
                self._lines[key] = None
        return self._lines[key]

    def _target(self, depth: int | None) -> CapturedTarget:
        if depth not in self._targets:
            own = {} if self.depth_key is None or depth is None else {self.depth_key: depth}
            self._targets[depth] = CapturedTarget(load_target(self.text, **{**self.keywords, **own}), self.plan)
        return self._targets[depth]

    def _course(self, depth: int | None, sizes: Sizes, plan: Plan) -> Course:
        told = {**sizes, **({self.depth_key: depth} if self.depth_key else {})}
        what = ", ".join(f"{name}={value}" for name, value in told.items())
        changed = (f"{key}={value}" for key, value in changes(plan, self.plan).items())
        what = ", ".join([what or "as it is", *changed])
        with self.progress.stage("what if", f"what if {what}"):
            steps = self._target(depth).at(sizes)
            middle = max(self.plan.accumulate - 2, 1)
            times = [middle if index == 1 and len(steps) == 3 else 1 for index in range(len(steps))]
            return memory_course([self._rewritten(step, plan) for step in steps], times=times)

    def _rewritten(self, step: StepGraph, plan: Plan) -> StepGraph:
        """The program that a rank would run; the one place where a plan becomes passes."""
        step.mesh = dict(plan.axes)
        return recipe(plan, backend=self.backend).run(step, check=False)


def changes(plan: Plan, base: Plan) -> dict[str, Any]:
    """The keys in which a plan differs from another."""
    return {key: value for key, value in plan.to_dict().items() if base.to_dict().get(key) != value}


def largest(peak: Any, limit: int, *, start: int, most: int = 2**20) -> int:
    """The largest number from 1 to `most` whose peak is at most `limit`, 0 if there is none.

    Args:
        peak: number -> bytes; grows with it. Asked as seldom as a straight line through two answers allows.
        limit: bytes.
        start: where to begin.
    """
    low, high = 0, most + 1
    answers: dict[int, int] = {}
    probe = start
    while high - low > 1:
        probe = min(max(probe, low + 1), high - 1)
        answers[probe] = peak(probe)
        if answers[probe] <= limit:
            low = probe
        else:
            high = probe
        probe = _by_line(answers, limit, otherwise=2 * probe if high > most else (low + high) // 2)
    return low


def _by_line(answers: dict[int, int], limit: int, *, otherwise: int) -> int:
    """Where a straight line through the two answers nearest to the limit reaches it."""
    if len(answers) < 2:
        return otherwise
    (a, at_a), (b, at_b) = sorted(sorted(answers.items(), key=lambda item: abs(item[1] - limit))[:2])
    return a + (limit - at_a) * (b - a) // (at_b - at_a) if at_b > at_a else otherwise
