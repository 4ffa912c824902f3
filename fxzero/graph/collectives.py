"""The table of collectives that a step graph may hold, and how to recognise their parts.

All but one (`shift_op.py`) are torch's functional collectives: they yield a tensor that must go through `wait_tensor`
before anything else reads it. The group argument names a mesh axis.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import compression_ops, ops, shift_op, swap_ops
from fxzero.graph.axis_placement import SPLIT_AXES
from fxzero.graph.step_graph import LAUNCHED, StepGraph, is_getitem, num_bytes

# the namespace of torch's functional collectives; the names in it are what torch documents
_C10D = torch.ops._c10d_functional

all_gather = _C10D.all_gather_into_tensor.default
all_gather_into = _C10D.all_gather_into_tensor_out.default  # in no graph: programs over gloo launch it
all_gather_coalesced = _C10D.all_gather_into_tensor_coalesced.default
reduce_scatter = _C10D.reduce_scatter_tensor.default
reduce_scatter_coalesced = _C10D.reduce_scatter_tensor_coalesced.default
all_reduce = _C10D.all_reduce.default
all_reduce_coalesced = _C10D.all_reduce_coalesced.default
all_to_all = _C10D.all_to_all_single.default
shift = shift_op.shift
wait = _C10D.wait_tensor.default


@dataclass(frozen=True)
class Collective:
    """One row of the table.

    Args:
        name: what the text form prints.
        axis_arg: position of the group argument.
        coalesced: takes and yields a list of tensors.
        wire: bytes that one rank sends, as a factor (of n - 1 over n for n ranks) of the larger of input and output.
        to_one: it sends what it takes to one peer; `wire` is then a factor of that.
    """

    name: str
    axis_arg: int
    coalesced: bool
    wire: float
    to_one: bool = False


TABLE: dict[Any, Collective] = {
    all_gather: Collective("all_gather", 2, False, 1.0),
    all_gather_coalesced: Collective("all_gather_coalesced", 2, True, 1.0),
    reduce_scatter: Collective("reduce_scatter", 3, False, 1.0),
    reduce_scatter_coalesced: Collective("reduce_scatter_coalesced", 3, True, 1.0),
    all_reduce: Collective("all_reduce", 2, False, 2.0),
    all_reduce_coalesced: Collective("all_reduce_coalesced", 2, True, 2.0),
    all_to_all: Collective("all_to_all", 3, False, 1.0),
    shift: Collective("shift", 4, False, 1.0, to_one=True),
}
COALESCED = {
    all_gather: all_gather_coalesced,
    reduce_scatter: reduce_scatter_coalesced,
    all_reduce: all_reduce_coalesced,
}
# what may carry a gather or a reduce-scatter (`meta["algorithm"]`) in place of the backend's own algorithms
SEND_RECV, SHARED_MEMORY, SHARED_ROWS = "send_recv", "shared_memory", "shared_rows"
IN_MEMORY = (SHARED_MEMORY, SHARED_ROWS)
SHM = "shm"  # name of a backend: gloo, between ranks of one host that share memory
# what makes a message of a shard: to fewer bits, or packed
PREPARES = {torch.ops.aten._to_copy.default, compression_ops.quantize_blockwise}


def is_collective(node: fx.Node) -> bool:
    """Whether a node launches a collective."""
    return node.op == "call_function" and node.target in TABLE


def is_wait(node: fx.Node) -> bool:
    """Whether a node waits for a collective."""
    return node.op == "call_function" and node.target is wait


def is_release(node: fx.Node) -> bool:
    """Whether a node ends the life of unsharded parameters."""
    return node.op == "call_function" and node.target is ops.release


def is_ahead(node: fx.Node) -> bool:
    """Whether a node is an input that the program before has launched: the gather of a parameter."""
    return node.op == "placeholder" and getattr(node.meta.get("entry"), "kind", None) == LAUNCHED


def launched_for_next(step: StepGraph) -> dict[fx.Node, list[str]]:
    """The launches that a program leaves to the next one to wait for -> the parameters that they gather."""
    found: dict[fx.Node, list[str]] = {}
    output: Any = step.output
    for result, node in zip(output.meta.get("results", ()), output.args[0], strict=False):
        if result.kind == LAUNCHED:
            launch: Any = node.args[0] if is_getitem(node) else node
            found.setdefault(launch, []).append(result.name)
    return found


def carrier_of(launch: fx.Node) -> str | None:
    """What carries a collective in place of the backend's own algorithm: SEND_RECV, one of IN_MEMORY, or None."""
    return launch.meta.get("algorithm")


def axis_of(node: fx.Node) -> str:
    """The mesh axis of a collective, also of one that the program before has launched."""
    if is_ahead(node):
        return str(_parameter_ahead(node).meta["sharding"].axis)
    return str(node.args[TABLE[node.target].axis_arg])


def launched_by(node: fx.Node) -> fx.Node:
    """What a wait waits for: a collective (through the getitem of a coalesced one), or an input launched before."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if is_collective(source) or is_ahead(source) else source.args[0]  # type: ignore[return-value]


def sent(node: fx.Node) -> list[fx.Node]:
    """The tensors that a collective takes."""
    first: Any = node.args[0]
    return list(first) if isinstance(first, (list, tuple)) else [first]


def sent_to(wait: fx.Node) -> fx.Node:
    """The tensor that the collective which a wait waits for took for it; the input itself, if launched before."""
    source = wait.args[0]
    assert isinstance(source, fx.Node)
    if is_ahead(source):
        return source
    return sent(launched_by(wait))[0 if is_collective(source) else source.args[1]]  # type: ignore[index]


def ends_gather(wait: fx.Node) -> bool:
    """Whether what a wait waits for is a gather."""
    launch = launched_by(wait)
    return is_ahead(launch) or launch.target in (all_gather, all_gather_coalesced)


def node_axis(axis: str) -> str:
    """The part of a mesh axis that lies within a node; in the mesh of a graph it stands beside that axis."""
    return f"{axis}_node"


def gathered_before(source: fx.Node) -> fx.Node | None:
    """The wait of an earlier gather of which a tensor is the part that this rank has kept; None for other tensors."""
    kept = source.target is ops.local_shard and isinstance(source.args[0], fx.Node)
    wait: Any = source.args[0] if kept else None
    return wait if kept and is_wait(wait) and ends_gather(wait) else None


def first_sent_to(wait: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What a wait waits for, as it was sent before any rank kept a part of it: (collective, tensor that it took)."""
    source = sent_to(wait)
    before = gathered_before(source)
    return (launched_by(wait), source) if before is None else first_sent_to(before)


def parameter_sent(source: fx.Node) -> fx.Node | None:
    """The parameter input that a tensor is, is a message made of, or is a kept part of; None where it is none of it."""
    before = gathered_before(source)
    if before is not None:
        source = first_sent_to(before)[1]
    while source.target in PREPARES or source.target in swap_ops.OPS:
        source = source.args[0]  # type: ignore[assignment]
    if is_ahead(source):
        return _parameter_ahead(source)
    is_parameter = source.op == "placeholder" and source.meta["entry"].kind == "parameter"
    return source if is_parameter else None


def _parameter_ahead(node: fx.Node) -> fx.Node:
    """The parameter input whose gather an input is."""
    key = ("parameter", node.meta["entry"].name)
    inputs = itertools.takewhile(lambda other: other.op == "placeholder", node.graph.nodes)
    return next(other for other in inputs if other.meta["entry"].key == key)


def moves_parts(launch: fx.Node) -> bool:
    """Whether a collective lets a value lie in another way over ranks that make each call together.

    What it moves is no rows of a parameter at rest, and no gradient of another batch.
    """
    return axis_of(launch) in SPLIT_AXES


def parameter_gathered(launch: fx.Node) -> fx.Node | None:
    """The parameter input whose rows a gather (of one tensor) brings together; None for any other gather."""
    return None if moves_parts(launch) else parameter_sent(sent(launch)[0])


def gathers_parameters(node: fx.Node) -> bool:
    """Whether a node launches the gather of parameters, for forward or backward."""
    gathers = node.target in (all_gather, all_gather_coalesced) and node.meta["phase"] != "update"
    return gathers and not moves_parts(node) and all(parameter_sent(source) is not None for source in sent(node))


def wire_bytes(node: fx.Node, mesh: dict[str, int]) -> int:
    """Bytes that one rank sends for a collective, by the bandwidth-optimal algorithm.

    The reduce-scatter of gloo is an exception that sends as much as an all-reduce (seen on the wire); passes replace
    it by `all_to_all` there.
    """
    size = mesh[axis_of(node)]
    larger = max(num_bytes([n.meta["val"] for n in sent(node)]), num_bytes(node.meta["val"]))
    row = TABLE[node.target]
    return int(row.wire * larger * (1.0 if row.to_one else (size - 1) / size))
