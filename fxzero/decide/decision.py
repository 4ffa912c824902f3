"""Which activations are kept under recompute="auto": the predicted peak fits the budget, and the least time is lost.

The way of a decision: the recipe runs with nothing decided; where its peak is above the budget, each distinct block is
solved for a row of bounds on what it keeps (`frontier`), one answer for each block is chosen so that no place of that
program holds too much (`combination`), and the recipe runs again with these. What other passes make of it is in that
run's peak: the bound is corrected by what it is off, at most a few times. No clock and no order of a set has a say, so
that ranks with equal graphs decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware, hardware_of
from fxzero.cost.memory import MemoryProfile, memory_profile
from fxzero.decide.activations import Activations, Block
from fxzero.decide.combination import Alternative, Combination
from fxzero.decide.frontier import Choice, frontier
from fxzero.decide.lifetimes import Lifetimes
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.blocks import list_of
from fxzero.graph.swap_ops import TIERS
from fxzero.graph.text import size_text
from fxzero.pass_manager import Pipeline
from fxzero.plan import Plan
from fxzero.recipe import recipe

_MAX_RUNS = 6  # of the recipe, beside the one with nothing decided
_MAX_AIMS = 16
RECOMPUTED = "recomputed"
_CLOSE = 0.005  # of the budget: a peak that is so near it is not corrected


@dataclass(frozen=True)
class Group:
    """Activations of one kind, over all copies of their block.

    Args:
        where: path of the modules that make them, "*" for the number of the block.
        how: "recomputed", "offloaded to host" or "offloaded to nvme".
        blocks, copies: of how many blocks they are, and how many there are.
        saved_bytes: that are not kept from forward to backward, in all blocks.
        seconds: of having them again.
    """

    where: str
    how: str
    blocks: int
    copies: int
    saved_bytes: int
    seconds: float

    def __str__(self) -> str:
        blocks = f" in {self.blocks} of {self.copies} blocks" if self.copies > 1 else ""
        size = f"{size_text(self.saved_bytes)}" if self.saved_bytes > 0 else "for others, with none of their own freed"
        saved = f"{size} for {_time(self.seconds)}"
        return f"{self.where} activations: {self.how}{blocks}, {saved}"


@dataclass(frozen=True)
class Decision:
    """What is kept and what is computed again, and why.

    Args:
        names: of the captured step's forward nodes that backward has again (masks among them: kept as booleans).
        offloaded: names of those that wait on a tier, where the plan allows that.
        budget_bytes: what the plan says.
        peak_bytes: predicted, with this decision.
        kept_peak_bytes: predicted with nothing decided.
        seconds: predicted, of what is done for the decision in each step.
        step_seconds: predicted, of all compute of a step with nothing decided.
        hardware: what the predictions of time are for.
        groups: what was decided, most bytes first.
    """

    names: tuple[str, ...]
    offloaded: tuple[str, ...]
    budget_bytes: int
    peak_bytes: int
    kept_peak_bytes: int
    seconds: float
    step_seconds: float
    hardware: str
    groups: tuple[Group, ...]

    def __str__(self) -> str:
        head = (
            f"budget {size_text(self.budget_bytes)}: predicted peak {size_text(self.peak_bytes)}, "
            f"{size_text(self.kept_peak_bytes)} with everything kept"
        )
        if not self.groups:
            return f"{head}; so everything is"
        cost = f"{_time(self.seconds)} beside a step's {_time(self.step_seconds)} on {self.hardware} (predicted)"
        return "\n".join([f"{head}; {cost}", *(f"  {group}" for group in self.groups)])


def decided_recipe(step: StepGraph, *, plan: Plan, backend: str) -> tuple[Pipeline, Decision | None]:
    """The pipeline for a captured step, with what its plan leaves open decided.

    Args:
        step: captured, with the mesh of the plan.
        plan: resolved.
        backend: what carries collectives.

    Raises:
        PlanError: if the budget cannot be met.
    """
    if plan.recompute != "auto":
        return recipe(plan, backend=backend), None
    tiers = () if plan.offload_activations == "none" else (plan.offload_activations,)
    decision = decide(step, plan=plan, backend=backend, tiers=tiers)
    return recipe(plan, backend=backend, recomputed=decision.names, offloaded=decision.offloaded), decision


def check_budget(step: StepGraph, *, plan: Plan) -> None:
    """Check that the predicted peak of a finished program is within the plan's budget, whatever the plan recomputes.

    Raises:
        PlanError: naming both, and what stands in the peak.
    """
    if plan.memory_budget is None:
        return
    profile = memory_profile(step)
    if profile.peak_bytes > plan.memory_budget:
        other = "" if plan.recompute == "auto" else "set recompute='auto', "
        raise _above(plan, profile, what="predicted peak", other=other)


def decide(step: StepGraph, *, plan: Plan, backend: str, tiers: Iterable[str] = ()) -> Decision:
    """Decide what is computed again, for the least time with a predicted peak within the plan's budget.

    Args:
        step: captured, with the mesh of the plan; it is not changed.
        plan: resolved, with a memory_budget.
        backend: what carries collectives.
        tiers: where else tensors may be kept: "host", "nvme".

    Raises:
        PlanError: if no decision that was found meets the budget, naming the smallest peak.
    """
    plan = plan.replace(schedule="fixed")  # a schedule takes no more memory than the order that it is given
    assert plan.memory_budget is not None, "the plan has checked it"
    hardware = hardware_of(step, backend=backend)
    program = recipe(plan, backend=backend).run(step, check=False)
    profile = memory_profile(program)
    step_seconds = sum(compute_seconds(node, hardware) for node in program.calls())
    nothing = Decision(
        (), (), plan.memory_budget, profile.peak_bytes, profile.peak_bytes, 0.0, step_seconds, hardware.name, ()
    )
    if profile.peak_bytes <= plan.memory_budget:
        return nothing
    pointwise = "recompute_pointwise" not in plan.disable
    activations = Activations(step, hardware, tiers=tiers, pointwise=pointwise)
    return _Search(activations, program, profile, plan, backend).run(step, nothing)


class _Search:
    """Chooses one answer a block until the peak of the whole recipe's program is near the budget, and below."""

    def __init__(
        self, activations: Activations, program: StepGraph, profile: MemoryProfile, plan: Plan, backend: str
    ) -> None:
        assert plan.memory_budget is not None
        self.activations, self.plan, self.backend = activations, plan, backend
        self.budget = plan.memory_budget
        self.choices = [frontier(block.problem) for block in activations.blocks]
        lifetimes = Lifetimes(activations, program)
        alternatives = [
            [
                Alternative(choice.seconds - choices[0].seconds, lifetimes.change(block, choice, choices[0]))
                for choice in choices
            ]
            for block, choices in zip(activations.blocks, self.choices, strict=True)
        ]
        self.combination = Combination(lifetimes.alive, alternatives)
        self.lowest = profile

    def run(self, step: StepGraph, nothing: Decision) -> Decision:
        """The decision.

        Args:
            step: captured.
            nothing: the decision to recompute nothing, which does not meet the budget.
        """
        best: Decision | None = None
        tried: dict[tuple[int, ...], Decision] = {}
        low, high, aim = 0.0, float("inf"), float(self.budget)
        for _ in range(_MAX_AIMS):
            chosen = self.combination.within(aim)
            slack = 0
            if chosen is None:  # the estimate knows no answer: aim higher
                low = max(low, aim)
            else:
                if tuple(chosen) not in tried and len(tried) == _MAX_RUNS:
                    break
                found = tried.get(tuple(chosen)) or self._evaluated(step, chosen, nothing)
                tried[tuple(chosen)] = found
                slack = self.budget - found.peak_bytes
                if slack >= 0 and (best is None or (found.seconds, found.peak_bytes) < (best.seconds, best.peak_bytes)):
                    best = found
                if 0 <= slack <= _CLOSE * self.budget:
                    break
                low, high = (max(low, aim), high) if slack > 0 else (low, min(high, aim))
            aim += slack
            if not low < aim < high:
                aim = (low + high) / 2
            if not high - low > _CLOSE * self.budget or aim == float("inf"):
                break
        # What fits by the estimate alone may still not fit: the other passes have their own needs.
        blocks = zip(self.activations.blocks, self.choices, strict=True)
        fewest = [len(choices) - 1 if block.name else 0 for block, choices in blocks]
        for chosen in (self.combination.smallest(), fewest) if best is None else ():
            if best is None and tuple(chosen) not in tried:
                found = self._evaluated(step, chosen, nothing)
                best = found if found.peak_bytes <= self.budget else None
        if best is None:
            raise _above(self.plan, self.lowest, what="smallest predicted peak that was found")
        return best

    def _evaluated(self, step: StepGraph, chosen: list[int], nothing: Decision) -> Decision:
        """The decision for one answer a block, with the peak that the recipe then has."""
        answers = [
            (block, choices[number])
            for block, choices, number in zip(self.activations.blocks, self.choices, chosen, strict=True)
            if number
        ]
        names = tuple(name for block, choice in answers for name in names_of(block, choice))
        offloaded = tuple(
            root.name
            for tier in self.activations.tiers
            for block, choice in answers
            for root in _kept_as(block, choice, tier)
        )
        decided = recipe(self.plan, backend=self.backend, recomputed=names, offloaded=offloaded)
        program = decided.run(step, check=False)
        profile = memory_profile(program)
        if profile.peak_bytes < self.lowest.peak_bytes:
            self.lowest = profile
        pairs = zip(self.activations.blocks, self.choices, chosen, strict=True)
        changes = [(block, choices[0], choices[number]) for block, choices, number in pairs]
        groups = groups_of(changes, hardware=self.activations.hardware, free=self.activations.free)
        return replace(
            nothing,
            names=names,
            offloaded=offloaded,
            peak_bytes=profile.peak_bytes,
            seconds=sum(after.seconds - before.seconds for _, before, after in changes),
            groups=groups,
        )


def names_of(block: Block, choice: Choice) -> list[str]:
    """What `recompute_chosen` is told: nodes to have again, and masks to keep as booleans."""
    again = [block.nodes[index].name for index in choice.again]
    return again + [root.name for root in _kept_as(block, choice, "bool")]


def _kept_as(block: Block, choice: Choice, name: str) -> list[fx.Node]:
    return [block.roots[s] for s, option in choice.kept if block.problem.storages[s][option].name == name]


def groups_of(
    changes: list[tuple[Block, Choice, Choice]], *, hardware: Hardware, free: set[fx.Node]
) -> tuple[Group, ...]:
    """What an answer a block means, by the modules that it is about."""
    copies: dict[str, int] = {}
    touched: dict[tuple[str, str], set[str]] = {}
    saved: dict[tuple[str, str], int] = {}
    seconds: dict[tuple[str, str], float] = {}
    for block, _, _ in changes:
        copies[list_of(block.name)] = copies.get(list_of(block.name), 0) + 1
    for block, before, after in changes:
        if before is after:
            continue
        for storage, was, now in _changed(before, after):
            options = block.problem.storages[storage]
            tier = options[now].name if now is not None and options[now].name in TIERS else None
            key = (_where(block.roots[storage], block), RECOMPUTED if tier is None else f"offloaded to {tier}")
            sizes = [0 if option is None else options[option].kept_bytes for option in (was, now)]
            saved[key] = saved.get(key, 0) + sizes[0] - sizes[1]
            if tier is not None and now is not None:
                seconds[key] = seconds.get(key, 0.0) + options[now].seconds
                touched.setdefault(key, set()).add(block.name)
        for index in after.again:
            node = block.nodes[index]
            key = (_where(node, block), RECOMPUTED)
            if node not in free:
                seconds[key] = seconds.get(key, 0.0) + compute_seconds(node, hardware)
                touched.setdefault(key, set()).add(block.name)
    groups = [
        Group(*key, len(names), copies[list_of(min(names))], saved.get(key, 0), seconds[key])
        for key, names in touched.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-group.saved_bytes, group.where, group.how)))


def _changed(before: Choice, after: Choice) -> Iterator[tuple[int, int | None, int | None]]:
    """(storage, its option before, its option after) where these differ; None: it is not kept."""
    was, now = dict(before.kept), dict(after.kept)
    for storage in sorted(was.keys() | now.keys()):
        if was.get(storage) != now.get(storage):
            yield storage, was.get(storage), now.get(storage)


def _where(node: fx.Node, block: Block) -> str:
    """The module that made a node, down to the children of its block: layers.*.mlp."""
    module = str(node.meta["module"])
    if not block.name:
        return module.partition(".")[0] or "the model"
    child = module[len(block.name) + 1 :].partition(".")[0] if module.startswith(block.name) else ""
    parent = list_of(block.name)
    return ".".join(part for part in (parent, "*", child) if part)


def _above(plan: Plan, profile: MemoryProfile, *, what: str, other: str = "") -> PlanError:
    """The error for a peak that is above the budget, with what stands in it."""
    groups = profile.grouped()
    largest = [f"{g.kind} of {g.module or 'the model'} {size_text(g.num_bytes)}" for g in groups[:4]]
    zero = "" if plan.zero == 3 else "zero=3, "
    offload = "" if plan.offload_optimizer != "none" else "offload_optimizer='host', "
    return PlanError.of(
        "Plan.memory_budget",
        expected=f"at least {size_text(profile.peak_bytes)}, the {what} on this rank (at "
        f"%{profile.peak_node.name}: {', '.join(largest)})",
        got=size_text(plan.memory_budget or 0),
        fix=f"{other}give it more, or need less: {zero}{offload}a smaller batch (accumulate=..), more ranks",
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
