"""Views of a parameter, repeated for each phase, so that none outlives the phase whose copy it views."""

from __future__ import annotations

import torch
from torch import fx

from fxzero.graph.step_graph import is_getitem, is_view

aten = torch.ops.aten

# cheap ops on a parameter alone, done again in backward rather than kept as an activation
_REPEATED = {aten._to_copy.default, aten.clone.default}


def repeat_views(source: fx.Node, position: dict[fx.Node, float]) -> int:
    """Give each later phase its own copy of the views (and casts) of a parameter.

    Args:
        source: the parameter's input, or a view of it.
        position: node -> its place in the program; grows.

    Returns:
        How many copies were made.
    """
    edits = 0
    for view in [n for n in source.users if _repeats(n, source)]:
        edits += repeat_views(view, position)  # first, so that a copy of a view's view asks for a copy of the view
        by_phase: dict[str, list[fx.Node]] = {}
        for user in view.users:
            phase = user.meta.get("phase", view.meta["phase"])
            if phase != view.meta["phase"]:
                by_phase.setdefault(phase, []).append(user)
        for phase, users in by_phase.items():
            first = min(users, key=lambda n: position.get(n, 0))
            with view.graph.inserting_before(first):
                twin = view.graph.node_copy(view)
            twin.meta = {**view.meta, "phase": phase}
            position[twin] = position.get(first, 0) - 0.5
            for user in users:
                user.replace_input_with(view, twin)
            edits += 1
    return edits


def _repeats(node: fx.Node, source: fx.Node) -> bool:
    if is_getitem(node):
        return is_view(source)
    return (is_view(node) or node.target in _REPEATED) and len(node.all_input_nodes) == 1
