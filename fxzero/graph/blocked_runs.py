"""Runs of an update that a CPU computes block by block, so that what is in between stays in its cache.

[Note: blocked runs]
An update is a dozen ops on tensors of one shape, each of which would read and write all of memory. On a CPU the calls
of a run are made for one block of elements after the other instead: parameter, gradient and state go through memory
once, and values in between take a block. Each op is elementwise and gets the same elements, so the result is the same,
bit by bit: blocks are whole vectors of the processor, and the last one ends where the tensor does. A run stands
together in program order; all that leaves it stands in the memory of what entered it.
Source of the idea: loop fusion by strip-mining, as array languages do (Wolfe, 1989).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import STATE_KINDS, StepGraph, yields_scalar, yields_tensor
from fxzero.graph.storage import InPlace
from fxzero.graph.swap_ops import is_off_device, tier_of

# Of a block and a thread: a few tensors of it fit into the last cache, and a call's own cost is small beside it. Tried
# on an EPYC with 32 MiB of it, AdamW on 9.4 million elements: 117 ms for a step, 128 with 2**16, 171 without blocks; on
# 1 million elements, which that cache holds, blocks gain nothing.
_ELEMENTS = 2**18
_FEWEST_BLOCKS = 8
_FEWEST_CALLS = 3


@dataclass(frozen=True)
class BlockedRun:
    """Calls that are made block by block.

    Args:
        calls: on tensors, in program order.
        before: calls that yield numbers of the host and stand between them; they are made first.
        taken: the tensors that are cut into blocks: what the calls read that none of them makes.
        num_elements: of each.
    """

    calls: tuple[fx.Node, ...]
    before: tuple[fx.Node, ...]
    taken: tuple[fx.Node, ...]
    num_elements: int

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of its calls, those that are made first in front."""
        return (*self.before, *self.calls)

    @property
    def num_blocks(self) -> int:
        """How often each call is made."""
        return -(-self.num_elements // block_elements())


def block_elements() -> int:
    """Elements of a block on this machine."""
    return _ELEMENTS * max(torch.get_num_threads(), 1)


def blocked_runs(step: StepGraph, in_place: InPlace, *, device: str) -> list[BlockedRun]:
    """The runs of a program, in order.

    Args:
        step: the graph.
        in_place: its memory.
        device: type of the device that it runs on; what runs on the host of a GPU is blocked there.
    """
    least = _FEWEST_BLOCKS * block_elements()
    found = []
    for stretch in _stretches(step, in_place, device, least):
        while len(stretch) >= _FEWEST_CALLS:
            run = _run(in_place, stretch)
            if run is not None:
                found.append(run)
                break
            stretch = stretch[:-1]  # its last call leaves memory of its own to others
    return found


def _stretches(step: StepGraph, in_place: InPlace, device: str, least: int) -> Iterator[list[fx.Node]]:
    """Calls in a row that could be blocked together, and the numbers between them."""
    state = {node.meta["entry"].key: node for node in step.inputs(*STATE_KINDS)}
    elsewhere = {node for key, node in step.results.items() if in_place.storage.get(node) is not state.get(key, node)}
    elsewhere |= {node for key, node in step.results.items() if key not in state}
    stretch: list[fx.Node] = []
    for node in step.calls():
        fits = node.meta["phase"] == "update" and node not in elsewhere and _can_be_blocked(node, device, least)
        if stretch and fits and _alike(node, stretch[0]):
            stretch.append(node)
        elif (
            stretch and yields_scalar(node) and not set(node.all_input_nodes) & {n for n in stretch if yields_tensor(n)}
        ):
            stretch.append(node)
        else:
            yield from [stretch] if stretch else []
            stretch = [node] if fits else []
    yield from [stretch] if stretch else []


def _can_be_blocked(node: fx.Node, device: str, least: int) -> bool:
    target: Any = node.target
    if not compat.is_op(target) or torch.Tag.pointwise not in target.tags or is_random(node) or not yields_tensor(node):
        return False
    if (device != "cpu" and tier_of(node) != "host") or (is_off_device(node) and tier_of(node) != "host"):
        return False
    val = node.meta["val"]
    if not isinstance(val.numel(), int) or val.numel() < least or not val.is_contiguous():
        return False
    rest = [*node.args, *node.kwargs.values()]
    return all(_is_whole(arg, val) if isinstance(arg, fx.Node) else not isinstance(arg, (list, tuple)) for arg in rest)


def _is_whole(source: fx.Node, val: torch.Tensor) -> bool:
    """Whether an argument can be cut as its reader is, or is one number."""
    other = source.meta.get("val")
    if not isinstance(other, torch.Tensor):
        return True
    return other.dim() == 0 or (other.shape == val.shape and other.is_contiguous())


def _alike(node: fx.Node, other: fx.Node) -> bool:
    return node.meta["val"].shape == other.meta["val"].shape and tier_of(node) == tier_of(other)


def _run(in_place: InPlace, stretch: list[fx.Node]) -> BlockedRun | None:
    """The run of a stretch, if all that leaves it stands in memory that entered it, each under one name."""
    while stretch and yields_scalar(stretch[-1]):
        stretch = stretch[:-1]
    before = tuple(node for node in stretch if yields_scalar(node))
    calls = tuple(node for node in stretch if not yields_scalar(node))
    inside = set(calls)
    if len(calls) < _FEWEST_CALLS:
        return None
    sources = [source for node in calls for source in node.all_input_nodes if source not in inside]
    taken = tuple(dict.fromkeys(s for s in sources if yields_tensor(s) and s.meta["val"].dim()))
    roots = [in_place.storage.get(source, source) for source in taken]
    if len(set(roots)) < len(roots):
        return None
    numbers = {in_place.storage.get(s, s) for s in sources if yields_tensor(s) and not s.meta["val"].dim()}
    for node in calls:
        root = in_place.storage[node]
        if root in numbers:
            return None
        if root in inside:
            if any(user not in inside for user in node.users):
                return None
        elif root not in roots:
            return None
    return BlockedRun(calls, before, taken, calls[0].meta["val"].numel())
