"""What a call takes: its tensors, and which call yields each."""

from __future__ import annotations

from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import is_getitem, yields_tensor

# what yields a tensor, and which of its outputs that is
Yielded = tuple[fx.Node, int]


def tensors_taken(node: fx.Node) -> list[fx.Node]:
    """The nodes of all tensors that a call takes, in the order of its arguments, as often as it takes them."""
    found: list[fx.Node] = []

    def note(source: fx.Node) -> fx.Node:
        if yields_tensor(source):
            found.append(source)
        return source

    fx.map_arg((node.args, node.kwargs), note)
    return found


def is_alias(node: fx.Node) -> bool:
    """Whether a node stands for what another call yields: it picks one of several values, or waits for one."""
    return is_getitem(node) or c10d.is_wait(node)


def value_taken(node: fx.Node) -> Yielded:
    """(what yields a tensor, which of its outputs it is)."""
    if is_alias(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source, node.args[1] if is_getitem(node) else 0  # type: ignore[return-value]
    return node, 0
