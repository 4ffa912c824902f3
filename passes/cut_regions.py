"""Calls between two scheduled points become regions, which repeat with the model's blocks.

[Note: where regions are cut]
A collective, a wait, a move, a random draw and whatever a compiler is not to touch stay where they are: fences. Between
two of them, calls of one block of the model in one phase are a region, and those of one parameter's update. Backward's
calls come together past updates that stand between them, since nothing in backward reads what an update makes. So the
regions of a layer look the same in each layer, and as many distinct ones are compiled for 8 layers as for 126.

Numbers of the host (bias corrections) are made right before the region that needs them. A sum of gradients that belongs
to no module goes with what it follows. Releases come after the region of the last use: inside of it memory is free
after the last use anyway.

Each chunk of a loss's rows is a region of its own, so that no compiler makes their logits at once; what adds up the
chunks' gradients stays outside, where it writes over the sum.

Where one kernel over rows is to hold a region, a call joins only if that kernel can hold it beside the others
([Note: row structure] in `graph/row_structure.py`); else it begins the next region, or runs by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.blocks import repeated_blocks
from fxzero.graph.call_signature import has_symbols
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import reorder
from fxzero.graph.number_arguments import with_tensors
from fxzero.graph.region_rules import is_fence
from fxzero.graph.regions import mark
from fxzero.graph.row_ops import is_row_call
from fxzero.graph.row_structure import RowStructure
from fxzero.graph.step_graph import ADDED_UP, is_getitem, is_view, yields_scalar, yields_tensor
from fxzero.graph.swap_ops import is_off_device
from fxzero.graph.synchronisation import host_values

aten = torch.ops.aten

Key = tuple[str, str]


@dataclass
class _Group:
    """Calls of one key between two fences; `before` are numbers of the host that they need."""

    key: Key | None
    calls: list[fx.Node] = field(default_factory=list)
    before: list[fx.Node] = field(default_factory=list)
    rows: RowStructure | None = None

    def takes(self, calls: list[fx.Node]) -> bool:
        """Whether a call and its parts have become the next ones of the group."""
        if self.rows is not None and not all([self.rows.take(node) for node in calls]):
            return False
        self.calls += calls
        return True


@graph_pass(requires=("captured",), provides=("regions-cut",), numerics="bitwise")
def cut_regions(step: StepGraph, *, fewest_calls: int = 2, only_rows: bool = False) -> int:
    """Mark runs of calls that are compiled as one, and bring together what belongs to one.

    Args:
        step: the graph, in its final order.
        fewest_calls: that do more than name a part of a tensor; a run with fewer stays as it is.
        only_rows: a region holds pointwise ops and reductions of rows only, of one number of rows and columns.

    Returns:
        The number of regions.
    """
    cutter = _Cutter(step, only_rows=only_rows)
    for node in step.calls():
        cutter.take(node)
    cutter.flush()
    reorder(step, cutter.order)
    number = 0
    for group in cutter.groups:
        if group.key is not None and _pays(group.calls, fewest_calls):
            mark(number, group.calls)
            number += 1
    return number


class _Cutter:
    """Takes the calls of a program in order.

    Attributes:
        order: of all calls so far, up to the last fence.
        groups: of all calls so far, in order.
    """

    def __init__(self, step: StepGraph, *, only_rows: bool) -> None:
        self._only_rows = only_rows
        self.order: list[fx.Node] = []
        self.groups: list[_Group] = []
        self._host = host_values(step) | {node for node in step.calls() if yields_scalar(node)}
        self._blocks = repeated_blocks({node.meta["module"] for node in step.calls()})
        self._open: list[_Group] = []  # since the last fence
        self._place: dict[fx.Node, int] = {}  # of a call since the last fence: index of its group
        self._waiting: dict[fx.Node, None] = {}  # numbers of the host that nothing has needed yet
        self._releases: list[fx.Node] = []
        self._parts: set[fx.Node] = set()  # of several values, which stand behind the call that yields them

    def take(self, node: fx.Node) -> None:
        """The next call."""
        if node in self._parts:
            return
        if node in self._host and not _reads_device(node, self._host):
            self._waiting[node] = None
        elif c10d.is_release(node):
            self._releases.append(node)
        elif is_fence(node) or is_off_device(node):
            numbers = self._needed(node)
            self.flush()
            self.order += [*numbers, node]
        else:
            self._join(node)

    def flush(self) -> None:
        """The calls since the last fence are in order."""
        for group in self._open:
            self.order += [*group.before, *group.calls]
        self.order += [*self._waiting, *self._releases]
        self.groups += self._open
        self._open, self._place, self._waiting, self._releases = [], {}, {}, []

    def _join(self, node: fx.Node) -> None:
        key = self._key(node)
        numbers = self._needed(node)
        sources = (source for call in (node, *numbers) for source in call.all_input_nodes)
        first = max((self._place[source] for source in sources if source in self._place), default=0)
        parts = [user for user in node.users if is_getitem(user)]
        self._parts.update(parts)
        place = self._find(key, first) if key is not None else None
        if place is None or not self._open[place].takes([node, *parts]):
            place = self._begin(key, [node, *parts])
        self._open[place].before += numbers
        self._place |= dict.fromkeys((node, *numbers, *parts), place)

    def _begin(self, key: Key | None, calls: list[fx.Node]) -> int:
        """The place of a group that calls begin: one of no key where they can be in no region."""
        group = _Group(key, rows=RowStructure(keeps_last=True) if self._only_rows and key is not None else None)
        if not group.takes(calls):
            group = _Group(None, calls)
        self._open.append(group)
        return len(self._open) - 1

    def _find(self, key: Key, first: int) -> int | None:
        """The group that a call of this key joins: the last one, updates passed over, if not before `first`."""
        for place in reversed(range(first, len(self._open))):
            group = self._open[place]
            if group.key == key:
                return place
            if group.key is None or group.key[0] != "update":
                return None
        return None

    def _key(self, node: fx.Node) -> Key | None:
        """What a call's group has in common; None for what a compiler is not to touch."""
        if not can_be_compiled(node) or (self._only_rows and not is_row_call(node)):
            return None
        if node.meta.get("chunk") == ADDED_UP:
            return None
        phase, module = node.meta["phase"], node.meta["module"]
        if phase == "update":
            return phase, node.meta.get("param") or ""
        if "chunk" in node.meta:
            return phase, f"chunk {node.meta['chunk']}"
        if phase == "backward" and not module:
            return self._followed(phase)
        return phase, self._blocks.get(module, "")

    def _followed(self, phase: str) -> Key:
        """The key of the last group that is no update's."""
        keys = (group.key for group in reversed(self._open) if group.key is None or group.key[0] != "update")
        last = next(keys, None)
        return last if last is not None and last[0] == phase else (phase, "")

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """The numbers of the host that a call follows from and nothing has needed before, in order."""
        wanted: set[fx.Node] = set()
        stack = [node]
        while stack:
            found = [source for source in stack.pop().all_input_nodes if source in self._waiting]
            wanted.update(found)
            stack += found
        needed = [number for number in self._waiting if number in wanted]
        for number in needed:
            del self._waiting[number]
        return needed


def can_be_compiled(node: fx.Node) -> bool:
    """Whether a call may be part of a region: an op of torch on tensors of known sizes on the device."""
    target: Any = node.target
    if not compat.is_op(target) or target.namespace != "aten" or target in _NOT_COMPILED:
        return False
    vals = [source.meta["val"] for source in (node, *node.all_input_nodes)]
    if any(has_symbols(val) or _is_complex(val) for val in vals):
        return False
    return with_tensors(node) is not None


# not pointwise by their tag, but what a compiler makes one kernel of with their neighbours
_FUSED = {aten._log_softmax.default, aten._log_softmax_backward_data.default}
_NOT_COMPILED = {aten._local_scalar_dense.default, aten.mkldnn_rnn_layer.default, aten.equal.default}


def _is_complex(val: Any) -> bool:
    return isinstance(val, torch.Tensor) and val.is_complex()


def _reads_device(node: fx.Node, host: set[fx.Node]) -> bool:
    return any(source not in host for source in node.all_input_nodes if yields_tensor(source))


def _pays(calls: Iterable[fx.Node], fewest: int) -> bool:
    """Whether calls are worth compiling: some work together, and not only by handing products on."""
    working = [node for node in calls if not is_view(node) and not is_getitem(node)]
    fused = (node for node in working if torch.Tag.pointwise in node.target.tags or node.target in _FUSED)  # type: ignore[union-attr]
    return len(working) >= fewest and next(fused, None) is not None
