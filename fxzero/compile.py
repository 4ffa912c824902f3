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
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxzero import compat
from fxzero.capture import Capture, Inventory, Signature, capture_step
from fxzero.capture.signature import flatten_batch
from fxzero.capture.trace import LossFn
from fxzero.errors import CaptureError, FxzeroError, PlanError
from fxzero.graph import StepGraph
from fxzero.pass_manager import PassRecord
from fxzero.plan import Plan
from fxzero.recipe import captured_as, recipe
from fxzero.runtime.agreement import Agreement, agreed_text
from fxzero.runtime.checkpoint import load_state_dict, state_dict
from fxzero.runtime.program import Program
from fxzero.runtime.state import Init, StepState
from fxzero.runtime.topology import Topology
from fxzero.runtime.unsharded import unsharded

log = logging.getLogger("fxzero")

_owned: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose parameters are a step's


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
    """

    captured: StepGraph
    step: StepGraph
    program: Program
    capture: Capture
    text: str
    records: list[PassRecord]
    seconds: dict[str, float]


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
    _check_types(model, optimizer)
    _check_model(model)
    Inventory.of(model, optimizer)  # raises where the two do not belong together
    return TrainStep(model, optimizer, plan, loss=loss, init=init)


class TrainStep:
    """A compiled training step; call it with a batch.

    Attributes:
        metrics: what else the last step computed, by name (detached tensors).
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
        self._topology = Topology.of(plan, _device_type(model))
        self.plan = self._topology.plan
        self._state = StepState(model, optimizer, self._topology, init=init)
        self._compiled: dict[Signature, list[Compiled]] = {}
        self._agreement = Agreement(timeout_s=self.plan.timeout_s)
        self._last: Compiled | None = None

    # ---- running

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward, backward, reduction and update on one batch.

        Args:
            args, kwargs: this rank's batch, as the model (or `loss`) takes it.

        Returns:
            This rank's loss, detached. NaN is returned, not hidden.

        Raises:
            CaptureError: if the step cannot be captured; model and optimizer are then as before.
            RankMismatchError: on all ranks, if they are not about to run the same step.
        """
        with self._telling_other_ranks():
            self._check_ready()
            inventory = Inventory.of(self.model, self.optimizer)
            compiled = self._find(inventory, args, kwargs)
        self._agreement.settle(compiled.text)
        if not self._state.bound:
            self._bind()
            inventory = Inventory.of(self.model, self.optimizer)
            signature = Signature.of(inventory, args, kwargs, fresh=self._state.fresh)
            self._compiled.setdefault(signature, []).append(compiled)
        values = compiled.program.run(self._inputs(compiled, inventory, args, kwargs))
        loss = self._take_results(compiled.program, values)
        self._state.stepped = True
        compat.mark_stepped(self.optimizer)
        self._last = compiled
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

    def _inputs(
        self, compiled: Compiled, inventory: Inventory, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        batch = dict(flatten_batch(args, kwargs)[0])
        constants = compiled.capture.constants
        inputs = []
        for entry in compiled.program.entries:
            if entry.kind == "batch":
                inputs.append(batch[entry.name])
            elif entry.kind == "constant":
                inputs.append(constants[entry.name])
            else:
                inputs.append(self._state.lookup(inventory, entry.kind, entry.name))
        return inputs

    def _take_results(self, program: Program, values: tuple[Any, ...]) -> torch.Tensor:
        self.metrics = {}
        loss = None
        for (kind, name), value in zip(program.outputs, values, strict=True):
            if kind == "loss":
                loss = value
            elif kind == "metric":
                self.metrics[name] = value
            else:
                self._state.write_back(kind, name, value)
        assert loss is not None
        return loss

    # ---- compiling

    def _find(self, inventory: Inventory, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
        lookup = functools.partial(self._state.lookup, inventory)
        if not self._state.bound:  # so that a failure leaves model and optimizer as they were
            rehearsal = self._state.rehearsal()
            Signature.of(rehearsal, args, kwargs, fresh=self._state.fresh)  # refuses a batch that has none
            return self._compile(self._capture(rehearsal, args, kwargs))
        signature = Signature.of(inventory, args, kwargs, fresh=self._state.fresh)
        known = self._compiled.setdefault(signature, [])
        for compiled in known:
            if compiled.capture.guards.hold(lookup, inventory.attributes):
                return compiled
        if self._last is not None:
            log.info("fxzero: capturing again: the signature or a guard has changed")
        self._state.prime(inventory)  # a parameter may have been unfrozen
        capture = self._capture(inventory, args, kwargs)
        for compiled in known:
            if compiled.capture.same_as(capture):
                compiled.capture.guards.relax(lookup, inventory.attributes)
                return compiled
        known.append(self._compile(capture))
        return known[-1]

    def _capture(self, inventory: Inventory, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        return capture_step(inventory, self.loss, args, kwargs, fresh=self._state.fresh, **captured_as(self.plan))

    def _compile(self, capture: Capture) -> Compiled:
        seconds = {"capture": capture.seconds}
        capture.step.mesh = dict(self.plan.axes)
        pipeline = recipe(self.plan, backend=self._topology.backend)
        with _timed(seconds, "passes"):
            step = pipeline.run(capture.step)
        with _timed(seconds, "lower"):
            program = Program(step, groups=self._topology.groups)
        text = agreed_text(step, plan=self.plan.fingerprint(), passes=pipeline.describe())
        return Compiled(capture.step, step, program, capture, text, list(pipeline.records), seconds)

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
        """The program of the last step, as an annotated graph; print it."""
        return self._require_last().step

    @property
    def captured(self) -> StepGraph:
        """The graph of the last step before any pass."""
        return self._require_last().captured

    def report(self) -> str:
        """Tables: state on this rank, communication per step, predicted peak, passes, time to compile."""
        from fxzero.report import report

        last = self._require_last()
        return report(last.step, self.plan, last.records, last.seconds)

    def _require_last(self) -> Compiled:
        if self._last is None:
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
        _owned.add(self.model)

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


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _device_type(model: nn.Module) -> str:
    kinds = {p.device.type for p in model.parameters()} - {"meta"}
    return next(iter(kinds), "cuda" if torch.cuda.is_available() else "cpu")


def _check_types(model: Any, optimizer: Any) -> None:
    for where, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, torch.optim.Optimizer)):
        if not isinstance(value, kind):
            raise CaptureError.of(
                where=f"compile(model, optimizer, plan), {where}",
                expected=f"a torch {kind.__name__}",
                got=type(value).__name__,
                fix="call fxzero.compile(model, optimizer, plan, loss=loss)",
            )


def _check_model(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    where = f"model {type(model).__name__}"
    if model in _owned:
        raise CaptureError.of(
            where,
            expected="a model that no step owns",
            got="one that has a compiled step already",
            fix="use that step; for another plan, save its state_dict() and load it into a new model's step",
        )
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise CaptureError.of(
            where, expected="a plain module", got="one from torch.compile", fix="pass the module that was compiled"
        )
    wrapped = [
        type(m).__name__
        for m in model.modules()
        if type(m).__module__.startswith(("torch.nn.parallel", "torch.distributed"))
    ]
    if wrapped:
        raise CaptureError.of(
            where, expected="a plain module", got=f"one wrapped by {wrapped[0]}", fix="pass the module inside"
        )
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise CaptureError.of(
            where,
            expected="plain parameters",
            got=f"{sharded[0]} is a DTensor already",
            fix="compile a model once, before anything shards it",
        )
