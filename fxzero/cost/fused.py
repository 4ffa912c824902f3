"""What calls of a compiled region cost: values that stay inside of it never go through memory.

[Note: fused calls]
A compiler makes one loop of neighbouring calls that go through memory element by element. Of such a call counts what it
reads from outside of its region or from an op that is called (a product, attention), and what it makes for these; a
tensor that several calls of a region read is read once. What is left is arithmetic, and where a call makes nothing for
others, it has no overhead of its own. Products cost what they cost alone.
"""

from __future__ import annotations

from torch import fx

from fxzero.cost.compute import arithmetic_seconds, computes, fresh_seconds, memory_seconds
from fxzero.cost.hardware import Hardware
from fxzero.cost.op_classes import MEMORY_CLASSES, op_class
from fxzero.graph import StepGraph
from fxzero.graph.regions import regions
from fxzero.graph.step_graph import first_argument, is_getitem, is_view, num_bytes

_CALLED = {"index", "random"}  # classes of which compilers make loops of their own, or call torch's


def fused_seconds(step: StepGraph, hardware: Hardware) -> dict[fx.Node, float]:
    """Seconds of each call of a region that a compiler fuses with others; see [Note: fused calls].

    Args:
        step: a program whose regions are cut.
        hardware: the machine that it is for.
    """
    found: dict[fx.Node, float] = {}
    for region in regions(step):
        inside = {node for node in region.calls if _fuses(node)}
        read: set[fx.Node] = set()
        for node in (call for call in region.calls if call in inside):
            sources = {_base(source) for source in node.all_input_nodes} - inside - read
            read |= sources
            made = num_bytes(node.meta["val"]) if _leaves(node, inside) else 0
            traffic = made + sum(num_bytes(source.meta.get("val")) for source in sources)
            seconds = memory_seconds(node, hardware, traffic, overhead=bool(made)) if traffic else 0.0
            found[node] = max(seconds, arithmetic_seconds(node, hardware)) + (
                fresh_seconds(node, hardware) if made else 0.0
            )
    return found


def _fuses(node: fx.Node) -> bool:
    return computes(node) and op_class(node) in MEMORY_CLASSES and op_class(node) not in _CALLED


def _base(node: fx.Node) -> fx.Node:
    """What a view, or one of several values, is a part of."""
    while node.op == "call_function" and (is_view(node) or is_getitem(node)):
        node = first_argument(node)
    return node


def _leaves(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether anything but fused calls reads a value or its views."""
    for user in node.users:
        if is_view(user) or is_getitem(user):
            if _leaves(user, inside):
                return True
        elif user not in inside:
            return True
    return False
