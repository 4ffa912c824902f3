"""What a step sends, beside what it computes: the stream of its gathers and reductions, before they share launches.

A step is read as one row of marks in the order of the program: a gathered tensor is needed, is done with, a gradient is
born. Between marks it computes. Which gathers and reductions share a launch is left open; `flow` says how long a step
takes for one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from fxzero.cost.allocator import Allocator, allocator_of
from fxzero.cost.communication import algorithm_of, launch_seconds, layout_of, message_bytes, message_seconds
from fxzero.cost.compute import fresh_seconds
from fxzero.cost.hardware import Hardware
from fxzero.cost.lifetimes import storages
from fxzero.cost.tasks import Task, step_tasks
from fxzero.cost.workspace import transport_bytes
from fxzero.graph import StepGraph, compression_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import device_of, first_argument, is_getitem, num_bytes

NEED, END, BIRTH = range(3)  # kinds of marks
FORWARD, BACKWARD, REDUCTIONS = "forward", "backward", "reductions"
STREAMS = (FORWARD, BACKWARD, REDUCTIONS)

Mark = tuple[int, int, float, int]  # kind, index of the message, seconds of compute until the next mark, bytes held


@dataclass(frozen=True)
class Message:
    """One gather or reduction by itself.

    Args:
        node: its launch.
        stream: FORWARD or BACKWARD (gathers, by phase) or REDUCTIONS.
        alike: equal for messages that may share a launch.
        sent_bytes: of the whole tensor, as it travels.
        held_bytes: of the gathered tensor, or of the gradient until it is reduced, as the allocator counts them.
        transport_bytes: that the collective takes beside these while it is under way.
        prepare_s: seconds of what makes the message, on the compute lane.
        tail_s: of a reduction: seconds of what follows from it and from none behind it: its update.
        later: collectives that reduce it further, on other axes.
        param: of a gather: the parameter, where its values travel as they are computed with.
    """

    node: fx.Node
    stream: str
    alike: tuple[object, ...]
    sent_bytes: int
    held_bytes: int
    transport_bytes: int
    prepare_s: float = 0.0
    tail_s: float = 0.0
    later: tuple[fx.Node, ...] = ()
    param: str = ""


@dataclass(frozen=True)
class Traffic:
    """A step as its messages and the marks between which it computes.

    Args:
        messages: gathers and reductions, in the order in which they are needed or born.
        marks: in the order of the program. The first (of kind -1) is its beginning.
        mesh: of the graph.
        hardware: whose costs count.
        loose_s: seconds of the update that follow from no reduction.
    """

    messages: list[Message]
    marks: list[Mark]
    mesh: Mapping[str, int]
    hardware: Hardware
    loose_s: float = 0.0
    _seconds: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False)

    @cached_property
    def need_at(self) -> dict[int, tuple[int, float]]:
        """Gather -> the mark at which it is needed, and the seconds of compute before it."""
        found: dict[int, tuple[int, float]] = {}
        clock = 0.0
        for at, (kind, index, seconds, _) in enumerate(self.marks):
            if kind == NEED:
                found.setdefault(index, (at, clock))
            clock += seconds
        return found

    def highest(self, first: int, last: int) -> int:
        """The most that marks from `first` to `last` hold."""
        level = (last - first + 1).bit_length() - 1
        row = self._highest[level]
        return max(row[first], row[last + 1 - (1 << level)])

    @cached_property
    def _highest(self) -> list[list[int]]:
        """Level -> mark -> the most of 2**level marks from there on."""
        rows = [[here for _, _, _, here in self.marks]]
        while 2 << (len(rows) - 1) <= len(self.marks):
            half = 1 << (len(rows) - 1)
            row = rows[-1]
            rows.append([max(row[at], row[at + half]) for at in range(len(row) - half)])
        return rows

    def stream(self, name: str) -> list[int]:
        """The messages of a stream, in order."""
        return [index for index, message in enumerate(self.messages) if message.stream == name]

    def seconds(self, bucket: Iterable[int], *, form: str) -> float:
        """Seconds on its lane of messages that share a launch.

        Args:
            bucket: of them.
            form: "coalesced" (their latency counts once) or "separate" (each is a launch of its own).
        """
        if form == "separate":
            return sum(self._joint_s([index]) for index in bucket)
        return self._joint_s(list(bucket))

    def later_seconds(self, bucket: Iterable[int]) -> list[tuple[str, float]]:
        """(lane, seconds) of what reduces a bucket further, one after the other."""
        by_axis: dict[tuple[str, str], int] = {}
        for index in bucket:
            for node in self.messages[index].later:
                key = (c10d.axis_of(node), algorithm_of(node))
                by_axis[key] = by_axis.get(key, 0) + message_bytes(node)
        return [(f"net:{axis}", self._message_s(axis, how, size)) for (axis, how), size in by_axis.items()]

    def launch_s(self, bucket: Iterable[int], *, form: str) -> float:
        """Seconds of the compute lane until a bucket is launched."""
        nodes = [self.messages[index].node for index in bucket]
        launches = nodes if form == "separate" else nodes[:1]
        return sum(launch_seconds(node, self.hardware) for node in launches)

    def lane(self, index: int) -> str:
        """The lane of a message."""
        return f"net:{c10d.axis_of(self.messages[index].node)}"

    def _joint_s(self, bucket: list[int]) -> float:
        first = self.messages[bucket[0]].node
        size = sum(self.messages[index].sent_bytes for index in bucket)
        fresh = 0.0
        if self.hardware.fresh_bytes_s:
            fresh = sum(fresh_seconds(self.messages[index].node, self.hardware) for index in bucket)
        return fresh + self._message_s(c10d.axis_of(first), algorithm_of(first), size)

    def _message_s(self, axis: str, algorithm: str, size: int) -> float:
        key = (axis, algorithm, size)
        if key not in self._seconds:
            layout = layout_of(axis, self.mesh, self.hardware.ranks_per_node)
            self._seconds[key] = message_seconds(algorithm, size, layout, self.hardware)
        return self._seconds[key]


def traffic_of(step: StepGraph, hardware: Hardware) -> Traffic:
    """The traffic of a step whose gathers and reductions each have a launch of their own.

    Args:
        step: the graph, gathers standing at their need, updates at the end.
        hardware: whose costs count.
    """
    reading = _Reading(step, step_tasks(step, hardware))
    reading.read()
    held = _held_bytes(step, reading)
    marks: list[Mark] = []
    ends = [*(at for _, _, at in reading.marks), len(reading.clock)]
    starts = [(-1, -1, 0), *reading.marks]
    for (kind, index, at), until in zip(starts, ends, strict=True):
        marks.append((kind, index, sum(reading.clock[at:until]), max(held[at:until], default=held[at])))
    return Traffic(reading.messages, marks, dict(step.mesh), hardware, reading.tails.get(-1, 0.0))


def alike(node: fx.Node) -> tuple[object, ...]:
    """What collectives that share a launch have in common: kind, axis, phase and dtype."""
    first = c10d.sent(node)[0]
    return (node.target, node.args[1:], node.meta["phase"], first.meta["val"].dtype)


class _Reading:
    """The marks of a step and its clock: seconds of each compute call of forward and backward, in program order."""

    def __init__(self, step: StepGraph, tasks: Mapping[fx.Node, Task]) -> None:
        self.tasks = tasks
        self.nodes = step.calls()
        self.allocator: Allocator = allocator_of(device_of(step))
        self.clock: list[float] = []
        self.place: dict[fx.Node, int] = {}  # call -> index in the clock
        self.marks: list[tuple[int, int, int]] = []  # kind, message, index in the clock
        self.messages: list[Message] = []
        self.index: dict[fx.Node, int] = {}  # launch -> message
        self.follows: dict[fx.Node, int] = {}  # what follows from reductions -> the last of these
        self.prepares: dict[fx.Node, float] = {}
        self.tails: dict[int, float] = {}
        self.later: dict[int, list[fx.Node]] = {}

    def read(self) -> None:
        """Go through the program once."""
        for node in self.nodes:
            if c10d.gathers_parameters(node):
                self._prepare(node)
        for node in self.nodes:
            self._read(node)
        for index, message in enumerate(self.messages):
            if message.stream == REDUCTIONS:
                later, tail_s = tuple(self.later.get(index, ())), self.tails.get(index, 0.0)
                self.messages[index] = Message(**{**vars(message), "later": later, "tail_s": tail_s})

    def _prepare(self, launch: fx.Node) -> None:
        """What makes a gather's message of its parameter for it alone, as `move_launch` takes it along."""
        for source in launch.all_input_nodes:
            while source.target in c10d.PREPARES and len(source.users) == 1:
                self.prepares[source] = self.tasks[source].seconds
                source = source.all_input_nodes[0]

    def _read(self, node: fx.Node) -> None:
        if node in self.prepares:
            return
        if c10d.gathers_parameters(node):
            self._message(node, BACKWARD if node.meta["phase"] == "backward" else FORWARD)
            return
        after = [self.follows[n] for n in node.all_input_nodes if n in self.follows]
        reduces = c10d.is_collective(node) and node.meta["phase"] == "backward" and not c10d.moves_parts(node)
        if reduces and not after:
            self._mark(BIRTH, self._message(node, REDUCTIONS))
            return
        if after or node.meta["phase"] == "update":
            self._follow(node, max(after, default=-1))
            return
        if c10d.is_wait(node):
            launch = c10d.launched_by(node)
            if launch in self.index:
                found = self.index[launch]
                if self.messages[found].stream == REDUCTIONS:
                    self._follow(node, found)
                else:
                    self._mark(NEED, found)
                return
        if c10d.is_release(node):
            for source in node.all_input_nodes:
                wait = first_argument(source) if not c10d.is_wait(source) else source
                if c10d.is_wait(wait) and c10d.launched_by(wait) in self.index:
                    self._mark(END, self.index[c10d.launched_by(wait)])
            return
        self.place[node] = len(self.clock)
        self.clock.append(self.tasks[node].seconds)

    def _mark(self, kind: int, index: int) -> None:
        self.marks.append((kind, index, len(self.clock)))

    def _follow(self, node: fx.Node, index: int) -> None:
        """A call that may run at the end: it follows from a reduction, or from none (-1)."""
        if index >= 0 and node.op == "call_function":
            self.follows[node] = index
        if c10d.is_collective(node):
            if node.meta["phase"] == "backward":
                self.later.setdefault(index, []).append(node)
            return
        self.tails[index] = self.tails.get(index, 0.0) + self.tasks[node].seconds

    def _message(self, node: fx.Node, stream: str) -> int:
        sources = c10d.sent(node)
        held = node.meta["val"] if stream != REDUCTIONS else [source.meta["val"] for source in sources]
        self.index[node] = len(self.messages)
        self.messages.append(
            Message(
                node,
                stream,
                alike(node),
                message_bytes(node),
                self.allocator.allocated(num_bytes(held)),
                transport_bytes(node, device=self.allocator.device, by_messages=c10d.carrier_of(node) is not None),
                sum(self.prepares.get(source, 0.0) for source in sources),
                param="" if any(source.target in compression_ops.OPS for source in sources) else node.meta["param"],
            )
        )
        return self.index[node]


def _held_bytes(step: StepGraph, reading: _Reading) -> list[int]:
    """Bytes on the device at each place of the clock, and behind it: without what messages hold, and updates make."""
    allocated = reading.allocator.allocated
    end = len(reading.clock)
    line = [0] * (end + 2)
    sent = {
        source for message in reading.messages if message.stream == REDUCTIONS for source in c10d.sent(message.node)
    }
    births = {
        message.node: at for kind, index, at in reading.marks if kind == BIRTH for message in [reading.messages[index]]
    }
    for storage in storages(step, device=reading.allocator.device):
        if storage.tier != "device" or is_getitem(storage.node):
            continue
        resting = storage.node.op == "placeholder"
        if not resting and storage.node not in reading.place:
            continue  # gathered, reduced, or of the update
        first = 0 if resting else reading.place[storage.node]
        last = end
        if storage.uses:
            last = max(_last_place(use, reading, births, first, end, storage.members, sent) for use in storage.uses)
        size = allocated(storage.num_bytes)
        line[first] += size
        line[last + 1 if last < end else end + 1] -= size
    for at in range(1, end + 1):
        line[at] += line[at - 1]
    return line[: end + 1]


def _last_place(
    use: fx.Node,
    reading: _Reading,
    births: Mapping[fx.Node, int],
    first: int,
    end: int,
    members: list[fx.Node],
    sent: set[fx.Node],
) -> int:
    """Where in the clock a use of a storage is over: a gradient is counted by its message from its birth on."""
    if use in reading.place:
        return reading.place[use]
    if any(member in sent for member in members):
        return max((births[u] - 1 for member in members for u in member.users if u in births), default=first)
    return first if use in reading.prepares else end
