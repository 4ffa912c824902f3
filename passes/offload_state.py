"""Parameters and optimizer state rest off the device: brought in where a phase reads them, stored where they are new.

A parameter comes in for forward, again for backward, and once more for its update; optimizer state for the update
alone. Under ZeRO what moves are this rank's rows, before they are gathered. State that rests in host memory can be
updated there instead: then the gradient goes out, and what the device needs of the result comes in.
Source: ZeRO-Offload (Ren et al., 2021), ZeRO-Infinity (Rajbhandari et al., 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from fxzero.graph import PHASES, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.placement import NOTHING_PLACED, Placement, resting_tier
from fxzero.graph.repeat_views import repeat_views
from fxzero.graph.step_graph import identifier, num_bytes, yields_tensor
from fxzero.graph.swap_ops import DEVICE, is_launch, is_off_device, tier_of
from fxzero.graph.swaps import store, take_in
from fxzero.graph.synchronisation import host_values


@graph_pass(requires=("updates-placed",), provides=("state-offloaded",))
def offload_state(
    step: StepGraph,
    *,
    tiers: Mapping[str, str],
    below: int = 0,
    on_host: float | str = 0.0,
    placed: Placement = NOTHING_PLACED,
) -> int:
    """Let state rest on tiers: swap it in before each phase that reads it, and out when it has its next value.

    Args:
        step: the graph, its updates where they will run.
        tiers: kind of state -> "host", "nvme", or "auto": as placed.
        below: tensors with fewer elements stay on the device.
        on_host: the part (0 to 1, of the bytes) of optimizer state resting on "host" that is updated there, first
            those whose update comes first, while backward still runs; or "auto": as placed.
        placed: what was decided for single tensors.
    """
    offloaded = []
    for node in step.inputs(*tiers):
        entry = node.meta["entry"]
        tier = resting_tier(entry.key, entry.shape, tiers, below, placed) if yields_tensor(node) else DEVICE
        if tier != DEVICE:
            node.meta["tier"] = tier
            offloaded.append(node)
    position: dict[fx.Node, float] = dict(step.positions())
    results = step.results
    edits = len(offloaded)
    host = host_values(step)
    wanted = placed.on_host if isinstance(on_host, str) else on_host
    for param, nodes in _updates_for_host(step, offloaded, wanted).items():
        edits += _HostUpdate(step, param, nodes, host, results).run()
    for node in offloaded:
        if node.meta["entry"].kind == "parameter":
            repeat_views(node, position)
        edits += _swap(step, node, position, results)
    step.set_results(results)
    return edits


def _swap(
    step: StepGraph, source: fx.Node, position: dict[fx.Node, float], results: dict[tuple[str, str], fx.Node]
) -> int:
    """Bring one input in for each phase, and store its next value."""
    entry = source.meta["entry"]
    owner = entry.param or entry.name
    stem = identifier(entry.name)
    editor = Editor(step, phase="forward", module=owner.rpartition(".")[0], param=owner)
    last, last_loaded = -1.0, source
    edits = 0
    for phase in PHASES:
        readers = [n for n in source.users if n.op == "call_function" and n.meta["phase"] == phase]
        readers = [n for n in readers if tier_of(n) == DEVICE and not is_launch(n)]
        if not readers:
            continue
        first = min(readers, key=position.__getitem__)
        editor.meta = {**editor.meta, "phase": phase}
        with editor.before(first):
            loaded = take_in(editor, source, stem=stem)
        for reader in readers:
            reader.replace_input_with(source, loaded)
        if position[first] > last:
            last, last_loaded = position[first], loaded
        edits += 1
    new = results.get(entry.key)
    if new is None or new is source or is_off_device(new):
        return edits
    editor.meta = {**editor.meta, "phase": "update"}
    made = new
    while made not in position:  # a move that this pass has made, beside what it moves
        made = made.prev
    # its next value may be known before its last reader has the old one
    with editor.after(new if position[made] >= last else last_loaded):
        results[entry.key] = store(editor, new, tier_of(source), stem=stem)
    return edits + 1


def _updates_for_host(
    step: StepGraph, offloaded: Iterable[fx.Node], wanted: float | frozenset[str]
) -> dict[str, list[fx.Node]]:
    """Parameter -> its optimizer state on the host, for those that are updated there: a part of it, or as named."""
    state: dict[str, list[fx.Node]] = {}
    for node in offloaded:
        entry = node.meta["entry"]
        if entry.kind == "optimizer" and tier_of(node) == "host" and entry.param is not None:
            state.setdefault(entry.param, []).append(node)
    if isinstance(wanted, frozenset):
        return {param: nodes for param, nodes in state.items() if param in wanted}
    position = step.positions()
    first = {
        param: min((position[user] for node in nodes for user in node.users), default=0)
        for param, nodes in state.items()
    }
    total = sum(num_bytes(node.meta["val"]) for nodes in state.values() for node in nodes)
    chosen: dict[str, list[fx.Node]] = {}
    taken = 0
    for param in sorted(state, key=first.__getitem__):
        size = sum(num_bytes(node.meta["val"]) for node in state[param])
        if taken + size > wanted * total:
            continue
        chosen[param] = state[param]
        taken += size
    return chosen


def update_of(step: StepGraph, param: str, state: Iterable[fx.Node], host: set[fx.Node]) -> list[fx.Node]:
    """The calls that would run on the host with the optimizer state of one parameter, in program order.

    Args:
        step: the graph.
        param: the parameter.
        state: its optimizer state: inputs.
        host: the values of the graph that are the host's already (`host_values`).
    """
    own = [n for n in step.phase("update") if n.meta.get("param") == param and yields_tensor(n)]
    follows, moved = set(state), set()
    for node in own:
        if any(n in follows for n in node.all_input_nodes) and not c10d.is_collective(node):
            follows.add(node)
            moved.add(node)
    for node in reversed(own):  # what serves these alone
        if node.users and not c10d.is_wait(node) and all(user in moved for user in node.users):
            moved.add(node)
    return [node for node in own if node in moved and node not in host]


class _HostUpdate:
    """Moves the update of one parameter to the host: what follows from its state, up to a collective."""

    def __init__(
        self,
        step: StepGraph,
        param: str,
        state: list[fx.Node],
        host: set[fx.Node],
        results: dict[tuple[str, str], fx.Node],
    ) -> None:
        self.step = step
        self.results = results
        self.host = host
        self.stem = identifier(param)
        self.editor = Editor(step, phase="update", module=param.rpartition(".")[0], param=param)
        self.moved = update_of(step, param, state, host)

    def run(self) -> int:
        """Rewrite; returns the number of edits."""
        edits = 0
        inside = set(self.moved)
        stored: dict[fx.Node, fx.Node] = {}
        for node in self.moved:
            for source in node.all_input_nodes:
                if source in inside or source in self.host or tier_of(source) == "host" or not yields_tensor(source):
                    continue
                if source not in stored:
                    stored[source] = self._send(source, node)
                    edits += 1
                node.replace_input_with(source, stored[source])
            node.meta["tier"] = "host"
            edits += 1
        for node in self.moved:
            edits += self._bring_back(node, inside)
        return edits

    def _send(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        """Start to send a value to the host where it is made (an input: where it is read); wait before its reader."""
        place = reader if source.op == "placeholder" else source.next
        with self.editor.before(place):
            if is_off_device(source):
                source = take_in(self.editor, source, stem=f"{self.stem}_{source.name}")
            wait = store(self.editor, source, "host", stem=f"{self.stem}_{source.name}")
        if place is not reader:
            reader.prepend(wait)
        return wait

    def _bring_back(self, node: fx.Node, inside: set[fx.Node]) -> int:
        readers = [u for u in node.users if u not in inside and u.op == "call_function" and not is_off_device(u)]
        keys = [key for key, value in self.results.items() if value is node and self._rests_elsewhere(key)]
        if not readers and not keys:
            return 0
        with self.editor.after(node):
            loaded = take_in(self.editor, node, stem=f"{self.stem}_{node.name}")
        for reader in readers:
            reader.replace_input_with(node, loaded)
        self.results.update(dict.fromkeys(keys, loaded))
        return 1

    def _rests_elsewhere(self, key: tuple[str, str]) -> bool:
        source = self.step.input(*key)
        return source is None or tier_of(source) != "host"
