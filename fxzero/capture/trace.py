"""The trace itself: forward, loss, backward and optimizer step, run once on fake tensors.

[Note: one trace]
`make_fx` sees the whole step under torch's functionalization mode (the way AOTAutograd traces a joint graph), so
that in-place ops of the model, buffer updates and the optimizer's own mutations come out as plain functional nodes,
and the nodes carry the module that was running. Nothing runs for real: parameters, buffers, optimizer state and the
batch are fakes with the single-device shapes, whatever the live tensors are (shards, meta tensors).

[Note: as a compiler]
A model may branch on the values of its batch ("does this mask hold any padding?") where it need not: transformers
leaves such questions out while `torch.compiler.is_compiling()`, and takes the way that is right for all values. So
a forward or backward that cannot be traced as eager code is traced once more with that flag set. It is not set from
the start because the eager way is the faster one (a causal flag rather than a mask tensor) and bit-equal to the plain
loop.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from fxzero import compat
from fxzero.capture.accumulation import in_layout_of
from fxzero.capture.batch_dims import SymbolicSizes
from fxzero.capture.checks import capture_error, check_loss
from fxzero.capture.clean import clean
from fxzero.capture.equal_calls import EqualCalls
from fxzero.capture.guards import Guards, collect_guards, freeze_unused
from fxzero.capture.inputs import TracedInputs
from fxzero.capture.inventory import Inventory, hyperparameters, state_name
from fxzero.capture.options import CaptureOptions
from fxzero.capture.precision import check_dtypes, place_casts
from fxzero.capture.provenance import module_paths
from fxzero.capture.scalars import ScalarReader, SymbolicTensors
from fxzero.capture.signature import flatten_batch
from fxzero.capture.specialise import TracedNode, traced_nodes
from fxzero.capture.traced_calls import TracedCalls
from fxzero.capture.untouched import untouched
from fxzero.capture.update import reported, update
from fxzero.errors import CaptureError, FxzeroError
from fxzero.graph import StateEntry, StepGraph

log = logging.getLogger("fxzero")

LossFn = Callable[..., Any]


@dataclass(frozen=True)
class Capture:
    """A captured step.

    Args:
        step: the graph, with single-device meaning.
        guards: the conditions on scalars under which it holds.
        constants: real tensors that the model kept outside parameters and buffers, by entry name.
        seconds: how long the trace took.
        gradients: the parameters that the step updates, in the order in which a loss scaler looks at them.
    """

    step: StepGraph
    guards: Guards
    constants: dict[str, torch.Tensor]
    seconds: float
    gradients: tuple[str, ...] = ()

    def same_as(self, other: Capture) -> bool:
        """Whether two captures of one signature are the same program."""
        a, b = self.constants, other.constants
        same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        return same and str(self.step.graph) == str(other.step.graph)


class StepTracer:
    """Traces one step; see [Note: one trace].

    Args:
        inventory, loss, args, kwargs, options, fresh: see `capture_step`.
        as_compiler: see [Note: as a compiler].
        sizes: see `trace_step`.
        copies: as for `EqualCalls`; the trace is the same.
    """

    def __init__(
        self,
        inventory: Inventory,
        loss: LossFn | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        options: CaptureOptions,
        fresh: bool,
        as_compiler: bool = False,
        sizes: Callable[[Any], SymbolicSizes] | None = None,
        copies: bool = True,
    ) -> None:
        self.inventory = inventory
        self.optimized = inventory.optimized
        self.options = options
        self.as_compiler = as_compiler
        self.fresh = fresh
        self.loss = loss
        self.env = compat.new_shape_env()
        self.mode = compat.new_fake_mode(self.env)
        self.reader = ScalarReader(self.env)
        self.calls = EqualCalls(self.reader, copies=copies)
        self.path: list[str] = []
        self.boundaries: dict[str, int] = {}
        self.results: list[tuple[str, str]] = []
        self.gradients: list[str] = []
        self.sizes = None if sizes is None else sizes(self.env)
        self.reader.sizes = set(self.sizes.symbols) if self.sizes is not None else set()
        self.traced: list[TracedNode] = []
        self.inputs = TracedInputs(inventory, self.env, self.mode, options.device, self.sizes)
        self.batch_leaves, self.batch_structure = flatten_batch(args, kwargs)

    def run(self, *values: Any) -> list[Any]:
        """One training step on traced values, in the order of `self.inputs`."""
        with compat.functional_mode(), TracedCalls(self.reader), SymbolicTensors():
            wrapped = [compat.to_functional(v) if isinstance(v, torch.Tensor) else v for v in values]
            table = {e.key: v for e, v in zip(self.inputs.entries, wrapped, strict=True)}
            self._follow_host_scalars(table)
            parameters = {n: table[("parameter", n)] for n in self.inventory.parameters}
            for name, value in parameters.items():
                value.requires_grad_(self.inventory.parameters[name].requires_grad)
            buffers = {n: table[("buffer", n)] for n in self.inventory.buffers}
            model, tensors = self.inventory.model, {**self.options.precision.cast(parameters), **buffers}
            with (
                compat.reparametrized(model, tensors),
                module_paths(model, self.path),
                compat.compiling(self.as_compiler),
            ):
                with self.options.precision.around(model, self.inputs.device_type):
                    loss, metrics = self._forward(table)
                buffers = {name: self._buffer_now(name) for name in buffers}
                loss = self.options.accumulation.share(loss, table)
                self.boundaries["backward"] = compat.traced_nodes()
                gradients = self._backward(self.options.scaling.scaled(loss, table), parameters)
                if self.options.accumulation.unsharded:
                    gradients = self._summed(table, gradients)
            self.boundaries["update"] = compat.traced_nodes()
            out: dict[tuple[str, str], Any] = {("loss", "loss"): loss.detach()}
            out.update({("metric", name): value.detach() for name, value in metrics.items()})
            out.update({("gradient", name): gradient for name, gradient in gradients.items()})
            out.update(self._finish(table, gradients))
            out.update({("buffer", name): value for name, value in buffers.items()})
            self.results = list(out)
            if self.sizes is not None:
                self.traced = traced_nodes(compat.tracer().graph)
            return [_unwrap(value) for value in out.values()]

    def _follow_host_scalars(self, table: dict[tuple[str, str], Any]) -> None:
        for param, key, value in self.inventory.optimizer_state():
            entry = ("optimizer", state_name(param, key))
            if entry in table and _is_host_scalar(value):
                self.reader.follow(table[entry], value)
        for index, group in enumerate(self.inventory.optimizer.param_groups):
            for path, value in hyperparameters(group):
                entry = ("hyperparameter", f"groups.{index}.{path}")
                if entry in table and _is_host_scalar(value):
                    self.reader.follow(table[entry], value)

    def _forward(self, table: dict[tuple[str, str], Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        leaves = [table.get(("batch", path), leaf) for path, leaf in self.batch_leaves]
        args, kwargs = compat.unflatten(leaves, self.batch_structure)
        model = self.inventory.model
        out = model(*args, **kwargs) if self.loss is None else self.loss(model, *args, **kwargs)
        metrics: dict[str, torch.Tensor] = {}
        if self.loss is not None and isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict):
            out, metrics = out
        if not isinstance(out, torch.Tensor):
            out = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", out)
        check_loss(out)
        for name, value in metrics.items():
            if name in reported(self.options):
                raise CaptureError.of(
                    where=f"metric {name!r} of the loss function",
                    expected="another name",
                    got=f"{name!r}, which the plan's clipping or loss scaling reports",
                    fix="rename it",
                )
            if not isinstance(value, torch.Tensor):
                raise CaptureError.of(
                    where=f"metric {name!r} of the loss function",
                    expected="a tensor",
                    got=type(value).__name__,
                    fix="return numbers that do not depend on tensors outside of the step",
                )
        return out, metrics

    def _buffer_now(self, name: str) -> torch.Tensor:
        owner, _, attribute = name.rpartition(".")
        return getattr(self.inventory.model.get_submodule(owner), attribute)

    def _backward(self, loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        compat.tag_backward_nodes(loss)
        names = self.inventory.optimized
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise CaptureError.of(
                    where=f"gradient of {name}",
                    expected="a dense gradient",
                    got=str(gradient.layout),
                    fix="build the embedding with sparse=False",
                )
        return {name: g for name, g in zip(names, gradients, strict=True) if g is not None}

    def _summed(self, table: dict[tuple[str, str], Any], gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients with those of earlier microbatches."""
        accumulation = self.options.accumulation
        so_far = {name: table[(accumulation.kind, name)] for name in accumulation.carried}
        return accumulation.summed(so_far, gradients)

    def _finish(
        self, table: dict[tuple[str, str], Any], gradients: dict[str, torch.Tensor]
    ) -> dict[tuple[str, str], Any]:
        """What follows the gradients: the update, or their sum for the next microbatch."""
        accumulation = self.options.accumulation
        with torch.no_grad():
            if not accumulation.unsharded:
                gradients = self._summed(table, gradients)
            self.gradients = list(gradients)
            if accumulation.updates:
                how: dict[str, Any] = {"options": self.options, "fresh": self.fresh, "calls": self.calls}
                return update(self.inventory, table, gradients, **how)
            return {
                (accumulation.kind, name): in_layout_of(table[("parameter", name)], gradient)
                for name, gradient in gradients.items()
            }

    def let_go(self) -> None:
        """Hold nothing of model, optimizer and batch any more; what was traced stays."""
        del self.inventory, self.inputs.inventory, self.batch_leaves, self.calls
        self.reader.twins.clear()

    def explain(self, error: Exception) -> CaptureError:
        """A trace's failure in the user's terms."""
        phase = next((name for name in ("update", "backward") if name in self.boundaries), "forward")
        return capture_error(
            error,
            phase=phase,
            model=self.inventory.model,
            optimizer=self.inventory.optimizer,
            path=self.path[-1] if self.path else "",
            op=self.reader.last_op,
            batch=self.batch_leaves,
            cast_to=self.options.precision.compute,
        )


def capture_step(
    inventory: Inventory,
    loss: LossFn | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    options: CaptureOptions | None = None,
    fresh: bool = False,
) -> Capture:
    """Trace one whole training step; model, optimizer and random state are as before afterwards.

    Args:
        inventory: the model and its optimizer; its state must exist already (see `fxzero.runtime.priming`).
        loss: `loss(model, *args, **kwargs)` -> scalar, or (scalar, dict of metric tensors); None where the model
            returns the scalar or an object with `.loss`.
        args, kwargs: one batch.
        options: what a plan says of the step itself; by default nothing.
        fresh: trace the optimizer's first step, with no state.

    Raises:
        CaptureError: naming module, op and source line.
    """
    start = time.perf_counter()
    tracer, module = trace_step(inventory, loss, args, kwargs, options=options or CaptureOptions(), fresh=fresh)
    entries = tracer.inputs.entries
    guards = collect_guards(
        tracer.env, module.graph, entries=entries, symbols=tracer.inputs.symbols, reads=tracer.reader.reads
    )
    step, constants = finish_step(tracer, module, entries=entries, boundaries=tracer.boundaries)
    freeze_unused(guards, step, entries, tracer.inputs.values)
    guards.attributes = inventory.attributes
    return Capture(step, guards, constants, time.perf_counter() - start, tuple(tracer.gradients))


def trace_step(
    inventory: Inventory,
    loss: LossFn | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    options: CaptureOptions,
    fresh: bool,
    sizes: Callable[[Any], SymbolicSizes] | None = None,
) -> tuple[StepTracer, fx.GraphModule]:
    """The raw trace of a step, as eager code or else as a compiler ([Note: as a compiler]).

    Args:
        inventory, loss, args, kwargs, options, fresh: see `capture_step`.
        sizes: makes sizes of the batch symbols of the trace's environment.

    Raises:
        CaptureError: naming module, op and source line.
    """
    how: dict[str, Any] = {"options": options, "fresh": fresh, "sizes": sizes}
    try:
        tracer = StepTracer(inventory, loss, args, kwargs, **how)
        return tracer, _trace(tracer)
    except CaptureError as error:
        if error.__cause__ is None or "update" in tracer.boundaries:
            raise
        log.info("fxzero: tracing again as a compiler (torch.compiler.is_compiling()): %s", error)
        tracer = StepTracer(inventory, loss, args, kwargs, as_compiler=True, **how)
        return tracer, _trace(tracer)


def finish_step(
    tracer: StepTracer, module: fx.GraphModule, *, entries: list[StateEntry], boundaries: dict[str, int]
) -> tuple[StepGraph, dict[str, torch.Tensor]]:
    """The step graph of a raw trace without symbolic sizes, and its constants by entry name; see `clean`."""
    step, constants = clean(
        module,
        entries=entries,
        results=tracer.results,
        boundaries=boundaries,
        optimized=tracer.optimized,
        mode=tracer.mode,
    )
    check_dtypes(step)
    place_casts(step)
    return step, constants


def _trace(tracer: StepTracer) -> fx.GraphModule:
    tracer.inputs.declare(tracer.batch_leaves, tracer.options)
    with untouched(tracer.inventory.model), contextlib.ExitStack() as stack:
        stack.enter_context(compat.quiet_fake_kernels())
        stack.enter_context(compat.tracing_context(tracer.mode))
        stack.enter_context(preserve_node_meta())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(tracer.mode)
        try:
            return make_fx(tracer.run, tracing_mode="real", _allow_non_fake_inputs=True)(*tracer.inputs.values)
        except FxzeroError:
            raise
        except Exception as error:
            raise tracer.explain(error) from error


def _unwrap(value: Any) -> Any:
    return compat.from_functional(value) if isinstance(value, torch.Tensor) else value


def _is_host_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu"
