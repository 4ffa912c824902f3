"""One capture for every batch size and sequence length: sizes are symbols, `at` puts numbers in their place.

[Note: symbolic sizes]
The step is traced once with symbols for the named dims of the batch. Wherever model, autograd or torch asked something
about a size ("is the mask longer than the table?"), the answer at the example's sizes was taken, and the question is
kept. `at` first asks all of them again: sizes that would have been answered otherwise are refused, since the program
there is another one. Then it copies the trace with numbers for symbols and runs on fake tensors each op whose shapes
depend on them (see `specialise`); so the graph is the one that a capture at these sizes gives, name by name.

A size of 1 is always a program of its own (torch drops copies there and broadcasts), so the first `at` with a size of 1
traces once more with that size as a number. Numbers that the model computes from sizes by way of tensors (transformers
looks whether its own positions hold several sequences) are computed anew for each `at`, and must come out the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from fxzero import compat
from fxzero.capture.batch_dims import NamedDims, SymbolicSizes, find_dims, shape_at, sizes_of
from fxzero.capture.guards import Guards, collect_guards, compile_condition, freeze_unused
from fxzero.capture.inventory import Inventory
from fxzero.capture.options import CaptureOptions
from fxzero.capture.scalars import DerivedNumber
from fxzero.capture.signature import flatten_batch
from fxzero.capture.specialise import Specialiser
from fxzero.capture.trace import Capture, LossFn, StepTracer, finish_step, trace_step
from fxzero.errors import CaptureError
from fxzero.graph import StateEntry, StepGraph

HINT = 3  # the size of a dim that has size 1 in the example, while it is a symbol


@dataclass(frozen=True)
class _Trace:
    """A raw trace with symbols for sizes.

    Args:
        tracer, module: from `trace_step`.
        attributes: of modules, when it was made.
    """

    tracer: StepTracer
    module: fx.GraphModule
    attributes: dict[tuple[str, str], Any]

    @property
    def sizes(self) -> SymbolicSizes:
        """The symbols."""
        assert self.tracer.sizes is not None
        return self.tracer.sizes

    @cached_property
    def conditions(self) -> list[tuple[str, Callable[..., Any], tuple[str, ...]]]:
        """(text, function of sizes, names of these): what has to be true of sizes."""
        names = self.sizes.symbols
        asked = [guard.expr for guard in self.tracer.env.guards]
        for symbol in names:
            least, most = compat.value_range(self.tracer.env, symbol)
            asked.append(sympy.Ge(symbol, least))
            asked += [sympy.Le(symbol, most)] if most.is_Integer else []
        others = {symbol: hint for symbol, hint in compat.hints_of(self.tracer.env).items() if symbol not in names}
        about = [expr.xreplace(others) for expr in asked if expr.free_symbols & set(names)]
        return [compile_condition(expr, names) for expr in dict.fromkeys(about)]


@dataclass(frozen=True)
class _Copy:
    """A raw trace with numbers for sizes.

    Args:
        trace: that it comes from.
        entries: what its placeholders are.
        specialiser: that has made it.
        module: what it made.
        sizes: name -> number.
    """

    trace: _Trace
    entries: list[StateEntry]
    specialiser: Specialiser
    module: fx.GraphModule
    sizes: Mapping[str, int]

    def finish(self) -> tuple[StepGraph, dict[str, torch.Tensor]]:
        """The step, and its constants."""
        boundaries = self.specialiser.boundaries
        return finish_step(self.trace.tracer, self.module, entries=self.entries, boundaries=boundaries)

    def guards(self, step: StepGraph) -> Guards:
        """The conditions on scalars at these sizes."""
        tracer, copied = self.trace.tracer, self.specialiser.nodes
        guards = collect_guards(
            tracer.env,
            self.module.graph,
            entries=self.entries,
            symbols=tracer.inputs.symbols,
            reads=[replace(read, node=copied[read.node]) for read in tracer.reader.reads if read.node in copied],
            sizes={symbol: sympy.Integer(self.sizes[name]) for symbol, name in self.trace.sizes.symbols.items()},
        )
        freeze_unused(guards, step, self.entries, tracer.inputs.values)
        guards.attributes = self.trace.attributes
        return guards


class SymbolicStep:
    """A captured step whose batch has symbolic sizes; see [Note: symbolic sizes].

    Args:
        inventory, loss, args, kwargs, options, fresh: see `capture_step`.
        dims: leaf path -> dim -> name of its size; by default "batch" and "sequence", see `find_dims`.

    Attributes:
        dims: as given or found.
        sizes: name -> size in the example.

    Raises:
        CaptureError: if the step cannot be captured with symbols for these sizes, or the dims are not as they must be.
    """

    def __init__(
        self,
        inventory: Inventory,
        loss: LossFn | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        options: CaptureOptions | None = None,
        fresh: bool = False,
        dims: NamedDims | None = None,
    ) -> None:
        self.leaves = [leaf for leaf in flatten_batch(args, kwargs)[0] if isinstance(leaf[1], torch.Tensor)]
        self.dims: NamedDims = find_dims(self.leaves) if dims is None else dims
        self.sizes = sizes_of(self.leaves, self.dims)
        how: dict[str, Any] = {"options": options or CaptureOptions(), "fresh": fresh}
        self._trace_with: Callable[..., Any] | None = lambda sizes: trace_step(
            inventory, loss, args, kwargs, sizes=sizes, **how
        )
        self._traces: dict[frozenset[str], _Trace] = {}

    def at(self, **sizes: int) -> StepGraph:
        """The step as captured with a batch of these sizes; those that are not given are the example's.

        Raises:
            CaptureError: if a size has no such name or is no positive number, or if the step would be another program
                at these sizes than at the example's.
        """
        return self._at(sizes).finish()[0]

    def capture_at(self, **sizes: int) -> Capture:
        """What `capture_step` gives for a batch of these sizes, with guards and constants; see `at`.

        Hyperparameters and attributes of modules count as they were when it was traced: the guards say which.
        """
        start = time.perf_counter()
        copy = self._at(sizes)
        step, constants = copy.finish()
        gradients = tuple(copy.trace.tracer.gradients)
        return Capture(step, copy.guards(step), constants, time.perf_counter() - start, gradients)

    def trace(self) -> None:
        """Trace with the example's sizes, now rather than at the first `at`."""
        self._trace(frozenset())

    def takes(self, **sizes: int) -> bool:
        """Whether `at` takes these sizes."""
        try:
            self._asked(self._checked(sizes))
        except CaptureError:
            return False
        return True

    def elsewhere(self, **sizes: int) -> Iterator[dict[str, int]]:
        """Other sizes that `at` takes, near to these, such that products of them can be told apart.

        Each is a prime of its own if it can be; one that the step takes at its present value only stays. First come
        sizes with about the same product, so that a pass which asks how large a tensor is answers as it does at these.
        """
        seen = [dict(sizes)]
        for balanced in (True, False):
            found, taken, ratio = dict(sizes), {*sizes.values()}, 1.0
            ascending = sorted(sizes, key=sizes.__getitem__)
            for name in ascending:
                size = sizes[name]
                target = size * ratio if balanced and name == ascending[-1] else size + 1 if balanced else size - 1
                near = (n for n in _beside(size, target) if n not in taken and self.takes(**{**found, name: n}))
                found[name] = next(near, size)
                taken.add(found[name])
                ratio *= size / found[name]
            if found not in seen:
                seen.append(found)
                yield found

    def let_go(self) -> None:
        """Hold no tensor of model, optimizer and batch; a size that is 1 where it was not so far is refused then."""
        self.leaves = [(path, torch.empty_like(leaf, device="meta")) for path, leaf in self.leaves]
        for trace in self._traces.values():
            trace.tracer.let_go()
        self._trace_with = None

    def _at(self, sizes: Mapping[str, int]) -> _Copy:
        wanted = self._checked(sizes)
        trace = self._asked(wanted)
        tracer = trace.tracer
        entries, values = self._inputs(tracer, wanted)
        copy = Specialiser(
            trace.module, traced=tracer.traced, inputs=values, boundaries=tracer.boundaries, mode=tracer.mode
        )
        return _Copy(trace, entries, copy, copy.run(), wanted)

    def _asked(self, wanted: Mapping[str, int]) -> _Trace:
        """The trace for these sizes, all of whose questions have the same answers there."""
        trace = self._trace(frozenset(name for name, size in wanted.items() if size == 1))
        _check_conditions(trace, wanted)
        _check_derived(trace, wanted)
        return trace

    def conditions(self, *, ones: frozenset[str] = frozenset()) -> list[str]:
        """What has to be true of the sizes, in words of sympy.

        Args:
            ones: the sizes that are 1.
        """
        return [text for text, _, _ in self._trace(ones).conditions]

    def _checked(self, sizes: Mapping[str, int]) -> dict[str, int]:
        for name, size in sizes.items():
            if name not in self.sizes:
                known = ", ".join(self.sizes) or "none: the batch has no tensors with dims"
                fix = "correct the name, or name dims by `dims`"
                raise CaptureError.of("sizes of the batch", expected=f"names among {known}", got=repr(name), fix=fix)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise CaptureError.of(name, expected="a positive number", got=repr(size), fix="give another size")
        return {**self.sizes, **sizes}

    def _trace(self, ones: frozenset[str]) -> _Trace:
        if ones not in self._traces:
            if self._trace_with is None:
                raise _refused(dict.fromkeys(ones, 1), "sizes that were 1 or more than 1 in the example, as it was")
            hints = {name: size if size > 1 else HINT for name, size in self.sizes.items() if name not in ones}
            fixed = dict.fromkeys(ones, 1)

            def make(env: Any) -> SymbolicSizes:
                return SymbolicSizes(env, self.dims, hints=hints, fixed=fixed)

            tracer, module = self._trace_with(make)
            self._traces[ones] = _Trace(tracer, module, tracer.inventory.attributes)
        return self._traces[ones]

    def _inputs(self, tracer: StepTracer, sizes: Mapping[str, int]) -> tuple[list[StateEntry], list[Any]]:
        leaves = dict(self.leaves)
        entries, values = [], []
        made: dict[int, torch.Tensor] = {}  # the batch may have the same tensor in several places
        for entry, value in zip(tracer.inputs.entries, tracer.inputs.values, strict=True):
            if entry.kind == "batch" and entry.name in self.dims:
                shape = shape_at(entry.name, leaves[entry.name], self.dims, sizes)
                entry = replace(entry, shape=shape)
                if id(value) not in made:
                    with tracer.mode:
                        made[id(value)] = torch.empty(shape, dtype=value.dtype, device=value.device)
                value = made[id(value)]
            entries.append(entry)
            values.append(value)
        return entries, values


def _check_conditions(trace: _Trace, sizes: Mapping[str, int]) -> None:
    for text, test, names in trace.conditions:
        if not test(*(sizes[name] for name in names)):
            raise _refused(sizes, f"sizes for which {text}, as the model or torch asked while it was traced")


def _check_derived(trace: _Trace, sizes: Mapping[str, int]) -> None:
    numbers = {symbol: sizes[name] for symbol, name in trace.sizes.symbols.items()}
    for derived in trace.tracer.reader.derived:
        value = _value_of(derived, numbers)
        if value != derived.value:
            raise _refused(sizes, f"sizes for which a number that the model computes from them is {derived.value}")


def _value_of(derived: DerivedNumber, numbers: Mapping[Any, int]) -> Any:
    with compat.no_modes(), torch.no_grad():
        return derived.program(*(int(size.xreplace(numbers)) for size in derived.sizes))


def _beside(size: int, target: float) -> Iterator[int]:
    """Sizes to try instead of one: the primes nearest to a target, then multiples of it, for what must divide."""
    window = range(max(3, int(target) - 200), int(target) + 200)
    primes = [n for n in window if all(n % factor for factor in range(2, int(n**0.5) + 1))]
    yield from sorted(primes, key=lambda n: abs(n - target))[:12]
    yield from (size * 3, size * 5, size * 7)


def _refused(sizes: Mapping[str, int], expected: str) -> CaptureError:
    return CaptureError.of(
        where="sizes of the batch",
        expected=expected,
        got=", ".join(f"{name}={size}" for name, size in sizes.items()),
        fix="capture a batch of these sizes: it is another program",
    )
