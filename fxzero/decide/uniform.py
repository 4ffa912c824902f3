"""The same answer for every copy of a block: what recompute="auto" comes to at a depth that was never captured.

Blocks of equal structure have equal problems, so an answer of a shallow model is one of the deep model, too. Answers of
all blocks are taken by their number in the block's frontier: 0 loses no time, the last keeps the least. `decide` may
leave single blocks alone where that is enough, and so lose less time; it tries the last answer of every block before
it gives up, so what fits by that one is never refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import hardware_of
from fxzero.decide.activation_answers import groups_of, names_of
from fxzero.decide.activations import Activations, Block
from fxzero.decide.decision import Decision, Group, in_order
from fxzero.decide.frontier import Choice, frontier
from fxzero.graph import StepGraph
from fxzero.plan import Plan
from fxzero.recipe import recomputed_from


class UniformAnswers:
    """The answers that all repeated blocks of a captured step can be given at once.

    Args:
        step: captured, with the mesh of the plan.
        plan: resolved.
        backend: what carries collectives.

    Attributes:
        count: of answers; at least 1.
        frontiers: of the repeated blocks; where those of two depths differ, an answer means something else at each.
    """

    def __init__(self, step: StepGraph, plan: Plan, *, backend: str = "") -> None:
        self.step = step
        self.hardware = hardware_of(step, backend=backend)
        first = recomputed_from(step, plan, backend=backend)
        self.activations = Activations(first, self.hardware, pointwise="recompute_pointwise" not in plan.disable)
        self.choices = [frontier(block.problem) for block in self.activations.blocks]
        named = zip(self.activations.blocks, self.choices, strict=True)
        self.frontiers = frozenset(choices for block, choices in named if block.name)
        self.count = max((len(choices) for choices in self.frontiers), default=1)

    def names(self, answer: int) -> tuple[str, ...]:
        """What `recompute_chosen` is told for an answer."""
        return tuple(name for block, _, choice in self._changes(answer) for name in names_of(block, choice))

    def decision(self, answer: int, *, budget_bytes: int) -> Decision:
        """An answer as a decision; its peaks are not known yet, and 0."""
        changes = self._changes(answer)
        groups = groups_of(changes, hardware=self.hardware, free=self.activations.free)
        seconds = sum(after.seconds - before.seconds for _, before, after in changes)
        step_seconds = sum(compute_seconds(node, self.hardware) for node in self.step.calls())
        return Decision(
            budget_bytes=budget_bytes,
            seconds=seconds,
            step_seconds=step_seconds,
            hardware=self.hardware.name,
            groups=in_order(groups),
        )

    def _changes(self, answer: int) -> list[tuple[Block, Choice, Choice]]:
        """(block, the choice that loses no time, the choice of the answer) for each block."""
        pairs = zip(self.activations.blocks, self.choices, strict=True)
        return [(block, c[0], c[min(answer, len(c) - 1) if block.name else 0]) for block, c in pairs]


def decision_at(depth: int, decisions: Mapping[int, Decision]) -> Decision:
    """The decision at a depth, on the line through those at two others.

    Args:
        depth: number of blocks.
        decisions: depth -> decision, of the same answer.
    """
    (low, at_low), (high, at_high) = sorted(decisions.items())

    def line(first: float, second: float) -> float:
        return first + (second - first) * (depth - low) / (high - low)

    other = {(group.where, group.what, group.how): group for group in at_high.groups}
    groups = []
    for group in at_low.groups:
        deeper = other[group.where, group.what, group.how]
        groups.append(
            Group(
                group.where,
                group.what,
                group.how,
                round(line(group.blocks, deeper.blocks)),
                round(line(group.copies, deeper.copies)),
                round(line(group.saved_bytes, deeper.saved_bytes)),
                line(group.seconds, deeper.seconds),
            )
        )
    return replace(
        at_low,
        seconds=line(at_low.seconds, at_high.seconds),
        step_seconds=line(at_low.step_seconds, at_high.step_seconds),
        groups=in_order(groups),
    )
