"""The answers for state: where parameters and optimizer state rest, and where they are updated.

[Note: groups of state]
Parameters are grouped in the order of their updates, each group about the same part of all bytes: an answer is for a
whole group, so that their number does not grow with the model. What an answer changes in memory is estimated on the
program that keeps everything: nothing rests, and each phase that reads it has it for as long as `place_swaps` would
leave it there. Moves are priced as if nothing hid them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from fxzero.cost.compute import compute_seconds, host_seconds
from fxzero.cost.hardware import Hardware
from fxzero.decide.combination import Alternative
from fxzero.decide.decision import Group, where_of
from fxzero.graph import PHASES, StepGraph, swap_ops
from fxzero.graph.blocks import list_of, repeated_blocks
from fxzero.graph.placement import AUTO, Placement, can_be_placed, owner_of
from fxzero.graph.step_graph import num_bytes, yields_tensor
from fxzero.graph.synchronisation import host_values
from fxzero.passes.offload_state import update_of
from fxzero.plan import Plan
from fxzero.plan_buckets import bucket_bytes
from fxzero.plan_offload import state_tiers, tiers_to_choose

_NUM_GROUPS = 64
_WHAT = {"optimizer": "optimizer state", "parameter": "parameters"}


@dataclass(frozen=True)
class _Way:
    """One way to keep a tensor of the state."""

    tier: str
    on_host: bool = False

    def __str__(self) -> str:
        return f"offloaded to {self.tier}" + ", updated there" * self.on_host


_KEPT = _Way(swap_ops.DEVICE)


@dataclass(frozen=True)
class _Visit:
    """A phase that reads a tensor: from its first reader to its last, or to where its next value is made."""

    node: fx.Node
    start: int
    end: int


@dataclass
class _Owned:
    """What may move of one parameter: itself, or its optimizer state.

    Args:
        kind: of the entries.
        param: name of the parameter.
        nodes: the inputs.
        visits: of all of them.
    """

    kind: str
    param: str
    nodes: list[fx.Node] = field(default_factory=list)
    visits: list[_Visit] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(node.meta["val"]) for node in self.nodes)


class StateAnswers:
    """For each group of state, the ways to keep it, as they are with nothing decided first.

    Args:
        program: what the recipe makes of a captured step with nothing decided.
        plan: resolved.
        hardware: for estimates of time.
    """

    def __init__(self, program: StepGraph, *, plan: Plan, hardware: Hardware) -> None:
        self._program, self._plan, self._hardware = program, plan, hardware
        self._position = {node: place for place, node in enumerate(program.graph.nodes)}
        self._results = program.results
        self._on_host = host_values(program)
        rule = state_tiers(plan)
        self._open = [kind for kind, tier in rule.items() if tier == AUTO]
        if plan.update_on_host == AUTO and "optimizer" not in self._open:
            self._open.append("optimizer")  # it rests on the host; what is open is where it is updated
        owned = self._owned()
        self._windows = self._units(owned)
        self.groups_of_state = [group for kind in self._open for group in _grouped(owned, kind)]
        self._ways = [self._ways_of(group[0].kind) for group in self.groups_of_state]
        self.alternatives = [
            [self._alternative(group, way) for way in ways]
            for group, ways in zip(self.groups_of_state, self._ways, strict=True)
        ]

    # ---- what is told

    def placed(self, numbers: Sequence[int]) -> Placement:
        """Where state rests, for the number of an answer a group."""
        chosen = [
            (owned, way)
            for group, ways, number in zip(self.groups_of_state, self._ways, numbers, strict=True)
            for owned in group
            if (way := ways[number]) != _KEPT
        ]
        tiers = {(owned.kind, owned.param): way.tier for owned, way in chosen}
        return Placement(tiers, frozenset(owned.param for owned, way in chosen if way.on_host))

    def least(self) -> list[int]:
        """The answers that keep the least on the device; of these, those that take the least of the host."""
        kept = [[(sum(a.change.values()), a.host_bytes) for a in found] for found in self.alternatives]
        return [sizes.index(min(sizes)) for sizes in kept]

    def groups(self, numbers: Sequence[int]) -> list[Group]:
        """What that is, for people."""
        blocks = repeated_blocks(module_of(owned) for group in self.groups_of_state for owned in group)
        every = Counter(list_of(block) for block in set(blocks.values()))
        found: dict[tuple[str, str, str], tuple[set[str], list[float]]] = {}
        for index, number in enumerate(numbers):
            ways, alternatives = self._ways[index], self.alternatives[index]
            if ways[number] == _KEPT or (number == 0 and _KEPT not in ways):
                continue
            group = self.groups_of_state[index]
            total = sum(owned.num_bytes for owned in group) or 1
            for owned in group:
                block = blocks.get(module_of(owned), "")
                key = (where_of(module_of(owned), block), _WHAT[owned.kind], str(ways[number]))
                names, sums = found.setdefault(key, (set(), [0.0, 0.0]))
                names.add(block)
                sums[0] += owned.num_bytes
                sums[1] += alternatives[number].seconds * owned.num_bytes / total
        return [
            Group(*key, len(names), every[list_of(min(names))] or 1, round(size), seconds)
            for key, (names, (size, seconds)) in found.items()
        ]

    # ---- what there is

    def _owned(self) -> list[_Owned]:
        """What may move, in the order of the updates."""
        found: dict[tuple[str, str], _Owned] = {}
        for node in self._program.inputs(*self._open):
            entry = node.meta["entry"]
            if not yields_tensor(node) or not can_be_placed(entry.shape, self._plan.offload_below):
                continue
            owned = found.setdefault((entry.kind, owner_of(entry.key)), _Owned(entry.kind, owner_of(entry.key)))
            owned.nodes.append(node)
            owned.visits += self._visits(node)
        return sorted(found.values(), key=lambda owned: max((v.end for v in owned.visits), default=0))

    def _visits(self, node: fx.Node) -> Iterator[_Visit]:
        new = self._results.get(node.meta["entry"].key)
        for phase in PHASES:
            readers = [n for n in node.users if n.op == "call_function" and n.meta["phase"] == phase]
            places = [self._position[reader] for reader in readers]
            if phase == PHASES[-1] and new is not None and new is not node:
                places.append(self._position[new])
            if places:
                yield _Visit(node, min(places), max(places))

    def _units(self, owned: Iterable[_Owned]) -> dict[_Visit, tuple[int, int]]:
        """Visit -> the places between which its tensor is on the device, with the moves in [Note: units]."""
        visits = sorted((v for o in owned for v in o.visits), key=lambda v: v.start)
        units: list[list[_Visit]] = []
        total = 0
        for visit in visits:
            size = num_bytes(visit.node.meta["val"])
            if units and total + size <= bucket_bytes(self._plan):
                units[-1].append(visit)
                total += size
            else:
                units.append([visit])
                total = size
        windows: dict[_Visit, tuple[int, int]] = {}
        ahead = self._plan.prefetch
        for index, unit in enumerate(units):
            start = units[max(index - ahead, 0)][0].start
            later = units[index + ahead] if index + ahead < len(units) else []
            for visit in unit:
                end = max([visit.end, *(min(v.end for v in later) for _ in later[:1])])
                windows[visit] = min(start, visit.start), end
        return windows

    # ---- what an answer comes to

    def _ways_of(self, kind: str) -> list[_Way]:
        rule = state_tiers(self._plan)[kind]
        tiers = tiers_to_choose(self._plan) if rule == AUTO else (rule,)
        ways = [_KEPT] * (rule == AUTO) + [_Way(tier) for tier in tiers]
        there = kind == "optimizer" and self._plan.update_on_host == AUTO and "host" in tiers
        return ways + [_Way("host", on_host=True)] * there

    def _alternative(self, group: Sequence[_Owned], way: _Way) -> Alternative:
        if way == _KEPT:
            return Alternative(0.0, {})
        rests_there = state_tiers(self._plan)[group[0].kind] != AUTO  # and is moved in and out, with nothing decided
        change: dict[int, float] = {}
        seconds = 0.0
        for owned in group:
            if not rests_there:
                change[0] = change.get(0, 0.0) - owned.num_bytes
            if way.on_host:
                seconds += self._seconds_there(owned)
                seconds -= self._moves_seconds(owned, "host") if rests_there else 0.0
                size, visits = self._returned_bytes(owned), owned.visits[:1]
            else:
                seconds += 0.0 if rests_there else self._moves_seconds(owned, way.tier)
                size, visits = None, [] if rests_there else owned.visits
            for visit in visits:
                start, end = self._windows[visit]
                num = num_bytes(visit.node.meta["val"]) if size is None else size
                change[start] = change.get(start, 0.0) + num
                change[end + 1] = change.get(end + 1, 0.0) - num
        host_bytes = sum(owned.num_bytes for owned in group) if way.tier == "host" and not rests_there else 0
        return Alternative(seconds, {place: size for place, size in sorted(change.items()) if size}, host_bytes)

    def _moves_seconds(self, owned: _Owned, tier: str) -> float:
        """Of bringing it in for each phase that reads it, and of storing what is new."""
        moved = sum(num_bytes(visit.node.meta["val"]) for visit in owned.visits)
        for node in owned.nodes:
            new = self._results.get(node.meta["entry"].key)
            moved += num_bytes(node.meta["val"]) if new is not None and new is not node else 0
        return moved / self._hardware.tier_bytes_s(tier)

    def _seconds_there(self, owned: _Owned) -> float:
        """Of an update on the host, instead of one on the device."""
        moved = [n for n in update_of(self._program, owned.param, owned.nodes, self._on_host) if not _swaps(n)]
        inside = {*moved, *owned.nodes}
        sources = {source for node in moved for source in node.all_input_nodes if source not in inside}
        sent = sum(num_bytes(n.meta.get("val")) for n in sources if n not in self._on_host and not _swaps(n))
        there = sum(host_seconds(node, self._hardware) for node in moved)
        here = sum(compute_seconds(node, self._hardware) for node in moved)
        return (sent + self._returned_bytes(owned)) / self._hardware.tier_bytes_s("host") + there - here

    def _returned_bytes(self, owned: _Owned) -> int:
        """What comes back from an update on the host: the parameter's next value."""
        new = self._results.get(("parameter", owned.param))
        return num_bytes(new.meta["val"]) if new is not None else 0


def module_of(owned: _Owned) -> str:
    """The module that a parameter is of."""
    return owned.param.rpartition(".")[0]


def _swaps(node: fx.Node) -> bool:
    return swap_ops.is_launch(node) or swap_ops.is_wait(node)


def _grouped(owned: Iterable[_Owned], kind: str) -> list[list[_Owned]]:
    """What there is of a kind, in groups of neighbours with about the same number of bytes."""
    own = [item for item in owned if item.kind == kind]
    least = sum(item.num_bytes for item in own) / _NUM_GROUPS
    groups: list[list[_Owned]] = []
    for item in own:
        if not groups or sum(other.num_bytes for other in groups[-1]) >= least:
            groups.append([])
        groups[-1].append(item)
    return groups
