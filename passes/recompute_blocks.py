"""Activations of whole blocks are computed again in backward: only what enters a block is kept.

Each block's forward runs once more just before its backward, node by node as backward asks for it, from the tensors
that enter the block. Nothing is drawn twice: the outcome of a random call is kept (a dropout mask as one byte an
element), so that the dropout of backward is the dropout of forward. Parameters are read again, not kept: under ZeRO-3
the gather of backward serves both.
Source: Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016).
"""

from __future__ import annotations

import difflib
import fnmatch

from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.blocks import repeated_blocks
from fxzero.graph.contract import graph_pass
from fxzero.graph.step_graph import yields_tensor
from fxzero.passes.recompute_chosen import can_be_had_again, is_mask, keep_as_bool
from fxzero.passes.recompute_pointwise import had_again


@graph_pass(requires=("captured",), provides=("blocks-recomputed",))
def recompute_blocks(step: StepGraph, *, patterns: tuple[str, ...] = (), fraction: float = 1.0) -> int:
    """Compute what backward reads of a block's inside again, from what entered the block.

    Args:
        step: the graph, not yet sharded.
        patterns: module paths, as for file names: each module that matches is a block, with all in it. Without any,
            the repeated ones are: the modules of a list, such as layers.0, layers.1.
        fraction: of these blocks, in forward order, how many: the first ones, whose activations are kept longest.

    Raises:
        PlanError: if a pattern matches no module, or there are no repeated ones.
    """
    position: dict[fx.Node, float] = dict(step.positions())
    blocks = _blocks(step, patterns)
    edits = 0
    for members in list(blocks.values())[: round(fraction * len(blocks))]:
        inside = _inside(members)
        twins: dict[fx.Node, fx.Node] = {}
        for node in reversed(members):
            readers = [user for user in node.users if user.meta.get("phase") == "backward"]
            if node in inside and readers and yields_tensor(node):
                first = min(readers, key=position.__getitem__)
                twin = had_again(node, first, inside, twins, position)
                for reader in readers:
                    reader.replace_input_with(node, twin)
                edits += 1
        for node in filter(is_mask, members):
            edits += keep_as_bool(step, node, position)
    return edits


def _blocks(step: StepGraph, patterns: tuple[str, ...]) -> dict[str, list[fx.Node]]:
    """Module path of each block -> its forward nodes, in order."""
    forward = step.phase("forward")
    paths = list(dict.fromkeys(node.meta["module"] for node in forward))
    block_of = _matches(paths, patterns) if patterns else repeated_blocks(paths)
    found: dict[str, list[fx.Node]] = {}
    for node in forward:
        if node.meta["module"] in block_of:
            found.setdefault(block_of[node.meta["module"]], []).append(node)
    _check_found(found, patterns, paths)
    return found


def _matches(paths: list[str], patterns: tuple[str, ...]) -> dict[str, str]:
    """Path -> the outermost module around it that a pattern matches."""
    out = {}
    for path in paths:
        around = [".".join(path.split(".")[: count + 1]) for count in range(path.count(".") + 1)]
        matching = [p for p in around if any(fnmatch.fnmatchcase(p, pattern) for pattern in patterns)]
        if matching:
            out[path] = matching[0]
    return out


def _check_found(found: dict[str, list[fx.Node]], patterns: tuple[str, ...], paths: list[str]) -> None:
    modules = sorted({".".join(path.split(".")[: i + 1]) for path in paths for i in range(path.count(".") + 1)} - {""})
    unknown = [p for p in patterns if not fnmatch.filter(modules, p)]
    if unknown:
        close = difflib.get_close_matches(unknown[0], modules, n=3, cutoff=0.4) or modules[:6]
        raise PlanError.of(
            "Plan.recompute",
            expected="patterns of module paths that run in forward",
            got=", ".join(map(repr, unknown)),
            fix=f"nearest are: {', '.join(close)}" if close else "leave recompute out",
        )
    if not found:
        raise PlanError.of(
            "Plan.recompute",
            expected="a model with repeated blocks, such as layers.0, layers.1",
            got=f"modules {', '.join(modules[:6]) or 'none'}",
            fix="name modules: recompute=['encoder', 'decoder.*']",
        )


def _inside(members: list[fx.Node]) -> set[fx.Node]:
    """The nodes of a block that can be had again and that nothing in forward reads from outside of it."""
    own = set(members)

    def leaves(node: fx.Node) -> bool:
        return any(user not in own and user.meta.get("phase") != "backward" for user in node.users)

    return {node for node in members if can_be_had_again(node) and not leaves(node)}
