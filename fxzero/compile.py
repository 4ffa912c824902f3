"""compile(model, optimizer, plan) -> TrainStep: the page to read first.

The way of a step: a call with a new signature is captured (one graph, single-device meaning), rewritten by the
plan's passes, verified after each, agreed upon by all ranks, lowered to a program and run. Calls with a known
signature only run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxzero import arguments, compat
from fxzero.arguments import check_model, check_types, device_of
from fxzero.capture import Capture, Inventory, Signature, capture_step
from fxzero.capture.accumulation import Accumulation
from fxzero.capture.loss_scaling import OVERFLOWED, SCALE, SKIPPED
from fxzero.capture.signature import flatten_batch
from fxzero.capture.trace import LossFn
from fxzero.decide import Decision, check_budget, decided_recipe
from fxzero.errors import CaptureError, FxzeroError, PlanError
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import CARRIED_KINDS
from fxzero.pass_manager import PassRecord
from fxzero.plan import Plan
from fxzero.profile import Profiled
from fxzero.recipe import auxiliary_state, captured_as
from fxzero.runtime.agreement import Agreement, agreed_text
from fxzero.runtime.checkpoint import load_state_dict, state_dict
from fxzero.runtime.materialize import Init
from fxzero.runtime.microbatches import Batch, joined_metrics
from fxzero.runtime.program import Program
from fxzero.runtime.skipped_steps import SkippedSteps
from fxzero.runtime.state import StepState
from fxzero.runtime.topology import Topology
from fxzero.runtime.unsharded import unsharded

log = logging.getLogger("fxzero")


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
    program: Program
    capture: Capture
    text: str
    records: list[PassRecord]
    seconds: dict[str, float]
    accumulation: Accumulation
    decision: Decision | None = None

    @property
    def carries(self) -> tuple[str, ...]:
        """The parameters whose gradients it hands on to the next microbatch."""
        return tuple(name for kind, name in self.captured.results if kind in CARRIED_KINDS)


def compile(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan | Mapping[str, Any] | None = None,
    *,
    loss: LossFn | None = None,
    init: Init | None = None,
) -> TrainStep:
    """Make one training step of model and optimizer a compiled program.

    Nothing is changed yet: the step is captured at its first call, and only when that has succeeded do model and
    optimizer come to own sharded state.

    Args:
        model: an ordinary module; on the meta device too, with `init` or a checkpoint to fill it.
        optimizer: built from the model's parameters.
        plan: what to do; default: ZeRO-3 over all ranks.
        loss: `loss(model, *args, **kwargs)` -> scalar, or (scalar, dict of metric tensors). Without it the model
            must return the scalar or an object with `.loss`.
        init: for meta models: fills the parameters and buffers that the given module owns itself (called for each
            module, children first, as by `Module.apply`).

    Raises:
        PlanError: if the plan cannot be honoured here.
        CaptureError: if model or optimizer can be seen at once not to fit.
    """
    plan = plan if isinstance(plan, Plan) else Plan.from_dict({} if plan is None else plan)
    check_types(model, optimizer)
    check_model(model)
    Inventory.of(model, optimizer)  # raises where the two do not belong together
    return TrainStep(model, optimizer, plan, loss=loss, init=init)


class TrainStep(Profiled):
    """A compiled training step; call it with a batch.

    Attributes:
        metrics: what else the last step computed, by name (detached tensors). Of several microbatches: theirs
            stacked; the gradient norm and the loss scale are the step's.
        plan: with its mesh resolved.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        *,
        loss: LossFn | None = None,
        init: Init | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.metrics: dict[str, torch.Tensor] = {}
        self._device = device_of(model)
        self._topology = Topology.of(plan, self._device.type)
        self.plan = self._topology.plan
        auxiliary = auxiliary_state(self.plan, dict(model.named_parameters()))
        self._state = StepState(model, optimizer, self._topology, device=self._device, auxiliary=auxiliary, init=init)
        self._options = replace(captured_as(self.plan), device=self._device)
        self._compiled: dict[tuple[Signature, Accumulation], list[Compiled]] = {}
        self._agreement = Agreement(timeout_s=self.plan.timeout_s)
        self._skipped = SkippedSteps(limit=self.plan.max_skipped_steps, dynamic=self._options.scaling.dynamic)
        self._last: list[Compiled] = []  # one a microbatch

    # ---- running

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward, backward, reduction and update on one batch.

        Args:
            args, kwargs: this rank's batch, as the model (or `loss`) takes it. With the plan's `accumulate`, it is
                split on dim 0; or one list of microbatches, each a tuple of arguments, a dict of keyword arguments, or
                the one argument. `weights=` then says how much each counts (its number of tokens, say).

        Returns:
            This rank's loss, detached; its mean over ranks is the loss of the whole batch. NaN is returned, not hidden.

        Raises:
            CaptureError: if the step cannot be captured; model and optimizer are then as before.
            PlanError: if the batch is not what `accumulate` says.
            RankMismatchError: on all ranks, if they are not about to run the same step.
            GradientOverflowError: if too many steps in a row had to be skipped.
        """
        with self._telling_other_ranks():
            self._skipped.check()
            self._check_ready()
            batch = Batch.of(args, kwargs, number=self.plan.accumulate, device=self._device)
            inventory = Inventory.of(self.model, self.optimizer)
            programs = self._find_all(inventory, batch)
        self._agreement.settle(_joined(tuple(compiled.text for compiled in programs)))
        if not self._state.bound:
            self._bind()
            inventory = Inventory.of(self.model, self.optimizer)
            self._keep(inventory, programs, batch)
        fresh = self._state.fresh
        loss = self._run(programs, inventory, batch)
        # A first step that was skipped makes the next one the first: the one thing that the host must ask for.
        self._state.stepped = not (fresh and self._options.scaling.initial and self.metrics["overflow"] > 0)
        compat.mark_stepped(self.optimizer)
        self._last = programs
        if self._options.scaling.initial:
            state = (self._state.lookup(inventory, "auxiliary", name) for name in (SCALE, SKIPPED, OVERFLOWED))
            self._skipped.note(torch.stack([n.double() for n in state]), programs[-1].capture.gradients)
        return loss

    def _check_ready(self) -> None:
        if self._state.is_unsharded:
            raise CaptureError.of(
                where="step(...)",
                expected="sharded parameters",
                got="a call inside `with step.unsharded()`",
                fix="leave the block first",
            )
        meta = [] if self._state.bound else [n for n, p in self.model.named_parameters() if p.is_meta]
        if self._state.awaits_checkpoint or (meta and self._state.init is None):
            raise PlanError.of(
                where=f"parameter {meta[0]}" if meta else "step(...)",
                expected="parameters with values",
                got="the meta device" if meta else "no checkpoint loaded yet",
                fix="pass init=fn to compile(), or load a checkpoint: dcp.load(sd := step.state_dict(), ...); "
                "step.load_state_dict(sd)",
            )

    def _run(self, programs: list[Compiled], inventory: Inventory, batch: Batch) -> torch.Tensor:
        """Run one program a microbatch; what one returns for the next is the next one's alone."""
        losses, metrics = [], []
        carried: dict[str, torch.Tensor] = {}
        for index, compiled in enumerate(programs):
            program = compiled.program
            try:
                values = program.run(self._inputs(compiled, inventory, batch, index, carried))
            except BaseException:
                self._state.homes.abandon()
                raise
            found = dict(zip(program.outputs, values, strict=True))
            del values
            losses.append(found.pop(("loss", "loss")))
            metrics.append({name: found.pop(("metric", name)) for kind, name in [*found] if kind == "metric"})
            carried = {name: found.pop((kind, name)) for kind, name in [*found] if kind in CARRIED_KINDS}
            for (kind, name), value in found.items():
                self._state.write_back(kind, name, value)
        self.metrics = joined_metrics(metrics)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _inputs(
        self, compiled: Compiled, inventory: Inventory, batch: Batch, index: int, carried: dict[str, torch.Tensor]
    ) -> list[Any]:
        leaves = {**dict(flatten_batch(*batch.microbatches[index])[0]), **batch.weight_inputs(index)}
        constants = compiled.capture.constants
        inputs = []
        for entry in compiled.program.entries:
            if entry.kind == "batch":
                inputs.append(leaves[entry.name])
            elif entry.kind == "constant":
                inputs.append(constants[entry.name])
            elif entry.kind in CARRIED_KINDS:
                inputs.append(carried.pop(entry.name))
            else:
                inputs.append(self._state.lookup(inventory, entry.kind, entry.name))
        return inputs

    # ---- compiling

    def _find_all(self, inventory: Inventory, batch: Batch) -> list[Compiled]:
        """The programs of a step, one a microbatch; equal microbatches share theirs."""
        if not self._state.bound:  # so that a failure leaves model and optimizer as they were
            inventory = self._state.rehearsal()
            self._compiled.clear()
        programs: list[Compiled] = []
        for index, (args, kwargs) in enumerate(batch.microbatches):
            carried = programs[-1].carries if programs else ()
            place = self._options.accumulation.at(index, weighted=batch.weights is not None, carried=carried)
            programs.append(self._find(inventory, place, args, kwargs))
        return programs

    def _find(
        self, inventory: Inventory, place: Accumulation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Compiled:
        signature = Signature.of(inventory, args, kwargs, fresh=self._state.fresh)
        known = self._compiled.setdefault((signature, place), [])
        if not self._state.bound:
            if not known:
                known.append(self._compile(self._capture(inventory, place, args, kwargs), place))
            return known[0]
        lookup = functools.partial(self._state.lookup, inventory)
        for compiled in known:
            if compiled.capture.guards.hold(lookup, inventory.attributes):
                return compiled
        if self._last:
            log.info("fxzero: capturing again: the signature or a guard has changed")
        self._state.prime(inventory)  # a parameter may have been unfrozen
        capture = self._capture(inventory, place, args, kwargs)
        for compiled in known:
            if compiled.capture.same_as(capture):
                compiled.capture.guards.relax(lookup, inventory.attributes)
                return compiled
        known.append(self._compile(capture, place))
        return known[-1]

    def _keep(self, inventory: Inventory, programs: list[Compiled], batch: Batch) -> None:
        """Programs made before model and optimizer were bound serve those that are."""
        self._compiled.clear()
        for compiled, (args, kwargs) in zip(programs, batch.microbatches, strict=True):
            signature = Signature.of(inventory, args, kwargs, fresh=self._state.fresh)
            self._compiled[(signature, compiled.accumulation)] = [compiled]

    def _capture(
        self, inventory: Inventory, place: Accumulation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Capture:
        options = replace(self._options, accumulation=place)
        return capture_step(inventory, self.loss, args, kwargs, options=options, fresh=self._state.fresh)

    def _compile(self, capture: Capture, place: Accumulation) -> Compiled:
        seconds = {"capture": capture.seconds}
        capture.step.mesh = dict(self.plan.axes)
        with _timed(seconds, "decide"):
            pipeline, decision = decided_recipe(capture.step, plan=self.plan, backend=self._topology.backend)
        with _timed(seconds, "passes"):
            step = pipeline.run(capture.step)
        check_budget(step, plan=self.plan)
        with _timed(seconds, "lower"):
            program = Program(step, groups=self._topology.groups, swapper=self._state.homes.swapper)
        text = agreed_text(step, plan=self.plan.fingerprint(), passes=pipeline.describe())
        return Compiled(capture.step, step, program, capture, text, list(pipeline.records), seconds, place, decision)

    @contextlib.contextmanager
    def _telling_other_ranks(self) -> Iterator[None]:
        """If this rank cannot run the step, the others learn of it at once rather than by a timeout."""
        try:
            yield
        except Exception as error:
            self._agreement.fail(str(error) if isinstance(error, FxzeroError) else repr(error))
            raise

    # ---- looking at it

    @property
    def graph(self) -> StepGraph:
        """The program of the last step (of its last microbatch), as an annotated graph; print it."""
        return self._require_last()[-1].step

    @property
    def graphs(self) -> list[StepGraph]:
        """The programs of the last step, one a microbatch; equal ones are the same object."""
        return [compiled.step for compiled in self._require_last()]

    @property
    def captured(self) -> StepGraph:
        """The graph of the last step (of its last microbatch) before any pass."""
        return self._require_last()[-1].captured

    def report(self) -> str:
        """Tables: state on this rank, communication per step, predicted peak and time, passes, time to compile."""
        from fxzero.report import report

        last = self._require_last()[-1]
        return report(self.graphs, self.plan, last.records, last.seconds, decision=last.decision)

    def _require_last(self) -> list[Compiled]:
        if not self._last:
            raise CaptureError.of(
                where="TrainStep",
                expected="a step that has run",
                got="none yet",
                fix="call step(batch) first: capture happens then",
            )
        return self._last

    # ---- state

    def _bind(self) -> None:
        self._state.bind()
        self._state.homes.settle_moves()
        arguments.owned.add(self.model)

    def unsharded(self, *, writeback: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """The plain model with whole parameters, until the block ends; all ranks must enter it.

        Args:
            writeback: keep what the block changed in the parameters.
        """
        self._bind()
        return unsharded(self._state, writeback=writeback)

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers, optimizer state and hyperparameters, for `torch.distributed.checkpoint`."""
        self._bind()
        return state_dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `torch.distributed.checkpoint.load` filled in a `state_dict()`."""
        self._bind()
        load_state_dict(self._state, state)


@functools.lru_cache(maxsize=64)
def _joined(texts: tuple[str, ...]) -> str:
    """What ranks agree on for one step: the texts of its programs, equal ones once, and the order in which they run."""
    distinct = list(dict.fromkeys(texts))
    order = " ".join(str(distinct.index(text)) for text in texts)
    return "\n".join(distinct) + (f"\nmicrobatches run programs {order}" if len(texts) > 1 else "")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
