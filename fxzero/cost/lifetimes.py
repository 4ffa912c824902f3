"""The storages of a program: what memory each value takes, from which node to which.

The program frees each tensor at its last use, and updates in place (`graph/storage.py`). What it returns stays, and so
do the tensors that rest between steps; gradients that an earlier microbatch hands over die like any other value, and so
do gathers that the step before has launched. What a collective takes stays until its wait (to the end, if that is in
the next program), but for an all-reduce, which works on a copy, and what shared memory carries; so does what is swapped
out. A call that yields several tensors yields several storages, of which those that nothing asks for die with the last
one that is asked for. What a blocked run has in between takes a block (`graph/blocked_runs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from fxzero.cost.workspace import transport_bytes, workspace_bytes
from fxzero.graph import StepGraph, update_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.blocked_runs import block_elements, blocked_runs
from fxzero.graph.step_graph import CARRIED_KINDS, LAUNCHED, STATE_KINDS, first_argument, is_getitem, is_view, num_bytes
from fxzero.graph.storage import InPlace, aliased, done_with
from fxzero.graph.swap_ops import is_off_device, swap_out, tier_of, wait_of

_COPIES_ITS_INPUT = (c10d.all_reduce, c10d.all_reduce_coalesced)


@dataclass(eq=False)
class Storage:
    """Memory with one life.

    Args:
        node: what made it.
        num_bytes: of it.
        start, end: positions in the program of the first and the last node during which it is there.
        tier: "device", or where offloaded values are: "host", "nvme".
        members: the values that live in it.
        is_scratch: only there while its node runs, or its collective is under way.
        uses: the calls of which the last one ends its life, whatever their order; none where it lives to the end.
    """

    node: fx.Node
    num_bytes: int
    start: int
    end: int
    tier: str = "device"
    members: list[fx.Node] = field(default_factory=list)
    is_scratch: bool = False
    uses: list[fx.Node] = field(default_factory=list)


def storages(step: StepGraph, *, device: str) -> list[Storage]:
    """Every storage that a program has while it runs, in the order in which they begin.

    Args:
        step: the graph.
        device: type of the device that it runs on; decides what ops and collectives take beside their values.
    """
    in_place = InPlace(step)
    runs = blocked_runs(step, in_place, device=device)
    ahead = c10d.launched_for_next(step)
    lives = _Lives(step, in_place, in_blocks={node for run in runs for node in run.calls})
    out = []
    for storage in lives.storages:
        out.append(storage)
        if c10d.is_ahead(storage.node):
            out.extend(_sent_before(step, storage.node, in_place.position, device=device))
        if storage.node.op != "call_function" or storage is not lives.first_of[storage.node]:
            continue
        out.extend(_scratch(storage.node, in_place.position, device=device, ahead=storage.node in ahead))
    seen = set(lives.first_of)  # calls that yield no memory of their own take workspace too
    for node in step.calls():
        if node not in seen:
            out.extend(_scratch(node, in_place.position, device=device))
    return sorted(out, key=lambda s: s.start)


def is_resting(node: fx.Node) -> bool:
    """Whether a node is an input that is there before the step and after it."""
    return node.op == "placeholder" and node.meta["entry"].kind not in (*CARRIED_KINDS, LAUNCHED)


def _sent_before(step: StepGraph, launch: fx.Node, position: dict[fx.Node, int], *, device: str) -> Iterator[Storage]:
    """The rows that were sent for a gather which the program before has launched: they are there until its wait.

    On the CPU a copy to compare with, where messages send from what they fill; on a GPU those cast to be sent.
    """
    parameter = c10d.parameter_sent(launch)
    cast = parameter is not None and parameter.meta["val"].dtype != launch.meta["val"].dtype
    if not c10d.carrier_of(launch) and (cast or device == "cpu"):
        size = num_bytes(launch.meta["val"]) // step.mesh[c10d.axis_of(launch)]
        uses = [user for user in launch.users if c10d.is_wait(user)]
        yield Storage(launch, size, 0, max(position[use] for use in uses), is_scratch=True, uses=uses)


def _scratch(node: fx.Node, position: dict[fx.Node, int], *, device: str, ahead: bool = False) -> Iterator[Storage]:
    here = position[node]
    if not c10d.is_collective(node):
        if size := workspace_bytes(node, device=device):
            yield Storage(node, size, here, here, is_scratch=True, uses=[node])
    elif size := transport_bytes(node, device=device, by_messages=c10d.carrier_of(node) is not None):
        if ahead:
            yield Storage(node, size, here, len(position) - 1, is_scratch=True)
            return
        uses = waits_of(node) or [node]
        yield Storage(node, size, here, max(position[w] for w in uses), is_scratch=True, uses=uses)


def waits_of(launch: fx.Node) -> list[fx.Node]:
    """The waits for a collective, also through the parts of a coalesced one."""
    return [w for u in launch.users for w in (u, *u.users) if c10d.is_wait(w)]


def _is_by_messages(node: fx.Node) -> bool:
    return c10d.carrier_of(node) == c10d.SEND_RECV


def _is_by_memory(node: fx.Node) -> bool:
    return c10d.carrier_of(node) in c10d.IN_MEMORY


def _makes_its_value(node: fx.Node) -> bool:
    """Whether a wait puts into new memory what messages have brought, or others have written; not where rows rest."""
    if not c10d.is_wait(node):
        return False
    launch = c10d.launched_by(node)
    if c10d.carrier_of(launch) == c10d.SHARED_MEMORY:
        return True
    return launch.target is c10d.reduce_scatter and _is_by_messages(launch)


class _Lives:
    """Which storage each value lives in, and when that begins and ends."""

    def __init__(self, step: StepGraph, in_place: InPlace, *, in_blocks: set[fx.Node]) -> None:
        self.step = step
        self._in_blocks = in_blocks
        self.in_place = in_place
        self.position = in_place.position
        self.storages: list[Storage] = []
        self.first_of: dict[fx.Node, Storage] = {}
        self._home: dict[fx.Node, Storage] = {}
        self._parts: dict[fx.Node, dict[int, Storage]] = {}  # a call's several values, by index
        inputs = {node.meta["entry"].key for node in step.inputs(*STATE_KINDS) if is_off_device(node)}
        stored = {node for key, node in step.results.items() if key in inputs}
        self._stored_at_home = {launch for launch in step.calls(swap_out) if wait_of(launch) in stored}
        for node in step.graph.nodes:
            if node.op != "output":
                self._place(node)
        self._end()

    def _place(self, node: fx.Node) -> None:
        if update_ops.written(node) and node in self.in_place.forms:
            return  # its parts stand in the memory of what it writes
        source = self.in_place.written_by(node) or aliased(node)
        if source in self.in_place.forms and update_ops.written(source):  # type: ignore[arg-type]
            source = None  # a copy beside what is written over
        if node in self.in_place.forms:
            source = first_argument(node)
        if source is None or _makes_its_value(node):
            self._begin(node)
            return
        assert isinstance(source, fx.Node)
        home = self._home.get(source)
        if is_getitem(node) and source in self._parts:
            home = self._parts[source].get(node.args[1])  # type: ignore[arg-type]
        if home is not None:  # else the value of nothing that has memory
            self._home[node] = home
            home.members.append(node)

    def _begin(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if isinstance(val, (list, tuple)) and not is_view(node):
            parts = {i: self._new(node, num_bytes(v)) for i, v in enumerate(val) if isinstance(v, torch.Tensor)}
            self._parts[node] = parts
        elif isinstance(val, torch.Tensor):
            size = 0 if node in self._stored_at_home else num_bytes(val) * self._parts_received(node)
            if node in self._in_blocks:
                size = min(size, block_elements() * val.element_size())
            self._home[node] = self._new(node, size)
            self._home[node].members.append(node)

    def _new(self, node: fx.Node, size: int) -> Storage:
        storage = Storage(node, size, self.position[node], self.position[node], tier_of(node))
        self.storages.append(storage)
        self.first_of.setdefault(node, storage)
        return storage

    def _parts_received(self, node: fx.Node) -> int:
        """What a launch has memory for, in its value's.

        A reduce-scatter by messages receives the rows of every other rank, and sums them at its wait. What shared
        memory carries lies there, beside all that is counted here.
        """
        if _is_by_memory(node):
            return 0
        if node.target is c10d.reduce_scatter and _is_by_messages(node):
            return self.step.mesh[c10d.axis_of(node)] - 1
        return 1

    def _end(self) -> None:
        last = len(self.position) - 1
        returned = self._returned()
        copied = self._copied_back()
        for storage in self.storages:
            if storage.node.op == "placeholder":
                storage.start = 0
            if is_resting(storage.node) or any(member in returned for member in storage.members):
                storage.end = last
                continue
            storage.uses = [storage.node] if storage.node.op == "call_function" else []
            for member in storage.members:
                storage.uses.append(member)
                storage.uses.extend(self._uses(member))
                storage.uses.extend(copied.get(member, ()))
            if storage.node in self._parts:
                storage.uses.extend(part for part in storage.node.users if is_getitem(part))
            storage.end = max((self.position[use] for use in storage.uses), default=0)

    def _uses(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if user.op == "output":
                continue
            yield done_with(user)
            if c10d.is_collective(user) and user.target not in _COPIES_ITS_INPUT and not _is_by_memory(user):
                yield from waits_of(user)

    def _returned(self) -> set[fx.Node]:
        """What the caller is handed: all but the next values of state, which are written into it.

        With what is launched for the next program comes what is sent for it, unless what is sent is a copy.
        """
        returned = {node for (kind, _), node in self.step.results.items() if kind not in STATE_KINDS}
        launches = [node for node in c10d.launched_for_next(self.step) if not c10d.carrier_of(node)]
        return returned.union(*map(c10d.sent, launches))

    def _copied_back(self) -> dict[fx.Node, list[fx.Node]]:
        """A next value of state that did not come to stand in its memory -> it is copied there after these."""
        inputs = {node.meta["entry"].key: node for node in self.step.inputs(*STATE_KINDS)}
        out = {}
        for key, node in self.step.results.items():
            state = inputs.get(key)
            if state is not None and self.in_place.storage[node] is not state:
                out[node] = [node, *self.in_place.reading(state)]
        return out
