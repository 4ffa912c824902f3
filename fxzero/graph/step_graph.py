"""StepGraph: forward, backward and update of one training step as one functional FX graph.

[Note: node meta]
Everything that a pass needs stands in `node.meta`:
    val        fake tensor (or a representative Python scalar) that the node yields
    phase      "forward" | "backward" | "update"
    module     path of the module whose forward made the node ("" at the root); backward nodes carry the path of
               the forward node that they differentiate
    entry      placeholders only: the StateEntry
    sharding   a Sharding, where the value is this rank's rows of a larger tensor
    placements mesh axis -> how the value lies over its ranks ([Note: placements] in axis_placement.py); an axis that is
               not there has it whole on each
    pinned     parameters only: mesh axis -> how it has to lie over it, whatever is cheapest
    because    why a value is made to lie otherwise, in a few words
    grad_of    names of the parameters whose unreduced gradient this node is
    param      the parameter whose update (or gather, or reduction) this node belongs to
    tier       where the value is, if not on the device: "host" or "nvme"
    algorithm  a collective that is not carried by the backend's own: "send_recv"
    bucket     a collective: the number of those that share its launch, where that was chosen by cost
    region     number of the region that a call is compiled in
    chunk      a call for some of a loss's rows: the number of these; ADDED_UP: it adds up what they give
    piece      a collective for some of the rows that products beside it read or make: the number of these
    stays      a gather of backward: it is left out, because what forward gathered stays
    results    output node only: one Result for each returned value
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero import compat

PHASES = ("forward", "backward", "update")
STATE_KINDS = ("parameter", "buffer", "optimizer", "auxiliary")
# sums of gradients that one microbatch's program hands to the next: of reduced ones, and of this rank's own
CARRIED_KINDS = ("accumulated", "unreduced")
# the gather of a parameter that the program before has launched: not to be read before its wait
LAUNCHED = "launched"
WEIGHTS = "microbatch.weights"  # the batch input that says how much each of a rank's microbatches counts
# a graph that a loop of the user's own calls: what forward has kept for backward, and the gradient of an output
SAVED, TANGENT = "saved", "tangent"
CALL_RESULTS = ("output", SAVED, "gradient")  # what such a graph returns, in place of a loss and state
ADDED_UP = -1  # in place of a chunk's number: what all chunks of a loss give
CALLED = "called"  # the fact that a graph is one of these, which may return nothing
_GIVEN_KINDS = ("hyperparameter", "batch", "constant", "coordinate")
INPUT_KINDS = (*STATE_KINDS, *CARRIED_KINDS, LAUNCHED, *_GIVEN_KINDS, SAVED, TANGENT)


@dataclass(frozen=True)
class StateEntry:
    """What one placeholder of a step graph is.

    Args:
        kind: one of INPUT_KINDS.
        name: parameter or buffer name, also for carried gradients and launched gathers; "param:key" for optimizer
            state; that of an AuxiliaryState; "groups.0.lr" for hyperparameters; the path in (args, kwargs) for batch
            inputs; the mesh axis for coordinates.
        shape: single-device shape of the tensor, () for scalars.
        param: the parameter that an optimizer state belongs to.
    """

    kind: str
    name: str
    shape: tuple[int, ...] = ()
    param: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the entry within a graph."""
        return (self.kind, self.name)

    @property
    def label(self) -> str:
        """What a person calls it: "parameter embed.weight", "exp_avg of embed.weight"."""
        param, _, key = self.name.rpartition(":")
        return f"{key} of {param}" if self.kind == "optimizer" and param else f"{self.kind} {self.name}"


@dataclass(frozen=True)
class AuxiliaryState:
    """A tensor that fxzero itself keeps from step to step: a loss scale, what a compression has left out.

    Args:
        name: that of its entry, of kind "auxiliary", and in checkpoints: "scaler.scale".
        shape: single-device shape; where `sharded`, of the rows of all ranks together.
        dtype: of the tensor.
        initial: what it is full of at the start.
        sharded: rests as rows over dp, which divides `shape[0]`; else whole on every rank.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    initial: float = 0.0
    sharded: bool = False

    @property
    def entry(self) -> StateEntry:
        """What its placeholder in a graph is."""
        return StateEntry("auxiliary", self.name, self.shape)


@dataclass(frozen=True)
class Result:
    """What one returned value of a step graph is.

    Kinds: "loss", "metric", the next value of a state entry, a sum of gradients for the next microbatch, or the gather
    of a parameter for the next step, launched and not waited for. Of a graph that a loop of the user's own calls:
    CALL_RESULTS.
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Sharding:
    """A value holds ceil(rows / num_shards) rows, dim 0, of a tensor with `rows` rows; the last shards are padded."""

    axis: str
    num_shards: int
    rows: int

    @property
    def padded_rows(self) -> int:
        """Rows of all padded shards together."""
        return -(-self.rows // self.num_shards) * self.num_shards


@dataclass
class StepGraph:
    """One training step as a graph, with its mesh and the facts established about it so far.

    Args:
        graph: functional ATen ops, scalars as Python numbers; collectives name a mesh axis where torch expects a
            group name, so that a graph holds no handle of a running process group.
        mesh: axis -> size, in order; after its axis a pass may put the part of it within a node ("dp_node"), which is
            no axis of its own: the sizes of the others multiply to the number of ranks.
        title: what the text form says first.
        facts: what passes have provided.
        remarks: pass -> what it has decided and why, as people are told it; no part of the text that ranks compare.
        evaluated: what calls were seen to yield by the verifier, by all that it depends on; copies share it, as they
            share fake tensors, so that it grows with each verification of any of them.
        made: what calls that passes made yield, by all that it depends on; shared alike, but not with the verifier.
    """

    graph: fx.Graph
    mesh: dict[str, int] = field(default_factory=dict)
    title: str = "captured"
    facts: frozenset[str] = frozenset()
    remarks: dict[str, str] = field(default_factory=dict)
    evaluated: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def copy(self) -> StepGraph:
        """An independent copy; meta dicts are copied, the fake tensors in them shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        returned = graph.graph_copy(self.graph, mapping)
        output = graph.output(returned)
        output.meta = dict(self.output.meta)
        return StepGraph(graph, dict(self.mesh), self.title, self.facts, dict(self.remarks), self.evaluated, self.made)

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def placeholders(self) -> list[fx.Node]:
        """All inputs, in order."""
        return list(itertools.takewhile(lambda node: node.op == "placeholder", self.graph.nodes))

    def inputs(self, *kinds: str) -> list[fx.Node]:
        """The placeholders of these kinds, in order."""
        return [node for node in self.placeholders if node.meta["entry"].kind in kinds]

    def input(self, kind: str, name: str) -> fx.Node | None:
        """The placeholder of one entry."""
        for node in self.placeholders:
            if node.meta["entry"].key == (kind, name):
                return node
        return None

    @property
    def results(self) -> dict[tuple[str, str], fx.Node]:
        """(kind, name) -> the node returned for it."""
        named = zip(self.output.meta["results"], self.output.args[0], strict=True)  # type: ignore[arg-type]
        return {(result.kind, result.name): node for result, node in named}  # type: ignore[misc]

    def set_result(self, kind: str, name: str, node: fx.Node) -> None:
        """Return `node` for (kind, name) from now on."""
        results = self.results
        results[(kind, name)] = node
        self.set_results(results)

    def set_results(self, results: dict[tuple[str, str], fx.Node]) -> None:
        """Replace everything that is returned."""
        self.output.args = (tuple(results.values()),)
        self.output.meta["results"] = tuple(Result(*key) for key in results)

    def calls(self, *targets: Any) -> list[fx.Node]:
        """The call nodes, or those of these targets, in order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]

    def phase(self, name: str) -> list[fx.Node]:
        """The call nodes of one phase, in order."""
        return [node for node in self.calls() if node.meta["phase"] == name]

    def gradients(self) -> dict[str, fx.Node]:
        """Parameter name -> node that yields its unreduced gradient."""
        return {name: node for node in self.calls() for name in node.meta.get("grad_of", ())}

    @property
    def axes(self) -> dict[str, int]:
        """The mesh axes that have more than one rank."""
        return {axis: size for axis, size in self.mesh.items() if size > 1}

    def positions(self) -> dict[fx.Node, int]:
        """Node -> index in program order."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    def __str__(self) -> str:
        from fxzero.graph.text import to_text

        return to_text(self)


def tensor_val(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node that yields one tensor."""
    val = node.meta["val"]
    assert isinstance(val, torch.Tensor), f"{node} yields {type(val).__name__}, not a tensor"
    return val


def yields_tensor(node: fx.Node) -> bool:
    """Whether a node yields one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def yields_scalar(node: fx.Node) -> bool:
    """Whether a node yields a Python number that lives on the host."""
    return isinstance(node.meta.get("val"), (bool, int, float))


def num_bytes(val: Any) -> int:
    """Bytes of a value: a tensor, or any nesting of tensors; 0 for all else, and for sizes known only when it runs."""
    if isinstance(val, torch.Tensor):
        if not isinstance(val.numel(), int):
            return 0
        return val.numel() * val.element_size()
    if isinstance(val, (list, tuple)):
        return sum(num_bytes(item) for item in val)
    return 0


def ancestors(nodes: Iterable[fx.Node], *, but_of: Callable[[fx.Node], bool] | None = None) -> set[fx.Node]:
    """The nodes and everything that they are computed from.

    Args:
        nodes: some.
        but_of: nodes whose own inputs do not count.
    """
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend([] if but_of is not None and but_of(node) else node.all_input_nodes)
    return seen


def iter_views(node: fx.Node) -> Iterator[fx.Node]:
    """What shares the memory of `node`: its views and theirs, also out of a list of views (split)."""
    for user in node.users:
        if is_view(user) or (is_getitem(user) and is_view(node)):
            yield user
            yield from iter_views(user)


def is_view(node: fx.Node) -> bool:
    """Whether a call's output (or each of its outputs) aliases its first input."""
    return node.op == "call_function" and _makes_views(node.target)


@functools.cache  # asked millions of times in a large step, of a few hundred ops
def _makes_views(target: Any) -> bool:
    if not compat.is_op(target):
        return False
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)
    return aliases or target is torch.ops.aten._unsafe_view.default  # whose schema does not say so


def identifier(name: str) -> str:
    """A name as a Python identifier, for names of nodes."""
    return re.sub(r"\W", "_", name)


def sharding_of(node: fx.Node, axis: str, num_shards: int, persist_below: int) -> Sharding | None:
    """How a parameter is sharded over an axis; None where every rank of the axis keeps all of it.

    Args:
        node: its input, not sharded yet. What an axis such as tp has split is split further: the rows are those of
            this rank's part ([Note: placements]).
        axis, num_shards: the axis and its size.
        persist_below: elements, of what a rank has before it is sharded, below which it is not.
    """
    shape = tensor_val(node).shape
    return Sharding(axis, num_shards, shape[0]) if rests_as_rows(shape, persist_below) else None


def rests_as_rows(shape: Sequence[int], persist_below: int) -> bool:
    """Whether a parameter (or the part of it that tp leaves a rank) is split where there are ranks to split it over.

    Whole stay scalars, what has fewer than `persist_below` elements, and what has a single row.
    """
    return bool(shape) and shape[0] >= 2 and math.prod(shape) >= persist_below


def is_getitem(node: fx.Node) -> bool:
    """Whether a node picks one of several values."""
    return node.op == "call_function" and node.target is operator.getitem


def first_argument(node: fx.Node) -> fx.Node:
    """The node that a call takes first."""
    source = node.args[0]
    assert isinstance(source, fx.Node), f"{node} takes {source!r} first"
    return source


def device_of(step: StepGraph) -> str:
    """The type of device that a graph's tensors are on; "cpu" for those of the meta device, as capture takes them."""
    found = (
        node.meta["val"].device.type for node in step.placeholders if yields_tensor(node) and node.meta["val"].dim()
    )
    device = next(found, "cpu")
    return "cpu" if device == "meta" else str(device)
