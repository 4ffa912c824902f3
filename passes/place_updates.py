"""An update runs as soon as its gradient is reduced; the gradient dies there.

[Note: order of reductions and updates]
Reductions are launched where gradients are born. What waits for the i-th launch (the wait itself, the rest of the
reduction, the update) stands before launch i + distance, so that backward computes while a gradient travels. With
distance 1 at most two gradients are alive unreduced.
"""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import reorder
from fxzero.graph.order_rules import reads_before_writes
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import iter_views, num_bytes


@graph_pass(requires=("captured",), provides=("updates-placed",))
def place_updates(step: StepGraph, *, distance: int = 1, bucket_bytes: int = 0) -> int:
    """Move each wait and update from the end of the step to where its gradient is reduced.

    Args:
        step: the graph.
        distance: launches between a reduction's launch and its wait.
        bucket_bytes: launches count as one until they take this many bytes of unreduced gradients, so that small ones
            do not wait one by one; 0 counts each.
    """
    nodes = step.calls()
    births = _births(nodes, bucket_bytes)
    if not births:
        return 0
    group_of: dict[fx.Node, int] = {}
    for group, launches in enumerate(births):
        group_of.update(dict.fromkeys(launches, group))
    tail = _tails(nodes, group_of, _read_before(step, births, distance))
    order: list[fx.Node] = []
    pending: dict[int, list[fx.Node]] = {}
    for node in nodes:
        if node in tail:
            pending.setdefault(tail[node], []).append(node)
    for node in nodes:
        if node in tail:
            continue
        if node in group_of and node is births[group_of[node]][0]:
            for group in sorted(g for g in pending if g <= group_of[node] - distance):
                order += pending.pop(group)
        order.append(node)
    for group in sorted(pending):
        order += pending[group]
    return reorder(step, order)


def _births(nodes: list[fx.Node], bucket_bytes: int) -> list[list[fx.Node]]:
    """Gradient reductions (or gradients, where nothing is reduced) in program order, grouped by bytes."""
    births = _first_reductions(nodes) or [n for n in nodes if "grad_of" in n.meta]
    groups: list[list[fx.Node]] = []
    total = 0
    for node in births:
        unreduced = [n.meta["val"] for n in c10d.sent(node)] if c10d.is_collective(node) else node.meta["val"]
        size = num_bytes(unreduced)
        if groups and total + size <= bucket_bytes:
            groups[-1].append(node)
            total += size
        else:
            groups.append([node])
            total = size
    return groups


def _first_reductions(nodes: list[fx.Node]) -> list[fx.Node]:
    """The reductions of gradients that follow from no other one (hybrid sharding and PowerSGD reduce twice)."""
    downstream: set[fx.Node] = set()
    first = []
    for node in nodes:
        launched = c10d.is_collective(node) and node.meta["phase"] == "backward"
        is_reduction = launched and not c10d.gathers_parameters(node) and not c10d.moves_parts(node)
        follows = any(n in downstream for n in node.all_input_nodes)
        if is_reduction and not follows:
            first.append(node)
        if is_reduction or follows:
            downstream.add(node)
    return first


def _read_before(step: StepGraph, births: list[list[fx.Node]], distance: int) -> dict[fx.Node, int]:
    """What makes the next value of state -> the first group that comes to stand behind the old value's readers.

    A product of the old value may stand behind the gradient's: the pieces of one that waits for a reduce-scatter do.
    """
    firsts = {launches[0] for launches in births}
    begun, behind = 0, dict[fx.Node, int]()
    for node in step.calls():
        begun += node in firsts
        behind[node] = begun - distance  # what stands before the next group's first launch
    found: dict[fx.Node, int] = {}
    for reader, made in reads_before_writes(step):
        if reader in behind and reader.meta["phase"] != "update":
            found[made] = max(found.get(made, 0), behind[reader])
    return found


def _tails(nodes: list[fx.Node], group_of: dict[fx.Node, int], least: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Node -> the last group of reductions that it depends on, for all that is moved; `least` for some.

    Moved are waits of reductions, what follows from them, and update nodes that follow from no gradient (these go
    with their first reader).
    """
    reducing = bool(group_of) and any(c10d.is_collective(n) for n in group_of)
    depth: dict[fx.Node, int] = {}
    tail: dict[fx.Node, int] = {}
    for node in nodes:
        before = [depth[n] for n in node.all_input_nodes if n in depth]
        if node in group_of:
            depth[node] = max([group_of[node], *before])
            continue
        if before:
            depth[node] = max(before) + _travels(node)
            if reducing or node.meta["phase"] == "update":
                depth[node] = max(depth[node], least.get(node, 0))
                tail[node] = depth[node]
    for node in reversed(nodes):
        if node.meta["phase"] == "update" and node not in tail and not is_random(node):
            readers = [tail[u] for u in node.users if u in tail]
            if readers:
                tail[node] = min(readers)
    for node in nodes:  # what follows from no gradient, yet reads what has moved
        moved = [tail[n] for n in node.all_input_nodes if n in tail]
        if node.meta["phase"] == "update" and node not in tail and moved:
            tail[node] = max(moved)
    for node in nodes:
        if c10d.is_release(node) and node.meta["phase"] == "update":
            released = [alias for source in node.all_input_nodes for alias in (source, *iter_views(source))]
            others = [reader for alias in released for reader in alias.users if reader is not node]
            tail[node] = max(tail.get(other, 0) for other in (*released, *others))
    return tail


def _travels(node: fx.Node) -> bool:
    """Whether a node waits for a gather of the update, which travels under the next group."""
    return c10d.is_wait(node) and c10d.launched_by(node).meta["phase"] == "update"
