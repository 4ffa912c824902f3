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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from fxzero import compat
from fxzero.capture.checks import capture_error, check_hyperparameters_unchanged, check_loss
from fxzero.capture.clean import clean
from fxzero.capture.clipping import Clipping
from fxzero.capture.draws import RandomDraws
from fxzero.capture.guards import Guards, collect_guards, freeze_unused
from fxzero.capture.inventory import Inventory, dense_strides, hyperparameters, state_name, with_hyperparameters
from fxzero.capture.precision import Precision, check_dtypes, sink_parameter_casts
from fxzero.capture.provenance import module_paths
from fxzero.capture.scalars import ScalarReader, SymbolicTensors
from fxzero.capture.signature import flatten_batch
from fxzero.capture.twin import clone_optimizer, for_loop_form
from fxzero.capture.untouched import untouched
from fxzero.errors import CaptureError, FxzeroError
from fxzero.graph import StateEntry, StepGraph

log = logging.getLogger("fxzero")

LossFn = Callable[..., Any]
GRADIENT_NORM = "grad_norm"  # the metric under which a clipped step reports the norm before clipping


@dataclass(frozen=True)
class Capture:
    """A captured step.

    Args:
        step: the graph, with single-device meaning.
        guards: the conditions on scalars under which it holds.
        constants: real tensors that the model kept outside parameters and buffers, by entry name.
        seconds: how long the trace took.
    """

    step: StepGraph
    guards: Guards
    constants: dict[str, torch.Tensor]
    seconds: float

    def same_as(self, other: Capture) -> bool:
        """Whether two captures of one signature are the same program."""
        a, b = self.constants, other.constants
        same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        return same and str(self.step.graph) == str(other.step.graph)


@dataclass
class _Inputs:
    """Traced inputs in placeholder order, and where each goes."""

    entries: list[StateEntry] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, entry: StateEntry, value: Any) -> int:
        self.entries.append(entry)
        self.values.append(value)
        return len(self.values) - 1


class _StepTracer:
    """Traces one step; see [Note: one trace]."""

    def __init__(
        self,
        inventory: Inventory,
        loss: LossFn | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        precision: Precision,
        clipping: Clipping,
        as_compiler: bool = False,
    ) -> None:
        self.inventory = inventory
        self.precision = precision
        self.clipping = clipping
        self.as_compiler = as_compiler
        self.fresh = False
        self.loss = loss
        self.env = compat.new_shape_env()
        self.mode = compat.new_fake_mode(self.env)
        self.reader = ScalarReader(self.env)
        self.path: list[str] = []
        self.boundaries: dict[str, int] = {}
        self.results: list[tuple[str, str]] = []
        self.inputs = _Inputs()
        self.symbols: dict[Any, tuple[str, str]] = {}
        self.batch_leaves, self.batch_structure = flatten_batch(args, kwargs)

    # ---- inputs

    def declare(self, *, fresh: bool) -> None:
        """Make a fake input for everything that the step reads (or, at a first step, only writes)."""
        self.fresh = fresh
        for kind, tensors in (("parameter", self.inventory.parameters), ("buffer", self.inventory.buffers)):
            for name, tensor in tensors.items():
                self.inputs.add(StateEntry(kind, name, tuple(tensor.shape)), self._fake(tensor))
        for param, key, value in self.inventory.optimizer_state():
            if _is_tensor_or_number(value):
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
                self._declare_scalar_or_tensor(StateEntry("optimizer", state_name(param, key), shape, param), value)
        for index, group in enumerate(self.inventory.optimizer.param_groups):
            for path, value in hyperparameters(group):
                if isinstance(value, (float, torch.Tensor)):
                    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
                    self._declare_scalar_or_tensor(StateEntry("hyperparameter", f"groups.{index}.{path}", shape), value)
        for path, leaf in self.batch_leaves:
            if isinstance(leaf, torch.Tensor):
                self.inputs.add(StateEntry("batch", path, tuple(leaf.shape)), compat.fake_like(self.mode, leaf))

    def _declare_scalar_or_tensor(self, entry: StateEntry, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.inputs.add(entry, self._fake(value))
            return
        if isinstance(value, int):
            symbol = compat.symbolic_int(self.env, value, name=f"{entry.kind}:{entry.name}")
        else:
            symbol = compat.symbolic_float(self.env, value, name=f"{entry.kind}:{entry.name}")
        if not isinstance(symbol, (float, int)):
            self.symbols[compat.symbol_of(symbol)] = entry.key
        self.inputs.add(entry, symbol)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with self.mode:
            return torch.empty_strided(tensor.shape, dense_strides(tensor), dtype=tensor.dtype, device=device)

    # ---- the step

    def run(self, *values: Any) -> list[Any]:
        """One training step on traced values, in the order of `self.inputs`."""
        with compat.functional_mode(), self.reader, RandomDraws(), SymbolicTensors():
            wrapped = [compat.to_functional(v) if isinstance(v, torch.Tensor) else v for v in values]
            table = {e.key: v for e, v in zip(self.inputs.entries, wrapped, strict=True)}
            self._follow_host_scalars(table)
            parameters = {n: table[("parameter", n)] for n in self.inventory.parameters}
            for name, value in parameters.items():
                value.requires_grad_(self.inventory.parameters[name].requires_grad)
            buffers = {n: table[("buffer", n)] for n in self.inventory.buffers}
            model, tensors = self.inventory.model, {**self.precision.cast(parameters), **buffers}
            with (
                compat.reparametrized(model, tensors),
                module_paths(model, self.path),
                compat.compiling(self.as_compiler),
            ):
                with self.precision.around(model, self._device_type()):
                    loss, metrics = self._forward(table)
                buffers = {name: self._buffer_now(name) for name in buffers}
                self.boundaries["backward"] = compat.traced_nodes()
                gradients = self._backward(loss, parameters)
            self.boundaries["update"] = compat.traced_nodes()
            out: dict[tuple[str, str], Any] = {("loss", "loss"): loss.detach()}
            out.update({("metric", name): value.detach() for name, value in metrics.items()})
            out.update({("gradient", name): g for name, g in gradients.items() if g is not None})
            out.update(self._update(table, parameters, gradients))
            out.update({("buffer", name): value for name, value in buffers.items()})
            self.results = list(out)
            return [_unwrap(value) for value in out.values()]

    def _device_type(self) -> str:
        return next((v.device.type for v in self.inputs.values if isinstance(v, torch.Tensor) and v.dim()), "cpu")

    def _follow_host_scalars(self, table: dict[tuple[str, str], Any]) -> None:
        for param, key, value in self.inventory.optimizer_state():
            entry = ("optimizer", state_name(param, key))
            if entry in table and _is_host_scalar(value):
                self.reader.follow(table[entry], value)
        for index, group in enumerate(self.inventory.optimizer.param_groups):
            for path, value in hyperparameters(group):
                if _is_host_scalar(value):
                    self.reader.follow(table[("hyperparameter", f"groups.{index}.{path}")], value)

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
            if name == GRADIENT_NORM and self.clipping.norm is not None:
                raise CaptureError.of(
                    where=f"metric {name!r} of the loss function",
                    expected="another name",
                    got=f"{name!r}, which clip_grad_norm reports",
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

    def _backward(self, loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
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
        return dict(zip(names, gradients, strict=True))

    def _update(
        self,
        table: dict[tuple[str, str], Any],
        parameters: dict[str, torch.Tensor],
        gradients: dict[str, torch.Tensor | None],
    ) -> dict[tuple[str, str], Any]:
        optimizer = clone_optimizer(self.inventory.optimizer)
        optimizer.param_groups = []
        for index, group in enumerate(self.inventory.optimizer.param_groups):
            traced = {
                path: table[("hyperparameter", f"groups.{index}.{path}")]
                for path, _ in hyperparameters(group)
                if ("hyperparameter", f"groups.{index}.{path}") in table
            }
            optimizer.param_groups.append(
                {
                    **with_hyperparameters(group, traced),
                    "params": [parameters[n] for n in self.inventory.groups[index]],
                }
            )
        for_loop_form(optimizer)
        before = [dict(hyperparameters(group)) for group in optimizer.param_groups]
        optimizer.state = defaultdict(dict)
        for param, key, value in self.inventory.optimizer_state():
            entry = ("optimizer", state_name(param, key))
            if not self.fresh and (entry in table or not _is_tensor_or_number(value)):
                optimizer.state[parameters[param]][key] = table.get(entry, value)
        clipped, norm = self.clipping.apply({name: g for name, g in gradients.items() if g is not None})
        for name, gradient in clipped.items():
            parameters[name].grad = gradient
        type(optimizer).step(optimizer)  # type: ignore[call-arg]
        check_hyperparameters_unchanged(optimizer, before)
        out: dict[tuple[str, str], Any] = {("parameter", name): value for name, value in parameters.items()}
        if norm is not None:
            out[("metric", GRADIENT_NORM)] = norm
        for name, value in parameters.items():
            value.grad = None
            for key, item in optimizer.state.get(value, {}).items():
                if _is_tensor_or_number(item):
                    out[("optimizer", state_name(name, key))] = item
        return out

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
            cast_to=self.precision.compute,
        )


def capture_step(
    inventory: Inventory,
    loss: LossFn | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    precision: Precision | None = None,
    clipping: Clipping | None = None,
    fresh: bool = False,
) -> Capture:
    """Trace one whole training step; model, optimizer and random state are as before afterwards.

    Args:
        inventory: the model and its optimizer; its state must exist already (see `fxzero.runtime.priming`).
        loss: `loss(model, *args, **kwargs)` -> scalar, or (scalar, dict of metric tensors); None where the model
            returns the scalar or an object with `.loss`.
        args, kwargs: one batch.
        precision: in which dtypes to compute; by default those that parameters and batch have.
        clipping: how gradients are bounded before the update; by default not at all.
        fresh: trace the optimizer's first step, with no state.

    Raises:
        CaptureError: naming module, op and source line.
    """
    start = time.perf_counter()
    how: dict[str, Any] = {"precision": precision or Precision(), "clipping": clipping or Clipping()}
    try:
        tracer = _StepTracer(inventory, loss, args, kwargs, **how)
        module = _trace(tracer, fresh=fresh)
    except CaptureError as error:
        if error.__cause__ is None or "update" in tracer.boundaries:
            raise
        log.info("fxzero: tracing again as a compiler (torch.compiler.is_compiling()): %s", error)
        tracer = _StepTracer(inventory, loss, args, kwargs, as_compiler=True, **how)
        module = _trace(tracer, fresh=fresh)
    entries = tracer.inputs.entries
    guards = collect_guards(
        tracer.env, module.graph, entries=entries, symbols=tracer.symbols, reads=tracer.reader.reads
    )
    step, constants = clean(
        module,
        entries=entries,
        results=tracer.results,
        boundaries=tracer.boundaries,
        optimized=inventory.optimized,
        mode=tracer.mode,
    )
    check_dtypes(step)
    sink_parameter_casts(step)
    freeze_unused(guards, step, entries, tracer.inputs.values)
    guards.attributes = inventory.attributes
    return Capture(step, guards, constants, time.perf_counter() - start)


def _trace(tracer: _StepTracer, *, fresh: bool) -> fx.GraphModule:
    tracer.declare(fresh=fresh)
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


def _is_tensor_or_number(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _is_host_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu"
