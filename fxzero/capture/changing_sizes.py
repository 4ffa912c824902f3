"""Captures for batches whose sizes change: what has changed becomes a symbol, once, and no further size is traced.

[Note: sizes that change]
Batches of one family differ in sizes alone. The first is captured with numbers. At the second, the dims that have
changed become symbols, the step is traced once more, and from then on a batch of new sizes gets its graph from that
trace (see [Note: symbolic sizes]). Dims have one symbol if their sizes have been equal in all batches so far and
`find_dims` gives them one name; when that turns out to be wrong, or another dim changes, there is a new trace.
Sizes 0 and 1 are never symbols: they have traces of their own. A tensor of the batch that is a slice of another is
made contiguous for such a program, since its strides would be one more thing that changes.

A trace rests on answers about its sizes, on numbers and on attributes of modules. Where these are others, a trace at
the present ones is made beside it; after MOST_TRACES a batch is captured with numbers, as is one that cannot be traced
with symbols.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxzero import compat
from fxzero.capture.batch_dims import Leaves, NamedDims, find_dims, sizes_of
from fxzero.capture.guards import Guards
from fxzero.capture.inventory import Inventory
from fxzero.capture.options import CaptureOptions
from fxzero.capture.signature import Signature, flatten_batch, stands_in_order
from fxzero.capture.symbolic import SymbolicStep
from fxzero.capture.trace import Capture, LossFn, capture_step
from fxzero.errors import CaptureError

log = logging.getLogger("fxzero")

MOST_TRACES = 4  # of one set of symbols

Dim = tuple[str, int]  # path of a leaf, and which of its dims
Lookup = Callable[[str, str], Any]


@dataclass(frozen=True)
class SizedCapture(Capture):
    """A capture that comes from a trace with symbols.

    Args:
        sizes: name -> the number that it has here.
        source: the trace.
    """

    sizes: Mapping[str, int] = field(kw_only=True)
    source: SymbolicStep = field(kw_only=True)


class ChangingSizes:
    """Which dims of a family of batches have changed so far, and which of them together.

    Args:
        leaves: (path, leaf) of the first batch.
        all_named: take the dims that `find_dims` names for ones that change.
    """

    def __init__(self, leaves: Leaves, *, all_named: bool = False) -> None:
        found = find_dims(leaves)
        self._first = _sizes(leaves)
        self._named: dict[Dim, str] = {(path, dim): name for path, dims in found.items() for dim, name in dims.items()}
        self._group: dict[Dim, Hashable] = {dim: (self._named.get(dim), size) for dim, size in self._first.items()}
        self._changed = set(self._named) if all_named else set()

    def note(self, leaves: Leaves) -> None:
        """Take the sizes of one more batch into account."""
        sizes = _sizes(leaves)
        labels: dict[Hashable, int] = {}
        self._changed |= {dim for dim, size in sizes.items() if size != self._first[dim]}
        self._group = {dim: labels.setdefault((self._group[dim], size), len(labels)) for dim, size in sizes.items()}

    def key(self, leaves: Leaves) -> Hashable:
        """What a trace is for: the symbols, and the dims that have size 0 or 1."""
        fixed = tuple((dim, size) for dim, size in _sizes(leaves).items() if size < 2)
        return tuple((path, *named.items()) for path, named in self.dims(leaves).items()), fixed

    def dims(self, leaves: Leaves) -> NamedDims:
        """The dims that change, by name, but for those that have size 0 or 1 in this batch."""
        sizes = _sizes(leaves)
        names: dict[Hashable, str] = {}
        out: dict[str, dict[int, str]] = {}
        for path, dim in (d for d in self._group if d in self._changed and sizes[d] > 1):
            group = self._group[path, dim]
            if group not in names:
                name = self._named.get((path, dim), "")
                taken = not name or name in names.values()
                names[group] = re.sub(r"\W", "_", f"{path}_{dim}") if taken else name
            out.setdefault(path, {})[dim] = names[group]
        return out


@dataclass
class _Family:
    """Batches that differ in sizes alone.

    Args:
        changing: their sizes so far.
        traces: (named dims, dims of size 0 or 1) -> traces.
        refused: those of these keys that cannot be traced with symbols -> why.
    """

    changing: ChangingSizes
    traces: dict[Hashable, list[_Traced]] = field(default_factory=dict)
    refused: dict[Hashable, str] = field(default_factory=dict)


class _Traced:
    """A trace with symbols, and which of the conditions on it have turned out to mean nothing."""

    def __init__(self, step: SymbolicStep) -> None:
        self.step = step
        self.irrelevant: set[tuple[str, str]] = set()
        self.free: set[str] = set()

    def at(self, sizes: Mapping[str, int]) -> SizedCapture:
        """The capture at these sizes; CaptureError where it would be another program."""
        found = self.step.capture_at(**sizes)
        guards = found.guards
        guards.irrelevant = set(self.irrelevant)
        guards.attributes = {key: value for key, value in guards.attributes.items() if key not in self.irrelevant}
        guards.frozen = {name: value for name, value in guards.frozen.items() if name not in self.free}
        return SizedCapture(**vars(found), sizes=dict(sizes), source=self.step)

    def relax(self, guards: Guards, lookup: Lookup, attributes: dict[tuple[str, str], Any]) -> None:
        """Capturing again gave the same graph as the one with these guards: what has changed means nothing.

        Args:
            guards: of a capture from this trace.
            lookup, attributes: see `Guards.hold`.
        """
        frozen = {*guards.frozen}
        guards.relax(lookup, attributes)
        self.irrelevant |= guards.irrelevant
        self.free |= frozen - guards.frozen.keys()


@dataclass(frozen=True)
class Example:
    """What is captured.

    Args:
        inventory, loss, args, kwargs, options: see `capture_step`.
        signature: of the call.
    """

    inventory: Inventory
    loss: LossFn | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: CaptureOptions
    signature: Signature

    @property
    def family(self) -> Hashable:
        """What it has in common with examples of other sizes."""
        return self.signature.without_sizes(), self.options

    @property
    def leaves(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors of the batch."""
        found = flatten_batch(self.args, self.kwargs)[0]
        return [(path, leaf) for path, leaf in found if isinstance(leaf, torch.Tensor)]

    def capture(self) -> Capture:
        """As it is, with numbers for sizes."""
        fresh, options = self.signature.fresh, self.options
        return capture_step(self.inventory, self.loss, self.args, self.kwargs, options=options, fresh=fresh)

    def trace(self, dims: NamedDims) -> SymbolicStep:
        """With symbols for these dims."""
        how: dict[str, Any] = {"options": self.options, "fresh": self.signature.fresh, "dims": dims}
        args, kwargs = contiguous((self.args, self.kwargs))
        step = SymbolicStep(self.inventory, self.loss, args, kwargs, **how)
        step.trace()
        step.let_go()
        return step


def contiguous(batch: Any) -> Any:
    """The batch with its tensors contiguous, but for those whose dims stand in another order in memory."""
    made: dict[int, torch.Tensor] = {}  # the batch may have the same tensor in several places

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_contiguous():
            return leaf
        in_order = stands_in_order(tuple(leaf.shape), leaf.stride())
        return made.setdefault(id(leaf), leaf.contiguous()) if in_order else leaf

    return compat.tree_map(one, batch)


class Captures:
    """Captures each example once, or gets it from a trace with symbols; see [Note: sizes that change].

    Args:
        dynamic: "auto" (what has changed becomes a symbol), True (what `find_dims` names is one from the first batch
            on), False (each example is captured with numbers).

    Attributes:
        refused: for each example that could not have symbols for its sizes, why.
    """

    def __init__(self, dynamic: bool | str = "auto") -> None:
        self._dynamic = dynamic
        self._families: dict[Hashable, _Family] = {}
        self.refused: list[str] = []

    def forget(self) -> None:
        """Begin anew."""
        self._families.clear()

    def note(self, example: Example) -> None:
        """Take the sizes of an example into account that has a program already."""
        if self._dynamic:
            self._family(example)

    def of(self, example: Example, lookup: Lookup | None) -> Capture:
        """The capture of an example.

        Args:
            example: of a signature that has no program yet, or none whose guards hold.
            lookup: (kind, name) of a state entry -> its current value; None: nothing has changed since any trace.

        Raises:
            CaptureError: if it cannot be captured.
        """
        if not self._dynamic:
            return example.capture()
        family = self._family(example)
        dims, key = family.changing.dims(example.leaves), family.changing.key(example.leaves)
        if not dims:
            return example.capture()
        start = time.perf_counter()
        if key not in family.refused:
            try:
                found = _from_traces(family.traces.setdefault(key, []), example, dims, lookup)
            except CaptureError as error:
                log.info("fxzero: captured for one shape, as sizes cannot be symbols: %s", error)
                family.refused[key] = str(error)
        if key in family.refused:
            found = example.capture()
        if not isinstance(found, SizedCapture):
            self.refused.append(family.refused.get(key, f"{MOST_TRACES} traces with symbols do not take it"))
        return replace(found, seconds=time.perf_counter() - start)

    def _family(self, example: Example) -> _Family:
        family = self._families.get(example.family)
        if family is None:
            changing = ChangingSizes(example.leaves, all_named=self._dynamic is True)
            family = self._families[example.family] = _Family(changing)
        else:
            family.changing.note(example.leaves)
        return family


def _from_traces(traces: list[_Traced], example: Example, dims: NamedDims, lookup: Lookup | None) -> Capture:
    """The capture from the first of these traces that takes it, or from a new one."""
    sizes = sizes_of(example.leaves, dims)
    words = ", ".join(f"{name}={size}" for name, size in sizes.items())
    stale: list[tuple[_Traced, SizedCapture]] = []
    for traced in traces:
        try:
            found = traced.at(sizes)
        except CaptureError as error:
            log.info("fxzero: not from what was traced before: %s", error)
            continue
        if lookup is None or found.guards.hold(lookup, example.inventory.attributes):
            log.info("fxzero: %s, from what was traced before", words)
            return found
        stale.append((traced, found))
    capture, new = _anew(traces, example, dims, sizes)
    for traced, before in stale:
        if lookup is not None and before.same_as(capture):
            traced.relax(before.guards, lookup, example.inventory.attributes)
            return before
    if new is None:
        log.info("fxzero: %s, captured for one shape: %d traces with symbols do not take it", words, len(traces))
    else:
        log.info("fxzero: %s, traced with symbols for these sizes", words)
        traces.append(new)
    return capture


def _anew(
    traces: list[_Traced], example: Example, dims: NamedDims, sizes: Mapping[str, int]
) -> tuple[Capture, _Traced | None]:
    """A capture of its own, from a new trace unless there are too many."""
    if len(traces) >= MOST_TRACES:
        return example.capture(), None
    new = _Traced(example.trace(dims))
    return new.at(sizes), new


def _sizes(leaves: Leaves) -> dict[Dim, int]:
    return {(path, dim): size for path, leaf in leaves for dim, size in enumerate(leaf.shape)}
