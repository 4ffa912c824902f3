"""The programs of a step: captured, decided, rewritten and lowered when first needed, and found again later."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxzero.capture import Capture, Inventory, Signature
from fxzero.capture.accumulation import Accumulation
from fxzero.capture.changing_sizes import Captures, Example, SizedCapture
from fxzero.capture.options import CaptureOptions
from fxzero.capture.symbolic import SymbolicStep
from fxzero.capture.trace import LossFn
from fxzero.cost.recorded import RecordedCosts
from fxzero.decide import Decision, check_budget, decided_recipe
from fxzero.errors import FxzeroError
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED, STATE_AXES, placement_of
from fxzero.graph.axis_placement import Placement as AxisPlacement
from fxzero.graph.placement import NOTHING_PLACED, Placement
from fxzero.graph.step_graph import CARRIED_KINDS
from fxzero.lower.lower_regions import lower_by_plan
from fxzero.lower.sized_regions import AtSizes, SizedRegions
from fxzero.pass_manager import PassRecord, Pipeline
from fxzero.plan import Plan
from fxzero.runtime.agreement import agreed_text
from fxzero.runtime.cuda_graph import GraphCalls
from fxzero.runtime.graphed_program import GraphedProgram
from fxzero.runtime.microbatches import Batch
from fxzero.runtime.program import Program
from fxzero.runtime.state import StepState
from fxzero.sharding.hints import pin, pinned_by

log = logging.getLogger("fxzero")

Lies = Mapping[str, Mapping[str, AxisPlacement]]  # mesh axis -> name of a parameter -> how it lies

MOST_SHAPES = 64  # kinds of batches whose programs are kept


@dataclass(frozen=True)
class Compiled:
    """One signature's program and how it came to be.

    Args:
        captured: before any pass.
        step: after all of them.
        program: what runs.
        capture: guards and constants.
        text: what other ranks must agree to.
        records: what each pass did.
        seconds: phase of compilation -> time.
        accumulation: which of the step's microbatches it serves.
        decision: what was decided for it, where the plan leaves something open.
    """

    captured: StepGraph
    step: StepGraph
    program: Program | GraphedProgram
    capture: Capture
    text: str
    records: list[PassRecord]
    seconds: dict[str, float]
    accumulation: Accumulation
    decision: Decision | None = None

    @property
    def carries(self) -> tuple[str, ...]:
        """The parameters whose gradients it hands on to the next microbatch."""
        return carried(self.captured)

    @property
    def lies(self) -> Lies:
        """How its parameters lie over the mesh axes that split state."""
        nodes = self.step.inputs("parameter")
        axes = [axis for axis in STATE_AXES if axis in self.step.axes]
        return {axis: {node.meta["entry"].name: placement_of(node, axis) for node in nodes} for axis in axes}

    @property
    def placed(self) -> Placement:
        """Where it takes state to rest, as far as the plan leaves that open."""
        return NOTHING_PLACED if self.decision is None else self.decision.decided.placed


@dataclass(frozen=True)
class _Asked:
    """A program that is known, or the capture of one that is not."""

    known: list[Compiled]
    place: Accumulation
    found: Compiled | Capture

    @property
    def step(self) -> StepGraph:
        """The program, or what was captured."""
        return self.found.step

    @property
    def carries(self) -> tuple[str, ...]:
        return carried(self.found.captured if isinstance(self.found, Compiled) else self.found.step)


class Programs:
    """The compiled programs of one step on this rank.

    Args:
        plan: resolved.
        state: of the step.
        loss: the user's, if any.
        options: what the plan says of a capture.
        groups: mesh axis -> process group.
        backend: what carries collectives.
        graphs: what makes a CUDA graph of each program, where the plan asks for that.

    Attributes:
        costs: recorded ones, by which programs to come are ordered; the same on all ranks.
    """

    def __init__(
        self,
        plan: Plan,
        state: StepState,
        loss: LossFn | None,
        *,
        options: CaptureOptions,
        groups: Any,
        backend: str,
        graphs: GraphCalls | None = None,
    ) -> None:
        self._plan, self._state, self._loss, self._options = plan, state, loss, options
        self._groups, self._backend, self._graphs = groups, backend, graphs
        self._compiled: dict[tuple[Signature, Accumulation], list[Compiled]] = {}  # the last used one is last
        self._captures = Captures(plan.dynamic)
        self._regions = SizedRegions()
        self._num_made = self._first_sized = 0
        self._has_run = False
        self.costs: RecordedCosts | None = None

    def shapes(self, last: Compiled) -> str:
        """Which sizes of the batch are symbols and what that has come to, as a line; "" while there is one shape.

        Args:
            last: the program that it is about.
        """
        number, names = len(self._compiled), ", ".join(getattr(last.capture, "sizes", ()))
        parts = [f"shapes: {number} programs" if number > 1 else "shapes: 1 program"]
        if names:
            parts.append(f"{names} symbolic since program {self._first_sized}")
        if self._captures.refused:
            parts.append(
                f"{len(self._captures.refused)} captured for one shape, the last as {self._captures.refused[-1]}"
            )
        lowered = last.program.lowered
        if lowered is not None and lowered.num_alone is not None:
            parts.append(f"{lowered.num_open} regions of symbolic sizes, {lowered.num_alone} compiled for one shape")
        return "; ".join(parts) if number > 1 or len(parts) > 1 else ""

    def forget(self) -> None:
        """Compile what comes anew."""
        self._compiled.clear()

    def of(self, inventory: Inventory, batch: Batch) -> list[Compiled]:
        """The programs of a step, one a microbatch; equal microbatches share theirs.

        They are captured first to last, since each says what it hands on, and compiled last to first, since the one
        that updates decides where state rests.
        """
        if not self._state.bound:  # so that a failure leaves model and optimizer as they were
            inventory = self._state.rehearsal()
            self._compiled.clear()
            self._captures.forget()
        asked: list[_Asked] = []
        for index, (args, kwargs) in enumerate(batch.microbatches):
            carries = asked[-1].carries if asked else ()
            place = self._options.accumulation.at(index, weighted=batch.weights is not None, carried=carries)
            before = [a for a in asked if a.place == place]
            asked.append(self._asked(inventory, place, args, kwargs, before))
        placed = self._state.homes.placed if self._state.bound else None
        lies = self._lies()
        steps = [one.step for one in asked]
        done: dict[int, Compiled] = {}
        programs: list[Compiled] = []
        fresh = False
        for index, one in reversed(list(enumerate(asked))):
            found = one.found if isinstance(one.found, Compiled) else done.get(id(one.found))
            if found is None:
                fresh = True
                found = done[id(one.found)] = self._new(one, [*steps[:index], *steps[index + 1 :]], placed, lies)
            placed = found.placed if placed is None else placed
            lies = found.lies
            steps[index] = found.step
            programs.insert(0, found)
        if fresh:
            check_budget([compiled.step for compiled in programs], plan=self._plan)
            self._drop_least_used(len(batch.microbatches))
        self._has_run = True
        return programs

    def _lies(self) -> Lies:
        """How parameters have to lie: as the model's own do already, or as hints of the plan say."""
        axes = [axis for axis in STATE_AXES if self._plan.axes.get(axis, 1) > 1]
        given = self._state.laid_out
        if given is None:
            return {"tp": pinned_by(self._plan, self._state.model)} if "tp" in axes else {}
        names = [name for name, _ in self._state.model.named_parameters()]
        over = {name: given.get(("parameter", name), {}) for name in names}
        return {axis: {name: over[name].get(axis, REPLICATED) for name in names} for axis in axes}

    def keep(self, inventory: Inventory, programs: list[Compiled], batch: Batch) -> None:
        """Programs made before model and optimizer were bound serve those that are."""
        self._compiled.clear()
        for compiled, (args, kwargs) in zip(programs, batch.microbatches, strict=True):
            example = self._example(inventory, compiled.accumulation, args, kwargs)
            self._compiled[(example.signature, compiled.accumulation)] = [compiled]
            self._captures.note(example)

    def _drop_least_used(self, in_use: int) -> None:
        """Keep no more programs than MOST_SHAPES, but all that are in use."""
        surplus = len(self._compiled) - max(MOST_SHAPES, in_use)
        for key in [*self._compiled][:surplus] if surplus > 0 else ():
            log.info("fxzero: more than %d kinds of batches: the program of the least used one is dropped", MOST_SHAPES)
            del self._compiled[key]

    def _asked(
        self,
        inventory: Inventory,
        place: Accumulation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: Sequence[_Asked],
    ) -> _Asked:
        """A known program for a microbatch, or a capture: of this step's earlier microbatches where it is the same.

        Args:
            inventory: what is captured.
            place: of the microbatch in the step.
            args, kwargs: the microbatch.
            before: what was asked for earlier ones in the same place.
        """
        example = self._example(inventory, place, args, kwargs)
        key = example.signature, place
        known = self._compiled.setdefault(key, [])
        if len(self._compiled) > 1:
            self._compiled[key] = self._compiled.pop(key)
        alike = next((a for a in before if a.known is known), None)
        if not self._state.bound:
            return alike or _Asked(known, place, self._captures.of(example, None))
        lookup = functools.partial(self._state.lookup, inventory)
        for compiled in known:
            if compiled.capture.guards.hold(lookup, inventory.attributes):
                return _Asked(known, place, compiled)
        if alike is not None:
            return alike
        if self._has_run:
            log.info("fxzero: capturing again: the signature or a guard has changed")
        self._state.prime(inventory)  # a parameter may have been unfrozen
        capture = self._captures.of(example, lookup)
        for compiled in known:
            if compiled.capture.same_as(capture):
                compiled.capture.guards.relax(lookup, inventory.attributes)
                return _Asked(known, place, compiled)
        return _Asked(known, place, capture)

    def _at(self, capture: Capture, decided: Callable[..., Any]) -> AtSizes | None:
        """Where a program stands among those of other sizes, if there may be any."""
        if not isinstance(capture, SizedCapture):
            return None
        sizes, source = capture.sizes, capture.source
        elsewhere = functools.partial(_elsewhere, source, sizes, self._plan.axes, decided)
        return AtSizes(sizes, source, self._regions, elsewhere)

    def _new(self, asked: _Asked, beside: Sequence[StepGraph], placed: Placement | None, lies: Lies) -> Compiled:
        assert isinstance(asked.found, Capture)
        self._num_made += 1
        if isinstance(asked.found, SizedCapture):
            self._first_sized = self._first_sized or self._num_made
        asked.known.append(self._compile(asked.found, asked.place, beside, placed, lies))
        return asked.known[-1]

    def _example(
        self, inventory: Inventory, place: Accumulation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Example:
        options = replace(self._options, accumulation=place)
        signature = Signature.of(inventory, args, kwargs, fresh=self._state.fresh)
        return Example(inventory, self._loss, args, kwargs, options, signature)

    def _compile(
        self, capture: Capture, place: Accumulation, beside: Sequence[StepGraph], placed: Placement | None, lies: Lies
    ) -> Compiled:
        """A capture's program.

        Args:
            capture: of one microbatch.
            place: of that microbatch in the step.
            beside: the step's other microbatches: finished programs of later ones, earlier ones as captured.
            placed: where state rests, if that is decided.
            lies: how parameters lie over mesh axes, as far as that is given.
        """
        plan = self._plan
        seconds = {"capture": capture.seconds}

        def decided(step: StepGraph) -> tuple[Pipeline, Decision | None]:
            how: Any = {"backend": self._backend, "beside": beside, "placed": placed, "costs": self.costs}
            for axis, placements in lies.items():
                pin(step, placements, axis=axis)
            return decided_recipe(step, plan=plan, **how)

        capture.step.mesh = dict(plan.axes)
        with _timed(seconds, "decide"):
            pipeline, decision = decided(capture.step)
        with _timed(seconds, "passes"):
            step = pipeline.run(capture.step)
        with _timed(seconds, "lower"):
            program = self._program(step, self._at(capture, decided))
        text = agreed_text(step, plan=plan.fingerprint(), passes=pipeline.describe())
        return Compiled(capture.step, step, program, capture, text, list(pipeline.records), seconds, place, decision)

    def _program(self, step: StepGraph, at: AtSizes | None) -> Program | GraphedProgram:
        """What runs a finished graph.

        Args:
            step: the graph.
            at: its sizes, where others may come.
        """
        lower = functools.partial(lower_by_plan, plan=self._plan, at=at)
        if self._graphs is not None:
            return GraphedProgram(step, groups=self._groups, lower=lower, calls=self._graphs)
        return Program(step, groups=self._groups, swapper=self._state.homes.swapper, lowered=lower(step))


def _elsewhere(
    source: SymbolicStep, sizes: Mapping[str, int], mesh: Mapping[str, int], decided: Callable[..., Any]
) -> Iterator[tuple[StepGraph, Mapping[str, int]]]:
    """Programs of a trace at other sizes than these, and which; only regions are asked for, nothing runs them."""
    for others in source.elsewhere(**sizes):
        try:
            captured = source.at(**others)
            captured.mesh = dict(mesh)
            step = decided(captured)[0].run(captured)
        except FxzeroError as error:
            log.info("fxzero: no program at %s, where regions were to be compared: %s", others, error)
            continue
        yield step, others


def carried(step: StepGraph) -> tuple[str, ...]:
    """The parameters whose gradients a captured step hands on to the next microbatch."""
    return tuple(name for kind, name in step.results if kind in CARRIED_KINDS)


@functools.lru_cache(maxsize=64)
def joined_text(texts: tuple[str, ...]) -> str:
    """What ranks agree on for one step: the texts of its programs, equal ones once, and the order in which they run."""
    distinct = list(dict.fromkeys(texts))
    order = " ".join(str(distinct.index(text)) for text in texts)
    return "\n".join(distinct) + (f"\nmicrobatches run programs {order}" if len(texts) > 1 else "")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
