"""Which gathers and reductions share a launch, decided by what it costs: fewer latencies against less overlap.

A cut has a size for each stream (gathers of forward, gathers of backward, reductions): neighbours share a launch until
that many bytes are together. What begins forward and backward is exposed, and so is what ends backward; there buckets
may be smaller, growing by a factor with the distance from that end. Cuts are judged by `flow_of`: first one size for
all streams, then each stream by itself. Of cuts that take equally long the one with the lowest peak is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from fxzero.graph.text import size_text
from fxzero.schedule.flow import Buckets, Flow, Rules, flow_of
from fxzero.schedule.traffic import BACKWARD, END, FORWARD, NEED, REDUCTIONS, STREAMS, Traffic

MIB = 2**20
SIZES = (0, *(MIB << power for power in range(14)))  # of a bucket; 0: each message alone
_GROWTH = (0.0, 0.5, 1.0)  # of a bucket, by the bytes between it and its exposed end; 0: none is smaller
_FIRST = (MIB, 16 * MIB)  # of the bucket at an exposed end
_EQUAL = 1e-4  # of the time: what differs by less takes equally long
_ROUNDS = 2
_TOLD = (0, 4 * MIB, 64 * MIB, 256 * MIB)
_PARTS = 16  # of what is gathered twice: how many of them stay


@dataclass(frozen=True)
class Size:
    """How one stream is cut.

    Args:
        most_bytes: of a bucket, as its tensors travel; 0: each alone.
        first_bytes: at the exposed end; 0: as elsewhere.
        growth: bytes that a bucket may have more for each byte between it and that end.
    """

    most_bytes: int
    first_bytes: int = 0
    growth: float = 0.0

    def at(self, distance: int) -> float:
        """The bytes of a bucket so many bytes from the exposed end."""
        return min(self.most_bytes, self.first_bytes + self.growth * distance) if self.growth else self.most_bytes


Cut = dict[str, Size]


def even(num_bytes: int) -> Cut:
    """One size for all streams."""
    return {stream: Size(num_bytes) for stream in STREAMS}


def buckets_of(traffic: Traffic, cut: Cut, *, kept: frozenset[int] = frozenset()) -> Buckets:
    """Each message in its bucket: gathers as they are needed, then reductions as their last gradient is born.

    Args:
        traffic: of a step.
        cut: how it is cut.
        kept: gathers of backward that are left out.
    """
    buckets: list[tuple[int, ...]] = []
    for stream in STREAMS:
        messages = [index for index in traffic.stream(stream) if index not in kept]
        if stream == REDUCTIONS:  # cut from the end of backward on, which is exposed
            found = [tuple(bucket[::-1]) for bucket in _cut(traffic, messages[::-1], cut[stream])]
            buckets += sorted(found, key=lambda bucket: bucket[-1])
        else:
            buckets += [tuple(bucket) for bucket in _cut(traffic, messages, cut[stream])]
    return tuple(buckets)


def _cut(traffic: Traffic, messages: Iterable[int], size: Size) -> list[list[int]]:
    """Runs of messages that are alike; between these may lie others."""
    buckets: list[list[int]] = []
    filling: dict[tuple[object, ...], tuple[list[int], int, int]] = {}  # bucket, its bytes, its distance from the end
    passed = 0
    for index in messages:
        message = traffic.messages[index]
        bucket, together, distance = filling.get(message.alike, ([], 0, passed))
        if not bucket or together + message.sent_bytes > size.at(distance):
            bucket, together, distance = [], 0, passed
            buckets.append(bucket)
        bucket.append(index)
        filling[message.alike] = bucket, together + message.sent_bytes, distance
        passed += message.sent_bytes
    return buckets


@dataclass(frozen=True)
class Choice:
    """A cut with what it comes to.

    Args:
        cut: for each stream.
        buckets: its messages.
        kept: gathers of backward that are left out: what forward gathered stays.
        flow: time and peak.
        others: bytes of a cut that is even -> its seconds.
    """

    cut: Cut
    buckets: Buckets
    flow: Flow
    kept: frozenset[int] = frozenset()
    others: dict[int, float] = field(default_factory=dict)


class Search:
    """Tries cuts of one step.

    Args:
        traffic: of it.
        rules: in what order launches come; a limit on memory holds for all cuts. Without one a schedule by cost gets
            what the fixed order of a cut takes.
        room_bytes: of the device, where the rules have no limit.
    """

    def __init__(self, traffic: Traffic, rules: Rules, *, room_bytes: float = float("inf")) -> None:
        self.traffic, self.rules = traffic, rules
        self.room_bytes = float(room_bytes) if rules.limit_bytes is None else float(rules.limit_bytes)
        self._known: dict[tuple[Buckets, frozenset[int]], Flow] = {}

    def find(self, *, given: int | None = None, keep: bool = False) -> Choice:
        """The best cut that was found.

        Args:
            given: bytes of all buckets, where only what stays gathered is open.
            keep: some parameters may stay gathered from forward to backward, where that pays.
        """
        if given is not None:
            best = self.judge(even(given))
            return self._keep(best, open_cut=False) if keep else best
        evens = [self.judge(even(size)) for size in SIZES]
        best = self._each_stream(self.best(evens))
        if keep:
            best = self._keep(best)
        others = {size: choice.flow.seconds for size, choice in zip(SIZES, evens, strict=True)}
        return replace(best, others=others)

    def _each_stream(self, best: Choice) -> Choice:
        """Each stream cut otherwise, the others as they are."""
        for _ in range(_ROUNDS):
            before = best
            for stream in STREAMS:
                cuts = ({**best.cut, stream: size} for size in _sizes())
                best = self.best([best, *(self.judge(cut, best.kept) for cut in cuts)])
            if best is before:
                break
        return best

    def _keep(self, best: Choice, *, open_cut: bool = True) -> Choice:
        """What is read again soonest stays: it holds memory for the shortest time; as much of it as pays."""
        if self.rules.limit_bytes is None:  # nobody has said that more may be taken for it
            self.room_bytes = min(self.room_bytes, best.flow.peak_bytes)
        soonest = twice_gathered(self.traffic)
        counts = sorted({len(soonest) * part // _PARTS for part in range(1, _PARTS + 1)} | {1, 2, 4})
        tried = [self.judge(best.cut, frozenset(soonest[:count])) for count in counts if count <= len(soonest)]
        found = self.best([best, *tried])
        return self._each_stream(found) if found.kept and open_cut else found

    def best(self, choices: Iterable[Choice]) -> Choice:
        """What takes least time of what fits; of equal ones what holds least. Where nothing fits, what holds least."""
        found = list(choices)
        fitting = [choice for choice in found if choice.flow.peak_bytes <= self.room_bytes]
        if not fitting:
            return min(found, key=lambda choice: (choice.flow.peak_bytes, choice.flow.seconds))
        limit = min(choice.flow.seconds for choice in fitting) * (1 + _EQUAL)
        equal = (choice for choice in fitting if choice.flow.seconds <= limit)
        return min(equal, key=lambda choice: (choice.flow.peak_bytes, len(choice.kept), len(choice.buckets)))

    def judge(self, cut: Cut, kept: frozenset[int] = frozenset()) -> Choice:
        """What a cut comes to."""
        buckets = buckets_of(self.traffic, cut, kept=kept)
        if (buckets, kept) not in self._known:
            self._known[buckets, kept] = self._flow(buckets, kept)
        return Choice(cut, buckets, self._known[buckets, kept], kept)

    def _flow(self, buckets: Buckets, kept: frozenset[int]) -> Flow:
        rules = self.rules
        if not rules.by_cost or rules.limit_bytes is not None:
            return flow_of(self.traffic, buckets, rules, kept=kept)
        fixed = flow_of(self.traffic, buckets, replace(rules, by_cost=False), kept=kept)
        found = flow_of(self.traffic, buckets, replace(rules, limit_bytes=fixed.peak_bytes), kept=kept)
        return Flow(found.seconds, fixed.peak_bytes)


def _sizes() -> Iterator[Size]:
    for most in SIZES:
        yield Size(most)
        for first in _FIRST:
            if most > first:
                yield from (Size(most, first, growth) for growth in _GROWTH if growth)


def twice_gathered(traffic: Traffic) -> list[int]:
    """The gathers of backward that bring what forward gathered too, those first whose second comes soonest."""
    released: dict[str, tuple[int, int]] = {}
    gaps: dict[int, int] = {}
    for at, (kind, index, _, _) in enumerate(traffic.marks):
        message = traffic.messages[index]
        if kind == END and message.stream == FORWARD and message.param:
            released[message.param] = at, message.held_bytes
        elif kind == NEED and message.stream == BACKWARD and index not in gaps and message.param in released:
            before, held_bytes = released[message.param]
            if held_bytes == message.held_bytes:
                gaps[index] = at - before
    return sorted(gaps, key=lambda index: (gaps[index], index))


def told(traffic: Traffic, choice: Choice, rules: Rules) -> str:
    """What was chosen and why, as people are told it."""
    lines = [f"buckets by cost on {traffic.hardware.name}: {choice.flow.seconds * 1e3:.2f} ms a step (estimate)"]
    if choice.others:
        even_ms = {size_text(size) if size else "alone": choice.others[size] * 1e3 for size in _TOLD}
        lines[0] += f"; with one size: {', '.join(f'{size} {ms:.2f} ms' for size, ms in even_ms.items())}"
    names = {FORWARD: "gathers of forward", BACKWARD: "gathers of backward", REDUCTIONS: "reductions"}
    for stream in STREAMS:
        buckets = [bucket for bucket in choice.buckets if traffic.messages[bucket[0]].stream == stream]
        if buckets:
            lines.append(f"  {names[stream]}: {_told_of(traffic, buckets, rules)}")
    if choice.kept:
        size = sum(traffic.messages[index].held_bytes for index in choice.kept)
        lines.append(f"  {len(choice.kept)} parameters ({size_text(size)}) stay gathered from forward to backward")
    return "\n".join(lines)


def _told_of(traffic: Traffic, buckets: list[tuple[int, ...]], rules: Rules) -> str:
    sizes = [sum(traffic.messages[index].sent_bytes for index in bucket) for bucket in buckets]
    count = sum(map(len, buckets))
    text = f"{len(buckets)} buckets of {size_text(min(sizes))} to {size_text(max(sizes))} for {count} tensors"
    alone = sum(traffic.seconds([index], form=rules.form) for bucket in buckets for index in bucket)
    together = sum(traffic.seconds(bucket, form=rules.form) for bucket in buckets)
    if count == len(buckets):
        return f"{text}, {together * 1e3:.2f} ms"
    saved = (alone - together) / (count - len(buckets))
    return f"{text}, {together * 1e3:.2f} ms; a merge saves {saved * 1e6:.1f} us of latency"
