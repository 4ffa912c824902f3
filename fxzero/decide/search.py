"""One decision for a step: for each tensor, whether it is kept, had again, or rests elsewhere, for the least time.

The way of a decision: the recipe runs with nothing decided; where its peak is above the budget, one answer is chosen
for each block's activations and for each group of state so that no place of that program holds too much
(`combination`), and the recipe runs again with these. What other passes make of it is in that run's peak: the bound is
corrected by what it is off, at most a few times. No clock and no order of a set has a say, so that ranks with equal
graphs decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import hardware_of
from fxzero.cost.memory import MemoryProfile, bytes_beside, highest_profile, memory_profile, memory_timeline
from fxzero.cost.recorded import RecordedCosts
from fxzero.decide.activation_answers import ActivationAnswers
from fxzero.decide.activations import Activations
from fxzero.decide.combination import Combination
from fxzero.decide.decision import Decision, in_order
from fxzero.decide.state_answers import StateAnswers
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.placement import NOTHING_PLACED, Placement
from fxzero.graph.text import size_text
from fxzero.pass_manager import Pipeline
from fxzero.plan import Plan
from fxzero.plan_buckets import bucket_bytes
from fxzero.plan_offload import activation_tiers, leaves_state_open, uses
from fxzero.recipe import Decided, recipe, recomputed_from

_MAX_RUNS = 6  # of the recipe, beside the one with nothing decided
_MAX_AIMS = 16
_CLOSE = 0.005  # of the budget: a peak that is so near it is not corrected
_STEP = 0.002  # of the budget: an answer that is too large by less has others like it


def leaves_open(plan: Plan) -> bool:
    """Whether a plan wants a decision."""
    return plan.recompute == "auto" or leaves_state_open(plan)


def decided_recipe(
    step: StepGraph,
    *,
    plan: Plan,
    backend: str,
    beside: Sequence[StepGraph] = (),
    placed: Placement | None = None,
    costs: RecordedCosts | None = None,
) -> tuple[Pipeline, Decision | None]:
    """The pipeline for a captured step, with what its plan leaves open decided.

    Args:
        step: captured, with the mesh of the plan.
        plan: resolved.
        backend: what carries collectives.
        beside: the step's other microbatches (finished programs of later ones, earlier ones as captured): what rests
            for them is there too.
        placed: where state rests, if that is decided already.
        costs: recorded ones, for the schedule alone.

    Raises:
        PlanError: if the budget cannot be met.
    """
    others = bytes_beside(step, beside)
    if not leaves_open(plan):
        return recipe(plan, backend=backend, decided=Decided(bytes_beside=others), costs=costs), None
    decision = decide(step, plan=plan, backend=backend, beside=beside, placed=placed)
    decided = replace(decision.decided, bytes_beside=others)
    return recipe(plan, backend=backend, decided=decided, costs=costs), decision


def check_budget(steps: Sequence[StepGraph], *, plan: Plan) -> None:
    """Check that the predicted peak of finished programs is within the plan's budgets, whatever the plan recomputes.

    Args:
        steps: the programs of one step, one a microbatch.
        plan: resolved.

    Raises:
        PlanError: naming both, and what stands in the peak.
    """
    if plan.memory_budget is None and plan.host_budget is None:
        return
    profile = highest_profile(steps)[1]
    if plan.memory_budget is not None and profile.peak_bytes > plan.memory_budget:
        other = "" if plan.recompute == "auto" else "set recompute='auto', "
        raise _above(plan, profile, what="predicted peak", other=other)
    if plan.host_budget is not None and profile.host_bytes > plan.host_budget:
        raise PlanError.of(
            "Plan.host_budget",
            expected=f"at least {size_text(profile.host_bytes)}, the predicted peak of what this rank offloads to it",
            got=size_text(plan.host_budget),
            fix="give it more, or let something rest in files: offload_optimizer='nvme'",
        )


def decide(
    step: StepGraph,
    *,
    plan: Plan,
    backend: str,
    beside: Sequence[StepGraph] = (),
    placed: Placement | None = None,
) -> Decision:
    """Decide what a plan leaves open, for the least time with a predicted peak within the plan's budgets.

    Args:
        step: captured, with the mesh of the plan; it is not changed.
        plan: resolved.
        backend: what carries collectives.
        beside: the step's other microbatches, as for `decided_recipe`.
        placed: where state rests, if that is decided already.

    Raises:
        PlanError: if no decision that was found meets the budgets, naming the smallest peak.
    """
    # Neither a schedule nor buckets by cost take more memory than these where a budget is given.
    regather = False if plan.regather is False else None
    plan = plan.replace(schedule="fixed", costs=None, costs_of_any_machine=False)
    plan = plan.replace(bucket_bytes=bucket_bytes(plan), regather=regather)
    hardware = hardware_of(step, backend=backend)
    base = Decided(placed=placed or NOTHING_PLACED)
    program = recipe(plan, backend=backend, decided=base).run(step, check=False)
    profile = memory_profile(program, beside=beside)
    nothing = Decision(
        decided=base,
        budget_bytes=plan.memory_budget,
        peak_bytes=profile.peak_bytes,
        kept_peak_bytes=profile.peak_bytes,
        host_bytes=profile.host_bytes,
        step_seconds=sum(compute_seconds(node, hardware) for node in program.calls()),
        hardware=hardware.name,
    )
    fits = plan.memory_budget is None or profile.peak_bytes <= plan.memory_budget
    if fits and plan.update_on_host != "auto":
        return nothing
    activations, state = None, None
    if plan.recompute == "auto":
        pointwise = "recompute_pointwise" not in plan.disable
        whole = recomputed_from(step, plan, backend=backend)
        found = Activations(whole, hardware, tiers=activation_tiers(plan), pointwise=pointwise)
        activations = ActivationAnswers(found, program, host_is_bounded=plan.host_budget is not None)
    if leaves_state_open(plan) and placed is None:
        state = StateAnswers(program, plan=plan, hardware=hardware)
    return _Search(activations, state, program, profile, plan, backend, beside).run(step, nothing)


class _Search:
    """Chooses an answer a block or group until the peak of the whole recipe's program is near the budget, and below."""

    def __init__(
        self,
        activations: ActivationAnswers | None,
        state: StateAnswers | None,
        program: StepGraph,
        profile: MemoryProfile,
        plan: Plan,
        backend: str,
        beside: Sequence[StepGraph],
    ) -> None:
        self.activations, self.state = activations, state
        self.plan, self.backend, self.beside = plan, backend, beside
        self.budget = plan.memory_budget
        self.host_budget = plan.host_budget
        found = [*(activations.alternatives if activations else []), *(state.alternatives if state else [])]
        self.alternatives = found
        alive = memory_timeline(program, beside=beside).total.astype(float)
        spare = float("inf") if plan.host_budget is None else plan.host_budget - profile.host_bytes
        self.combination = Combination(alive, found, host_bytes=spare)
        self.lowest = profile

    def run(self, step: StepGraph, nothing: Decision) -> Decision:
        """The decision.

        Args:
            step: captured.
            nothing: the decision to change nothing.
        """
        if not self.alternatives:
            if self.budget is None or nothing.peak_bytes <= self.budget:
                return nothing
            raise _above(self.plan, self.lowest, what="smallest predicted peak that was found")
        if self.budget is None:
            return self._fastest(step, nothing)
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
                best = self._better(found, best)
                if 0 <= slack <= _CLOSE * self.budget:
                    break
                low, high = (max(low, aim), high) if slack > 0 else (low, min(high, aim))
            aim += slack if slack >= 0 else min(slack, -_STEP * self.budget)
            if not low < aim < high:
                aim = (low + high) / 2
            if not high - low > _CLOSE * self.budget or aim == float("inf"):
                break
        # What fits by the estimate alone may still not fit: the other passes have their own needs.
        for chosen in (self.combination.smallest(), self._least()) if best is None else ():
            if best is None and tuple(chosen) not in tried:
                found = self._evaluated(step, chosen, nothing)
                best = self._better(found, best)
        if best is None:
            raise _above(self.plan, self.lowest, what="smallest predicted peak that was found")
        return best

    def _better(self, found: Decision, best: Decision | None) -> Decision | None:
        """What was found, where it fits and loses less time than the best so far."""
        fits = self.budget is None or found.peak_bytes <= self.budget
        fits = fits and (self.host_budget is None or found.host_bytes <= self.host_budget)
        if fits and (best is None or (found.seconds, found.peak_bytes) < (best.seconds, best.peak_bytes)):
            return found
        return best

    def _fastest(self, step: StepGraph, nothing: Decision) -> Decision:
        """Without a budget: what takes the least time."""
        chosen = self.combination.within(float("inf"))
        return nothing if chosen is None else self._evaluated(step, chosen, nothing)

    def _least(self) -> list[int]:
        """The answers that keep the least."""
        return [number for source in (self.activations, self.state) if source for number in source.least()]

    def _evaluated(self, step: StepGraph, chosen: list[int], nothing: Decision) -> Decision:
        """The decision for one answer each, with the peak that the recipe then has."""
        count = len(self.activations.alternatives) if self.activations else 0
        decided, groups = nothing.decided, []
        if self.activations is not None:
            decided = replace(self.activations.decided(chosen[:count]), placed=decided.placed)
            groups += self.activations.groups(chosen[:count])
        if self.state is not None:
            decided = replace(decided, placed=self.state.placed(chosen[count:]))
            groups += self.state.groups(chosen[count:])
        program = recipe(self.plan, backend=self.backend, decided=decided).run(step, check=False)
        profile = memory_profile(program, beside=self.beside)
        fits_host = self.host_budget is None or profile.host_bytes <= self.host_budget
        if fits_host and profile.peak_bytes < self.lowest.peak_bytes:
            self.lowest = profile
        pairs = zip(self.alternatives, chosen, strict=True)
        return replace(
            nothing,
            decided=decided,
            peak_bytes=profile.peak_bytes,
            host_bytes=profile.host_bytes,
            seconds=sum(alternatives[number].seconds for alternatives, number in pairs),
            groups=in_order(groups),
        )


def _above(plan: Plan, profile: MemoryProfile, *, what: str, other: str = "") -> PlanError:
    """The error for a peak that is above the budget, with what stands in it."""
    groups = profile.grouped()
    largest = [f"{g.kind} of {g.module or 'the model'} {size_text(g.num_bytes)}" for g in groups[:4]]
    zero = "" if plan.zero == 3 else "zero=3, "
    offload = "" if plan.offload_optimizer != "none" else "offload_optimizer='host', "
    if plan.host_budget is not None and plan.offload_dir is None and uses(plan, "auto"):
        offload = "a larger host_budget, offload_dir (for files), "
    return PlanError.of(
        "Plan.memory_budget",
        expected=f"at least {size_text(profile.peak_bytes)}, the {what} on this rank (at "
        f"%{profile.peak_node.name}: {', '.join(largest)})",
        got=size_text(plan.memory_budget or 0),
        fix=f"{other}give it more, or need less: {zero}{offload}a smaller batch (accumulate=..), more ranks",
    )
