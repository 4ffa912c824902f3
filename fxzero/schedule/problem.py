"""What a scheduler must know of a step, as plain arrays: calls with their lanes and seconds, what comes first, memory.

Calls are numbered in the order of the program that the problem was made of, which is legal. An order is a list of all
these numbers. Position n, behind the last of n calls, is the end of the step.

[Note: a step that follows itself]
With `cross_step` a program waits for gathers that the step before has launched, and launches those of the next one. Its
order is then looked at as one of a chain of equal steps: what it leaves under way at its end is what it finds at its
beginning, and it ends when compute is through, whatever lanes still have to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import fx

from fxzero.cost.allocator import allocator_of
from fxzero.cost.lifetimes import storages
from fxzero.cost.tasks import Task
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import COMPUTE, HOST, is_launch, is_wait, launch_of
from fxzero.graph.step_graph import device_of
from fxzero.graph.storage import InPlace
from fxzero.schedule.legal import kept_order

RUN, LAUNCH, WAIT, ON_HOST, CARRIED = range(5)  # kinds of calls


@dataclass(frozen=True)
class Memory:
    """What takes memory of the device, one entry a storage; sizes as the allocator counts them.

    Args:
        resting_bytes: there all the time.
        size: bytes of each storage.
        begin: the call with which it begins; -1: it is there at the start.
        uses: the calls of which the last one ends its life; empty: it stays to the end.
    """

    resting_bytes: int
    size: list[int]
    begin: list[int]
    uses: list[list[int]]

    @cached_property
    def begun_by(self) -> dict[int, list[int]]:
        """Call -> the storages that begin with it."""
        found: dict[int, list[int]] = {}
        for storage, call in enumerate(self.begin):
            found.setdefault(call, []).append(storage)
        return found

    @cached_property
    def used_by(self) -> dict[int, list[int]]:
        """Call -> the storages whose life it may end."""
        found: dict[int, list[int]] = {}
        for storage, calls in enumerate(self.uses):
            for call in calls:
                found.setdefault(call, []).append(storage)
        return found

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(size, begin) of all storages, (calls, starts) of the uses of those that have any, and which these are."""
        having = [s for s, calls in enumerate(self.uses) if calls]
        calls = np.array([call for s in having for call in self.uses[s]], dtype=np.int64)
        starts = np.cumsum([0, *(len(self.uses[s]) for s in having)])[:-1].astype(np.int64)
        return np.array(self.size, np.int64), np.array(self.begin, np.int64), calls, starts, np.array(having, np.int64)


@dataclass(frozen=True)
class Problem:
    """The calls of one step to be put in order.

    Args:
        nodes: call -> node of the graph.
        lanes: names; the first is "compute".
        slowdown: lane -> the factor by which compute takes longer while it is busy, 1 or more.
        hindrance: lane -> the factor by which its calls take longer while compute runs, 1 or more.
        lane: call -> index of its lane; -1 for calls that take no time.
        kind: call -> RUN, LAUNCH (starts what its lane does), WAIT (until its launch is done), ON_HOST, or CARRIED
            (a wait for a launch of the step before; [Note: a step that follows itself]).
        seconds, launch_s: call -> those of its Task.
        launch_of: wait -> its launch, of a CARRIED one the launch for the next step; -1 for other calls.
        reads: call -> the calls whose values it reads.
        before: call -> all calls that must come first, `reads` included.
        memory: of the device.
    """

    nodes: list[fx.Node]
    lanes: list[str]
    slowdown: list[float]
    hindrance: list[float]
    lane: list[int]
    kind: list[int]
    seconds: list[float]
    launch_s: list[float]
    launch_of: list[int]
    reads: list[list[int]]
    before: list[list[int]]
    memory: Memory
    after: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        after: list[list[int]] = [[] for _ in self.nodes]
        for call, earlier in enumerate(self.before):
            for other in earlier:
                after[other].append(call)
        object.__setattr__(self, "after", after)

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def leads(self) -> dict[int, float]:
        """Launch for the next step -> seconds of compute there before the first reader, in the order of the program.

        Empty where a step carries nothing to the next one.
        """
        found: dict[int, float] = {}
        clock, passed = 0.0, []
        for call in range(len(self)):
            passed.append(clock)
            clock += compute_seconds(self, call)
        for wait, kind in enumerate(self.kind):
            if kind == CARRIED:
                lead = passed[min(self.after[wait], default=wait)]
                found[self.launch_of[wait]] = min(lead, found.get(self.launch_of[wait], lead))
        return found

    @cached_property
    def leading(self) -> set[int]:
        """The launches for the next step and all calls that must come before one of them."""
        found = set(self.leads)
        for call in reversed(range(len(self))):
            if not found.isdisjoint(self.after[call]):
                found.add(call)
        return found

    @cached_property
    def fetched(self) -> tuple[set[int], dict[int, frozenset[int]]]:
        """The launches that bring what backward or forward reads, and call -> those of them that it reads.

        Not those for the next step: what lanes have to do for this one comes first.
        """
        fetches: set[int] = set()
        handed: dict[int, frozenset[int]] = {}
        for call, node in enumerate(self.nodes):
            fetches_here = c10d.gathers_parameters(node) and call not in self.leads
            if self.kind[call] == LAUNCH and (fetches_here or node.target is swap_ops.swap_in):
                fetches.add(call)
                handed[call] = frozenset((call,))
            elif found := frozenset[int]().union(*(handed.get(n, ()) for n in self.reads[call] if _hands_on(self, n))):
                handed[call] = found
        return fetches, handed

    @cached_property
    def products(self) -> dict[int, int]:
        """Call of backward -> the launch that sends what it makes, if it leads to nothing else."""
        found: dict[int, int] = {}
        for call in reversed(range(len(self))):
            if self.nodes[call].meta["phase"] != "backward":
                continue
            if self.kind[call] == LAUNCH and call not in self.fetched[0]:
                found[call] = call
            elif self.kind[call] == RUN and self.after[call]:
                launches = {found.get(other, -1) for other in self.after[call]}
                if len(launches) == 1 and -1 not in launches:
                    found[call] = launches.pop()
        return {call: launch for call, launch in found.items() if call != launch}

    @classmethod
    def of(
        cls,
        step: StepGraph,
        tasks: Mapping[fx.Node, Task],
        *,
        slowdown: Callable[[str], float] = lambda lane: 1.0,
        hindrance: Callable[[str], float] = lambda lane: 1.0,
    ) -> Problem:
        """The problem of a step that stands in a legal order.

        Args:
            step: the graph.
            tasks: what each call occupies (`step_tasks`).
            slowdown: lane -> the factor by which compute takes longer while it is busy (`Hardware.slowdown`).
            hindrance: lane -> the factor by which its calls take longer while compute runs (`Hardware.hindrance`).

        Raises:
            RewriteError: if a call has no task.
        """
        nodes = step.calls()
        number = {node: index for index, node in enumerate(nodes)}
        lanes = [COMPUTE]
        lane, kind, seconds, launch_s, launches = [], [], [], [], []
        for_next = {name: number[n] for n, names in c10d.launched_for_next(step).items() for name in names}
        for node in nodes:
            task = _task(node, tasks)
            if task.resource and task.resource not in lanes:
                lanes.append(task.resource)
            lane.append(lanes.index(task.resource) if task.resource else -1)
            kind.append(_kind(node, task, for_next))
            seconds.append(task.seconds)
            launch_s.append(task.launch_s)
            launches.append(_launch_of(node, kind[-1], number, for_next))
        reads = [sorted({number[n] for n in node.all_input_nodes if n in number}) for node in nodes]
        first: list[set[int]] = [set(calls) for calls in reads]
        for earlier, later in kept_order(step, InPlace(step)):
            if earlier in number and later in number:
                first[number[later]].add(number[earlier])
        before = [sorted(calls) for calls in first]
        slower, hindered = ([1.0, *(factor(name) for name in lanes[1:])] for factor in (slowdown, hindrance))
        memory = _memory(step, number)
        return cls(nodes, lanes, slower, hindered, lane, kind, seconds, launch_s, launches, reads, before, memory)

    def is_legal(self, order: Sequence[int]) -> bool:
        """Whether an order has all calls once, each after what must come first."""
        position = {call: index for index, call in enumerate(order)}
        if len(position) != len(self) or len(order) != len(self):
            return False
        return all(position[a] < position[b] for b, earlier in enumerate(self.before) for a in earlier)


def compute_seconds(problem: Problem, call: int) -> float:
    """Seconds for which a call holds the compute lane, if nothing else runs."""
    if problem.kind[call] == LAUNCH:
        return problem.launch_s[call]
    return problem.seconds[call] if problem.lane[call] == 0 else 0.0


def _hands_on(problem: Problem, call: int) -> bool:
    """Whether readers of a call read what was fetched: it is the launch, its wait, or takes no time."""
    return problem.kind[call] in (LAUNCH, WAIT) or problem.lane[call] < 0


def closure(ways: list[list[int]], call: int) -> set[int]:
    """All calls that a call leads to, itself left out.

    Args:
        ways: `before` or `after` of a problem.
        call: where it begins.
    """
    found: set[int] = set()
    stack = [call]
    while stack:
        for other in ways[stack.pop()]:
            if other not in found:
                found.add(other)
                stack.append(other)
    return found


def _task(node: fx.Node, tasks: Mapping[fx.Node, Task]) -> Task:
    if node not in tasks:
        fix = "make tasks with fxzero.cost.tasks.step_tasks of this graph"
        raise RewriteError.of(f"%{node.name}", expected="a task for each call", got="none", fix=fix)
    return tasks[node]


def _kind(node: fx.Node, task: Task, for_next: Mapping[str, int]) -> int:
    if is_wait(node):
        launch = launch_of(node)
        if not c10d.is_ahead(launch):
            return WAIT
        # launched by the step before; where another program launches it for this one, it is taken to be there
        return CARRIED if launch.meta["entry"].name in for_next else RUN
    if is_launch(node) and task.resource not in ("", COMPUTE):
        return LAUNCH
    return ON_HOST if task.resource == HOST else RUN


def _launch_of(node: fx.Node, kind: int, number: Mapping[fx.Node, int], for_next: Mapping[str, int]) -> int:
    if kind == WAIT:
        return number[launch_of(node)]
    return for_next[launch_of(node).meta["entry"].name] if kind == CARRIED else -1


def _memory(step: StepGraph, number: dict[fx.Node, int]) -> Memory:
    allocator = allocator_of(device_of(step))
    resting, size, begin, uses = 0, [], [], []
    for storage in storages(step, device=allocator.device):
        num_bytes = allocator.allocated(storage.num_bytes)
        if storage.tier != "device" or not num_bytes:
            continue
        if storage.node.op == "placeholder" and not storage.uses:
            resting += num_bytes
            continue
        size.append(num_bytes)
        begin.append(number.get(storage.node, -1))
        uses.append(sorted({number[node] for node in storage.uses if node in number}))
    return Memory(resting, size, begin, uses)
