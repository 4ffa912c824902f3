"""compile(model, optimizer, plan) -> TrainStep: the page to read first.

The way of a step: a call with a new signature is captured (one graph, single-device meaning), rewritten by the
plan's passes, verified after each, agreed upon by all ranks, lowered to a program and run. Calls with a known
signature only run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero import arguments, compat
from fxzero.arguments import check_model, check_types, device_of
from fxzero.capture import Inventory
from fxzero.capture.changing_sizes import SizedCapture, contiguous
from fxzero.capture.loss_scaling import OVERFLOWED, SCALE, SKIPPED
from fxzero.capture.signature import flatten_batch
from fxzero.capture.trace import LossFn
from fxzero.cost.recorded import Machine, RecordedCosts
from fxzero.errors import CaptureError, FxzeroError, PlanError
from fxzero.graph.axis_placement import SPLIT_AXES
from fxzero.graph.step_graph import CARRIED_KINDS, LAUNCHED
from fxzero.lower.choose import with_lowering
from fxzero.lower.inductor import check_compiler
from fxzero.lower.triton import check_triton
from fxzero.plan import Plan
from fxzero.profile import Profiled, costs_of
from fxzero.programs import Compiled, Programs, joined_text
from fxzero.readable import Readable
from fxzero.recipe import auxiliary_state, captured_as, shares_rows
from fxzero.runtime.agreement import Agreement
from fxzero.runtime.checkpoint import load_state_dict, state_dict
from fxzero.runtime.cuda_graph import graph_calls
from fxzero.runtime.in_common import InCommon
from fxzero.runtime.launched_ahead import LaunchedAhead, Rows
from fxzero.runtime.layout import laid_out_by
from fxzero.runtime.materialize import Init
from fxzero.runtime.microbatches import Batch, joined_metrics
from fxzero.runtime.recording import Recording
from fxzero.runtime.skipped_steps import SkippedSteps
from fxzero.runtime.state import StepState
from fxzero.runtime.topology import Topology
from fxzero.runtime.unsharded import unsharded

log = logging.getLogger("fxzero")


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


class TrainStep(Readable, Profiled):
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
        self._topology = Topology.of(plan, self._device.type).sharing_memory()
        self.plan = with_lowering(self._topology.plan, self._device)
        auxiliary = auxiliary_state(self.plan, dict(model.named_parameters()))
        if self.plan.lowering == "inductor":
            check_compiler(self._device)
        if self.plan.lowering == "triton":
            check_triton(self._device)
        self._state = StepState(
            model,
            optimizer,
            self._topology,
            device=self._device,
            auxiliary=auxiliary,
            init=init,
            share_rows=shares_rows(self.plan, self._topology.backend),
        )
        self._options = replace(captured_as(self.plan), device=self._device)
        self._programs = Programs(
            self.plan,
            self._state,
            loss,
            options=self._options,
            groups=self._topology.groups,
            backend=self._topology.backend,
            graphs=graph_calls(self.plan, self._device, backend=self._topology.backend),
        )
        self._ahead = LaunchedAhead(self._topology.groups)
        self._agreement = Agreement(timeout_s=self.plan.timeout_s, alike=self._topology.groups_along(*SPLIT_AXES))
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
            self._learn_costs()
            batch = Batch.of(args, kwargs, number=self.plan.accumulate, device=self._device)
            inventory = Inventory.of(self.model, self.optimizer)
            programs = self._programs.of(inventory, batch)
            changed = self.plan.cross_step and self._ahead.is_stale(self._rows(inventory))
        text = joined_text(tuple(compiled.text for compiled in programs))
        changed = self._agreement.settle(text, changed=changed, common=InCommon(batch, self._device))
        self._state.place(programs[-1].placed)
        if self._state.laid_out is None:  # or not bound, which comes to the same: a step binds what it has laid out
            self._state.lay_out(laid_out_by(programs[-1].step))
            self._bind()
            inventory = Inventory.of(self.model, self.optimizer)
            self._programs.keep(inventory, programs, batch)
        fresh = self._state.fresh
        loss = self._run(programs, inventory, batch, changed)
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

    def _run(self, programs: list[Compiled], inventory: Inventory, batch: Batch, changed: bool) -> torch.Tensor:
        """Run one program a microbatch; what one returns for the next is the next one's alone.

        Args:
            programs, inventory, batch: of the step.
            changed: whether parameters have changed, on some rank, since gathers were launched for this step.
        """
        losses, metrics = [], []
        rows = self._rows(inventory)
        across = self.plan.cross_step
        carried: dict[str, Any] = self._ahead.take(programs[0].step, rows, anew=changed) if across else {}
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
            launched = {name: found.pop((kind, name)) for kind, name in [*found] if kind == LAUNCHED}
            if across:
                self._ahead.keep(compiled.step, launched, rows)
            for (kind, name), value in found.items():
                self._state.write_back(kind, name, value)
        self.metrics = joined_metrics(metrics)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _inputs(
        self, compiled: Compiled, inventory: Inventory, batch: Batch, index: int, carried: dict[str, Any]
    ) -> list[Any]:
        of_batch = batch.microbatches[index]
        if isinstance(compiled.capture, SizedCapture):
            of_batch = contiguous(of_batch)
        leaves = {**dict(flatten_batch(*of_batch)[0]), **batch.weight_inputs(index)}
        constants = compiled.capture.constants
        inputs = []
        for entry in compiled.program.entries:
            if entry.kind == "batch":
                inputs.append(leaves[entry.name])
            elif entry.kind == "constant":
                inputs.append(constants[entry.name])
            elif entry.kind in (*CARRIED_KINDS, LAUNCHED):
                inputs.append(carried.pop(entry.name))
            else:
                inputs.append(self._state.lookup(inventory, entry.kind, entry.name))
        return inputs

    def _rows(self, inventory: Inventory) -> Rows:
        """Name of a parameter -> what the model owns, and the memory of this rank's rows."""

        def rows(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            memory = self._state.lookup(inventory, "parameter", name)
            return inventory.parameters[name], memory

        return rows

    @contextlib.contextmanager
    def _telling_other_ranks(self) -> Iterator[None]:
        """If this rank cannot run the step, the others learn of it at once rather than by a timeout."""
        try:
            yield
        except Exception as error:
            self._agreement.fail(str(error) if isinstance(error, FxzeroError) else repr(error))
            raise

    # ---- recorded costs

    def schedule_by(self, costs: Recording | RecordedCosts | str | Path) -> None:
        """From the next step on, programs are ordered by rank 0's recorded costs; every rank must call this.

        Args:
            costs: a recording of this step (`record`), costs, or their file; that of rank 0 counts, others' are not
                looked at.

        Raises:
            PlanError: if the plan's schedule is not "cost".
            HardwareError: on rank 0, if there is no such file or it is another machine's.
            RankMismatchError: on the others, then.
        """
        if self.plan.schedule != "cost":
            fix = "compile with Plan(schedule='cost')"
            got = repr(self.plan.schedule)
            raise PlanError.of("step.schedule_by(...)", expected="schedule 'cost'", got=got, fix=fix)
        self._programs.costs = self._costs_of_first(costs)
        self._programs.forget()

    def _learn_costs(self) -> None:
        if self.plan.costs is not None and self._programs.costs is None:
            self._programs.costs = self._costs_of_first(self.plan.costs)

    def _costs_of_first(self, source: Recording | RecordedCosts | str | Path) -> RecordedCosts:
        def text() -> str:
            if isinstance(source, Recording):
                return costs_of(source, self._device).as_text()
            if isinstance(source, RecordedCosts):
                return source.as_text()
            machine, force = Machine.of(self._device), self.plan.costs_of_any_machine
            return RecordedCosts.load(source, machine=machine, force=force).as_text()

        return RecordedCosts.from_text(self._agreement.from_first(text), where="rank 0's recorded costs")

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
