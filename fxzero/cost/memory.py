"""Memory of a step on one rank, before it runs: its peak, what stands there, and its course over the program.

Every storage of the program (`cost/lifetimes.py`) has a size, a life, and a kind (`cost/memory_kinds.py`); the rest is
adding up. What the device's allocator makes of a request is in `cost/allocator.py`, what ops take while they run in
`cost/workspace.py`. docs/memory.md says how exact the sum is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from fxzero.cost.allocator import Allocator, allocator_of
from fxzero.cost.lifetimes import Storage, is_resting, storages
from fxzero.cost.memory_kinds import KINDS, kinds_of
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph.blocks import with_stars
from fxzero.graph.step_graph import device_of, num_bytes
from fxzero.graph.swap_ops import tier_of
from fxzero.graph.text import op_name

TIERS = ("device", "host", "nvme")


@dataclass(frozen=True)
class Standing:
    """Memory that stands at the peak: of one storage, or of several alike.

    Args:
        kind: one of `memory_kinds.KINDS`.
        module: path of the module that it belongs to; of several, with * for numbers; "" at the root.
        what: the name of a parameter, of a parameter and its optimizer state, of an input, or of the op that made it.
        num_bytes: as the allocator counts it.
        count: of storages.
    """

    kind: str
    module: str
    what: str
    num_bytes: int
    count: int = 1


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of tensors on this rank.

    Args:
        state_bytes: parameters, buffers and optimizer state, as they rest between steps, and the batch.
        peak_bytes: the most that is alive at any node, state included, as the allocator counts it.
        peak_node: the node at which that is.
        by_kind: what of it is of which kind; all of `memory_kinds.KINDS`, in that order.
        standing: each storage there, largest first.
        reserved_bytes: what the allocator takes from the device, an estimate (`Allocator.reserved`).
        host_bytes, nvme_bytes: the most that is on the host and on disk at any node; none of it is in peak_bytes.
        allocator: whose rules these are.
    """

    state_bytes: int
    peak_bytes: int
    peak_node: fx.Node
    by_kind: dict[str, int]
    standing: tuple[Standing, ...]
    reserved_bytes: int
    host_bytes: int
    nvme_bytes: int
    allocator: Allocator

    def grouped(self) -> list[Standing]:
        """What stands at the peak with the numbers of modules left out: "layers.*.mlp", largest first.

        Groups keep the names of the largest three things in them.
        """
        groups: dict[tuple[str, str], list[Standing]] = defaultdict(list)
        for item in self.standing:
            groups[item.kind, with_stars(item.module)].append(item)
        return sorted((_joined(*key, items) for key, items in groups.items()), key=lambda item: -item.num_bytes)


@dataclass(frozen=True)
class MemoryTimeline:
    """Memory at each node of a program.

    Args:
        nodes: of the graph, in order.
        bytes_by_kind: kind -> bytes on the device while each of them runs.
        tiers: "host" and "nvme" -> bytes there, likewise.
        storages: what there is, with its life.
        kinds: the kind of each.
        allocator: whose rules sizes follow.
    """

    nodes: list[fx.Node]
    bytes_by_kind: dict[str, np.ndarray]
    tiers: dict[str, np.ndarray]
    storages: list[Storage]
    kinds: dict[Storage, str]
    allocator: Allocator
    total: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.bytes_by_kind.values()))

    @property
    def peak(self) -> int:
        """The position of the peak."""
        return int(self.total.argmax())

    def alive(self, position: int) -> Iterator[Storage]:
        """The storages on the device while a node runs."""
        return (s for s in self.storages if s.tier == "device" and s.start <= position <= s.end)


def memory_timeline(
    step: StepGraph, *, beside: Iterable[StepGraph] = (), allocator: Allocator | None = None
) -> MemoryTimeline:
    """The bytes of each kind at each node of a program.

    Args:
        step: the graph.
        beside: the step's programs for its other microbatches: what rests for them is there too.
        allocator: whose rules to follow; default: that of the graph's device.

    Raises:
        RewriteError: if a value is in a tier that is not known.
    """
    allocator = allocator or allocator_of(device_of(step))
    nodes = list(step.graph.nodes)
    found = [*_resting_beside(step, beside, len(nodes)), *storages(step, device=allocator.device)]
    kinds = kinds_of(step, found)
    steps = {key: np.zeros(len(nodes) + 1, dtype=np.int64) for key in (*KINDS, *TIERS[1:])}
    for storage in found:
        if storage.tier not in TIERS:
            raise RewriteError.of(
                f"%{storage.node.name}, meta['tier']",
                expected=f"one of {', '.join(TIERS)}",
                got=repr(storage.tier),
                fix="correct the pass that placed it",
            )
        on_device = storage.tier == "device"
        line = steps[kinds[storage] if on_device else storage.tier]
        size = allocator.allocated(storage.num_bytes) if on_device else storage.num_bytes
        line[storage.start] += size
        line[storage.end + 1] -= size
    lines = {key: np.cumsum(line)[:-1] for key, line in steps.items()}
    tiers = {tier: lines.pop(tier) for tier in TIERS[1:]}
    return MemoryTimeline(nodes, lines, tiers, found, kinds, allocator)


def highest_profile(steps: Sequence[StepGraph], *, allocator: Allocator | None = None) -> tuple[int, MemoryProfile]:
    """Which of a step's programs, one a microbatch, peaks highest, and its profile."""
    distinct = {id(step): index for index, step in enumerate(steps)}
    found = {}
    for index in distinct.values():
        beside = [*steps[:index], *steps[index + 1 :]]
        found[index] = memory_profile(steps[index], beside=beside, allocator=allocator)
    return max(found.items(), key=lambda item: item[1].peak_bytes)


def memory_profile(
    step: StepGraph, *, beside: Iterable[StepGraph] = (), allocator: Allocator | None = None
) -> MemoryProfile:
    """The peak of a program and what stands there; arguments as for `memory_timeline`."""
    return profile_of(memory_timeline(step, beside=beside, allocator=allocator))


def profile_of(timeline: MemoryTimeline) -> MemoryProfile:
    """The peak of a timeline and what stands there."""
    at = timeline.peak
    rules = timeline.allocator
    resting = (s for s in timeline.storages if is_resting(s.node) and s.tier == "device")
    standing = [
        Standing(timeline.kinds[s], *_place(s), rules.allocated(s.num_bytes)) for s in timeline.alive(at) if s.num_bytes
    ]
    return MemoryProfile(
        state_bytes=sum(rules.allocated(s.num_bytes) for s in resting),
        peak_bytes=int(timeline.total[at]),
        peak_node=timeline.nodes[at],
        by_kind={kind: int(line[at]) for kind, line in timeline.bytes_by_kind.items()},
        standing=tuple(sorted(standing, key=lambda item: (-item.num_bytes, item.kind, item.module, item.what))),
        reserved_bytes=rules.reserved(_events(timeline)),
        host_bytes=int(timeline.tiers["host"].max()),
        nvme_bytes=int(timeline.tiers["nvme"].max()),
        allocator=rules,
    )


def bytes_beside(step: StepGraph, beside: Iterable[StepGraph]) -> int:
    """Bytes on the device that rest for a step's other microbatches while this program runs."""
    return sum(storage.num_bytes for storage in _resting_beside(step, beside, 1) if storage.tier == "device")


def _resting_beside(step: StepGraph, beside: Iterable[StepGraph], num_nodes: int) -> Iterator[Storage]:
    """What other microbatches' programs read and this one does not: optimizer state, and their part of the batch."""
    known = {node.meta["entry"].key for node in step.placeholders}
    for other in beside:
        for node in filter(is_resting, other.placeholders):
            entry = node.meta["entry"]
            if entry.kind == "batch" or entry.key not in known:
                yield Storage(node, num_bytes(node.meta["val"]), 0, num_nodes - 1, tier_of(node))
            known.add(entry.key)


def _events(timeline: MemoryTimeline) -> Iterator[tuple[int, int]]:
    """The requests that a program makes of the allocator, in order: (a storage's number, bytes), 0 to give back."""
    begins: dict[int, list[int]] = defaultdict(list)
    ends: dict[int, list[int]] = defaultdict(list)
    for number, storage in enumerate(timeline.storages):
        if storage.tier == "device" and storage.num_bytes:
            begins[storage.start].append(number)
            ends[storage.end].append(number)
    for position in range(len(timeline.nodes)):
        for number in begins[position]:
            yield number, timeline.storages[number].num_bytes
        for number in ends[position]:
            yield number, 0


def _place(storage: Storage) -> tuple[str, str]:
    """(module, what) of a storage."""
    node = storage.node
    if node.op == "placeholder":
        entry = node.meta["entry"]
        owner = entry.param or entry.name
        if entry.kind == "batch":
            return "", entry.name
        module, _, name = owner.rpartition(".")
        return module, name + entry.name.removeprefix(owner)
    members = (node, *storage.members)
    gradient = next((name for m in members for name in m.meta.get("grad_of", ())), None)
    parameter = gradient or next((m.meta["param"] for m in members if "param" in m.meta), None)
    if parameter is not None and not storage.is_scratch:
        module, _, name = parameter.rpartition(".")
        return module, name
    return node.meta.get("module", ""), op_name(node.target)


def _joined(kind: str, module: str, items: list[Standing]) -> Standing:
    bytes_of: dict[str, int] = defaultdict(int)
    for item in items:
        bytes_of[item.what] += item.num_bytes
    names = sorted(bytes_of, key=lambda name: -bytes_of[name])
    what = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
    return Standing(kind, module, what, sum(bytes_of.values()), sum(item.count for item in items))
