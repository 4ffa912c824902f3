"""What a step would take with another batch, another depth, another plan: answered without a new capture if possible.

Batches of other sizes come from one symbolic capture ([Note: symbolic sizes] in `capture/symbolic.py`), great depths
from three small ones ([Note: depth] in `cost/memory_at_depth.py`); where either does not hold, the step is captured at
these sizes. With recompute="auto" all blocks get the same answer (`decide/uniform.py`). Graphs are not verified between
passes here: `fxzero dump` verifies the same recipe.
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
from fxzero.decide import Decision
from fxzero.decide.uniform import UniformAnswers, decision_at
from fxzero.errors import CaptureError
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import CARRIED_KINDS
from fxzero.plan import Plan
from fxzero.recipe import Decided, captured_as, recipe

Sizes = Mapping[str, int]

_MOST_ANSWERS = 12  # captured steps whose problems are remembered


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
    _answer: int = 0
    _known: dict[tuple[Any, ...], Predicted] = field(default_factory=dict)
    _lines: dict[tuple[Any, ...], DepthLines | None] = field(default_factory=dict)
    _answers: dict[int, tuple[StepGraph, UniformAnswers]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the example's batch."""
        return self._target(
            self._depths(self.plan)[0] if self._extrapolates(self.depth, self.plan) else self.depth
        ).sizes

    def predict(self, *, depth: int | None = None, sizes: Sizes | None = None, plan: Plan | None = None) -> Predicted:
        """What a step takes; with recompute="auto", at least.

        Args:
            depth: blocks; default: the function's.
            sizes: of the batch; default: the example's.
            plan: another than asked for, that captures the same step.
        """
        depth = self.depth if depth is None else depth
        sizes, plan = dict(sizes or {}), plan or self.plan
        if plan.recompute != "auto":
            return self._predicted(depth, sizes, plan)
        assert plan.memory_budget is not None, "the plan has checked it"
        least = self._predicted(depth, sizes, plan, answer=self._num_answers(depth, sizes, plan) - 1)
        if least.peak_bytes <= plan.memory_budget:
            return least
        return min(least, self._predicted(depth, sizes, plan, answer=0), key=lambda found: found.peak_bytes)

    def decide(self) -> tuple[Predicted, Decision]:
        """What the step as asked for takes under recompute="auto", by the answer that loses the least time and fits.

        Where none fits, it is the one with the smallest peak of those that were tried.
        """
        budget = self.plan.memory_budget
        assert budget is not None, "the plan has checked it"

        def at(answer: int) -> Predicted:
            return self._predicted(self.depth, {}, self.plan, answer=answer)

        above, low, high = at(0).peak_bytes > budget, 0, self._num_answers(self.depth, {}, self.plan) - 1
        if above and at(high).peak_bytes > budget:
            self._answer = min(low, high, key=lambda answer: at(answer).peak_bytes)
        else:
            while above and high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if at(middle).peak_bytes <= budget else (middle, high)
            self._answer = high if above else 0
        found, kept = at(self._answer), at(0)
        decision = self._decision(self._answer, budget)
        return found, replace(decision, peak_bytes=found.peak_bytes, kept_peak_bytes=kept.peak_bytes)

    def _decision(self, answer: int, budget: int) -> Decision:
        """An answer at the depth that was asked for; of microbatches, that of the last."""
        lines = self._lines_for({}, self.plan, answer) if self._extrapolates(self.depth, self.plan) else None
        depths: list[int | None] = [lines.first, lines.third] if lines is not None else [self.depth]
        steps = {depth: self._target(depth).at({})[-1] for depth in depths}
        found = {d: self._uniform(s, self.plan).decision(answer, budget_bytes=budget) for d, s in steps.items()}
        if lines is None:
            return found[self.depth]
        assert self.depth is not None
        return decision_at(self.depth, {depth: at for depth, at in found.items() if depth is not None})

    def _num_answers(self, depth: int | None, sizes: Sizes, plan: Plan) -> int:
        steps = self._target(self._depths(plan)[0] if self._extrapolates(depth, plan) else depth).at(sizes)
        return max(self._uniform(step, plan).count for step in steps)

    def _check_same_answers(self, sizes: Sizes, plan: Plan) -> None:
        """Raise ValueError unless an answer means the same at all depths that lines are drawn through."""
        steps = [self._target(depth).at(sizes) for depth in self._depths(plan)]
        if len({frozenset(f for step in own for f in self._uniform(step, plan).frontiers) for own in steps}) > 1:
            raise ValueError("the blocks of other depths have other answers")

    def _uniform(self, step: StepGraph, plan: Plan) -> UniformAnswers:
        if id(step) not in self._answers:
            while len(self._answers) >= _MOST_ANSWERS:
                del self._answers[next(iter(self._answers))]
            step.mesh = dict(plan.axes)
            self._answers[id(step)] = step, UniformAnswers(step, plan, backend=self.backend)
        return self._answers[id(step)][1]

    def _predicted(self, depth: int | None, sizes: Sizes, plan: Plan, answer: int = 0) -> Predicted:
        key = (depth, tuple(sorted(sizes.items())), plan, answer)
        if key not in self._known:
            lines = self._lines_for(sizes, plan, answer) if self._extrapolates(depth, plan) else None
            if lines is not None:
                assert depth is not None
                self._known[key] = lines.at(depth)
            else:
                self._known[key] = Predicted.of(self._course(depth, sizes, plan, answer))
        return self._known[key]

    def course(self) -> Course:
        """The whole course of the step as asked for; with recompute="auto", by the answer of `decide`."""
        extrapolates = self._extrapolates(self.depth, self.plan)
        lines = self._lines_for({}, self.plan, self._answer) if extrapolates else None
        if lines is not None:
            assert self.depth is not None
            try:
                return course_at(lines, self.depth)
            except ValueError as reason:
                self.notes.append(f"the picture is of the whole model, captured: {reason}")
        return self._course(self.depth, {}, self.plan, self._answer)

    def _edge(self, plan: Plan) -> int:
        # what leaves the device is on its way for one block more
        return 1 + max(1, plan.prefetch) + (plan.offload_activations != "none")

    def _depths(self, plan: Plan) -> list[int]:
        return [2 * self._edge(plan) + extra for extra in range(3)]

    def _extrapolates(self, depth: int | None, plan: Plan) -> bool:
        """Whether a depth is to be had from three smaller ones; not where a pass decides by bytes of the whole."""
        by_block = plan.recompute in ("none", "blocks", "auto") and plan.update_on_host in (0.0, 1.0)
        return depth is not None and depth > self._depths(plan)[-1] and by_block

    def _lines_for(self, sizes: Sizes, plan: Plan, answer: int = 0) -> DepthLines | None:
        key = (tuple(sorted(sizes.items())), plan, answer)
        if key not in self._lines:
            courses = {depth: self._course(depth, sizes, plan, answer) for depth in self._depths(plan)}
            try:
                if answer:
                    self._check_same_answers(sizes, plan)
                self._lines[key] = DepthLines(courses, edge=self._edge(plan))
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

    def _course(self, depth: int | None, sizes: Sizes, plan: Plan, answer: int = 0) -> Course:
        told = {**sizes, **({self.depth_key: depth} if self.depth_key else {})}
        what = ", ".join(f"{name}={value}" for name, value in told.items())
        changed = [f"{key}={value}" for key, value in changes(plan, self.plan).items()]
        changed += [f"recompute by answer {answer}"] if answer else []
        what = ", ".join([what or "as it is", *changed])
        with self.progress.stage("what if", f"what if {what}"):
            steps = self._target(depth).at(sizes)
            middle = max(self.plan.accumulate - 2, 1)
            times = [middle if index == 1 and len(steps) == 3 else 1 for index in range(len(steps))]
            return memory_course([self._rewritten(step, plan, answer) for step in steps], times=times)

    def _rewritten(self, step: StepGraph, plan: Plan, answer: int) -> StepGraph:
        """The program that a rank would run; the one place where a plan becomes passes."""
        step.mesh = dict(plan.axes)
        names = self._uniform(step, plan).names(answer) if answer else ()
        return recipe(plan, backend=self.backend, decided=Decided(recomputed=names)).run(step, check=False)


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
