"""How long a step takes, and what memory it holds, when its messages share launches in a given way.

The marks of a step (`traffic.py`) are gone through once. Lanes and compute keep the rules of [Note: how a program runs]
in `simulate/timeline.py`; orders are those that other passes will make, in short:

    by cost   a lane that would run dry takes the next gather, if memory has room for it until it is needed; a reduction
              before it, where that makes no gather late. Updates run while compute waits, the others at the end.
    fixed     a gather goes `prefetch` buckets ahead of its need, within its phase; the update of a bucket stands before
              the launch of the next reduction.

So a flow is an estimate: marks are coarser than calls, and memory inside updates is left out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fxzero.schedule.traffic import BIRTH, END, FORWARD, NEED, REDUCTIONS, Traffic

Buckets = tuple[tuple[int, ...], ...]  # messages that share a launch, in order


@dataclass(frozen=True)
class Flow:
    """What a flow comes to.

    Args:
        seconds: of the step.
        peak_bytes: of the device.
    """

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Rules:
    """In what order launches come.

    Args:
        by_cost: see above; else fixed.
        prefetch: buckets that a gather goes ahead, where the order is fixed.
        form: how a bucket is launched: "coalesced" or "separate".
        limit_bytes: that the device has room for; None: no limit.
    """

    by_cost: bool
    prefetch: int = 1
    form: str = "coalesced"
    limit_bytes: int | None = None


def flow_of(traffic: Traffic, buckets: Buckets, rules: Rules, *, kept: frozenset[int] = frozenset()) -> Flow:
    """The time and the peak of a step.

    Args:
        traffic: of the step.
        buckets: each message once, those of one stream in order; without backward's gathers of what is kept.
        rules: of launches.
        kept: gathers of backward that are left out, because what forward gathered stays.
    """
    return _Run(traffic, buckets, rules, kept).go()


class _Run:
    """The lanes as the marks are gone through.

    Attributes:
        now: when the compute lane is free, in the lanes' own time ([Note: a lane's own time] in `cost/contention.py`).
        ahead: seconds by which that is ahead of the clock.
        held: bytes of gathered tensors and of gradients, on top of what the marks say.
    """

    def __init__(self, traffic: Traffic, buckets: Buckets, rules: Rules, kept: frozenset[int]) -> None:
        self.traffic, self.rules = traffic, rules
        messages = traffic.messages
        self.gathers = [b for b in buckets if messages[b[0]].stream != REDUCTIONS]
        self.reductions = [b for b in buckets if messages[b[0]].stream == REDUCTIONS]
        self.bucket_of = {
            index: n for group in (self.gathers, self.reductions) for n, b in enumerate(group) for index in b
        }
        self.kept = kept
        self.stays = {messages[index].param for index in kept}  # from forward to backward
        self.hindrance = traffic.hardware.hindrance("net")
        self.seconds = {
            b: self.hindrance * traffic.seconds(b, form=rules.form) for b in (*self.gathers, *self.reductions)
        }
        self.launch_s = {
            b: traffic.launch_s(b, form=rules.form) + sum(messages[i].prepare_s for i in b) for b in self.seconds
        }
        self.transport = {b: sum(messages[i].transport_bytes for i in b) for b in self.seconds}
        self.bytes_of = {b: sum(messages[i].held_bytes for i in b) + self.transport[b] for b in self.seconds}
        self.slowdown = traffic.hardware.slowdown("net")
        self.limit = float("inf") if rules.limit_bytes is None else rules.limit_bytes
        self.free: dict[str, float] = {}
        self.now = self.ahead = 0.0
        self.held = self.peak = 0
        self.next_gather = 0
        self.next_reduction = 0
        self.born = 0  # buckets of reductions that are complete
        self.missing = [len(b) for b in self.reductions]
        self.done: dict[int, float] = {}  # bucket of gathers -> when it is there
        self.travelling: deque[tuple[float, int, float]] = deque()  # reductions: done, bytes, seconds of the update
        self.reduced: deque[tuple[float, float]] = deque()  # updates to run: when they may, seconds
        self.clock = 0.0  # seconds of compute so far
        self.at = 0  # mark

    def go(self) -> Flow:
        for at, (kind, index, seconds, here) in enumerate(self.traffic.marks):
            self.at = at
            if kind == NEED and index not in self.kept:
                self._need(self.bucket_of[index])
            elif kind == END:
                self._end(index)
            elif kind == BIRTH:
                self._birth(index)
            self._settle()
            self._make_room(here)
            self._compute(seconds)
        self._finish()
        self._stand_still(max(self.free.values(), default=0.0))
        return Flow(self.now - self.ahead, self.peak)

    # ---- what happens at a mark

    def _need(self, bucket: int) -> None:
        if not self.rules.by_cost:
            self._launch_ahead(bucket)
        while self.next_gather <= bucket:
            self._gather()
        self._fill(self.done[bucket])
        if self.rules.by_cost:
            self._update_until(self.done[bucket])
        self._stand_still(self.done[bucket])
        self.peak = max(self.peak, self.held + self.traffic.marks[self.at][3])
        self.held -= self.transport.pop(self.gathers[bucket], 0)

    def _launch_ahead(self, bucket: int) -> None:
        """The fixed order: up to `prefetch` buckets ahead, of the same phase."""
        messages = self.traffic.messages
        stream = messages[self.gathers[bucket][0]].stream
        while self.next_gather < len(self.gathers) and self.next_gather <= bucket + self.rules.prefetch:
            ahead = messages[self.gathers[self.next_gather][0]].stream
            if ahead != stream and self.next_gather > bucket:
                return
            self._gather()

    def _end(self, index: int) -> None:
        message = self.traffic.messages[index]
        if message.stream == FORWARD and message.param in self.stays:
            return  # it stays until backward is done with it
        self.held -= message.held_bytes

    def _birth(self, index: int) -> None:
        bucket = self.bucket_of[index]
        self.held += self.traffic.messages[index].held_bytes
        self.missing[bucket] -= 1
        while self.born < len(self.reductions) and not self.missing[self.born]:
            self.born += 1
            if not self.rules.by_cost:
                self._wait_for_reductions()
                self._reduce()

    def _wait_for_reductions(self) -> None:
        """The fixed order: what was launched before is waited for, and its update runs."""
        while self.travelling:
            done, size, update_s = self.travelling.popleft()
            self._stand_still(done)
            self.now += update_s
            self.held -= size

    # ---- launches

    def _fill(self, until: float) -> float:
        """By cost: give lanes that run dry before a time what they may take; seconds that compute is held by it."""
        launched = 0.0
        while self.rules.by_cost:
            fetch = self._may_fetch(until)
            reduce = self._may_reduce(until)
            if reduce and not (fetch and self._is_urgent()):
                launched += self._reduce()
            elif fetch:
                launched += self._gather()
            else:
                break
        return launched

    def _may_fetch(self, until: float) -> bool:
        if self.next_gather >= len(self.gathers):
            return False
        bucket = self.gathers[self.next_gather]
        if self.free.get(self.traffic.lane(bucket[0]), 0.0) >= until:
            return False
        room = self.limit - self.held - self.bytes_of[bucket]
        return room >= 0 and self.traffic.highest(self.at, self.traffic.need_at[bucket[0]][0]) <= room

    def _may_reduce(self, until: float) -> bool:
        if self.next_reduction >= self.born:
            return False
        return self.free.get(self.traffic.lane(self.reductions[self.next_reduction][0]), 0.0) < until

    def _is_urgent(self) -> bool:
        """Whether the next gather would be late if a reduction went first."""
        bucket = self.gathers[self.next_gather]
        reduction = self.reductions[self.next_reduction]
        lane = self.traffic.lane(bucket[0])
        start = max(self.now, self.free.get(lane, 0.0))
        slack = self.now + self.traffic.need_at[bucket[0]][1] - self.clock - start
        return slack < self.seconds[bucket] + self.seconds[reduction]

    def _gather(self) -> float:
        bucket = self.gathers[self.next_gather]
        self.done[self.next_gather] = self._launch(bucket)
        self.held += self.bytes_of[bucket]
        self.next_gather += 1
        return self.launch_s[bucket]

    def _reduce(self) -> float:
        bucket = self.reductions[self.next_reduction]
        done = self._launch(bucket)
        for lane, seconds in self.traffic.later_seconds(bucket):
            done = self.free[lane] = max(done, self.free.get(lane, 0.0)) + self.hindrance * seconds
        tail_s = sum(self.traffic.messages[index].tail_s for index in bucket)
        self.held += self.transport[bucket]
        self.travelling.append((done, self.bytes_of[bucket], tail_s))
        self.next_reduction += 1
        return self.launch_s[bucket]

    def _launch(self, bucket: tuple[int, ...]) -> float:
        lane = self.traffic.lane(bucket[0])
        self.now += self.launch_s[bucket]
        self.free[lane] = max(self.now, self.free.get(lane, 0.0)) + self.seconds[bucket]
        return self.free[lane]

    # ---- compute and memory

    def _compute(self, seconds: float) -> None:
        if not seconds:
            return
        self._fill(self.now + seconds)
        busy = min(seconds, max(0.0, max(self.free.values(), default=0.0) - self.now))
        self.now += seconds + (self.slowdown - 1.0) * busy
        self.clock += seconds

    def _stand_still(self, until: float) -> None:
        """Compute waits for a lane, whose own time passes faster meanwhile."""
        if until > self.now:
            self.ahead += (until - self.now) * (1 - 1 / self.hindrance)
            self.now = until

    def _settle(self) -> None:
        """Reductions that have arrived hold no gradient any more; their updates may run."""
        while self.rules.by_cost and self.travelling and self.travelling[0][0] <= self.now:
            done, size, update_s = self.travelling.popleft()
            self.held -= size
            self.reduced.append((done, update_s))

    def _update_until(self, until: float) -> None:
        """Updates run while compute would wait."""
        while self.now < until:
            self._settle()
            if self.reduced:
                self.now += self.reduced.popleft()[1]
            elif self.travelling and self.travelling[0][0] < until:
                self._stand_still(self.travelling[0][0])
            else:
                return

    def _make_room(self, here: int) -> None:
        """By cost: where the rest would not fit, compute waits for gradients to be reduced."""
        while self.rules.by_cost and here + self.held > self.limit:
            if self.next_reduction < self.born:
                self._reduce()
            elif self.travelling:
                self._stand_still(self.travelling[0][0])
                self._settle()
            else:
                break
        self.peak = max(self.peak, here + self.held)

    def _finish(self) -> None:
        """Behind backward: the last reductions and the updates that are left."""
        while self.next_reduction < self.born:
            self._reduce()
        for _, update_s in self.reduced:
            self.now += update_s
        loose_s = self.traffic.loose_s
        self.now += loose_s if self.rules.by_cost else 0.0  # the fixed order has it with its readers
        for done, _, update_s in self.travelling:
            self._stand_still(done)
            self.now += update_s
        self.now += 0.0 if self.rules.by_cost else loose_s
