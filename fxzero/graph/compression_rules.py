"""The rule of a step graph whose collectives carry packed messages: what is read is what was sent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.compression_ops import dequantize_blockwise, dequantize_reduce, quantize_blockwise
from fxzero.graph.error_feedback_ops import drop_top_k, pack_top_k, sum_top_k
from fxzero.graph.rules import Context, Violation, equation

# how a packed message is read -> what may have carried it
_READERS: dict[Any, tuple[Any, ...]] = {
    dequantize_blockwise: (c10d.all_gather, c10d.all_gather_coalesced),
    dequantize_reduce: (c10d.all_to_all,),
}


def check_compression(context: Context) -> Iterator[Violation]:
    """A packed message is read by its collective, then once, in the form, blocks and shape in which it was packed."""
    for node in context.calls:
        if node.target is quantize_blockwise:
            for reader in node.users:
                if not c10d.is_collective(reader):
                    fix = "send it, and dequantize what arrives"
                    yield Violation(node, "no reader but its collective", f"%{reader.name}", fix)
        elif node.target is pack_top_k:
            yield from _check_kept_back(node)
        elif node.target is sum_top_k:
            yield from _check_sum(node, context.step.mesh)
        elif node.target in _READERS:
            yield from _check_reader(node, context.step.mesh)
        elif c10d.is_wait(node) and packed_by(node) is not None:
            readers = [user for user in node.users if c10d.gathered_before(user) is not node]  # a part may be kept
            if len(readers) != 1 or readers[0].target not in _READERS:
                got = ", ".join(equation(reader) for reader in node.users) or "none"
                fix = "let all readers read what it is dequantized into, where it dies"
                yield Violation(node, "one reader, which dequantizes it", got, fix)


def packed_by(wait: fx.Node) -> fx.Node | None:
    """The call that packed what a wait waits for; None where it travelled as it is."""
    source = c10d.first_sent_to(wait)[1]
    return source if source.target is quantize_blockwise else None


def _check_reader(node: fx.Node, mesh: dict[str, int]) -> Iterator[Violation]:
    wait: Any = node.args[0]
    packed = packed_by(wait) if c10d.is_wait(wait) else None
    if packed is None or c10d.launched_by(wait).target not in _READERS[node.target]:
        names = " or ".join(c10d.TABLE[target].name for target in _READERS[node.target])
        yield Violation(node, f"the wait of a quantized {names}", f"%{wait}", "dequantize what was quantized")
        return
    x: Any = packed.args[0]
    ranks = mesh[c10d.axis_of(c10d.first_sent_to(wait)[0])]
    shape, form, block, parts = node.args[1:5]
    gathers = node.target is dequantize_blockwise
    rows = x.meta["val"].shape[0]
    whole = [rows * ranks if gathers else rows // ranks, *x.meta["val"].shape[1:]]
    for what, expected, got in (
        ("form and block", packed.args[1:3], (form, block)),
        ("parts", ranks, parts),
        ("parts of what was sent", 1 if gathers else ranks, packed.args[3]),
        ("shape", whole, list(shape)),  # type: ignore[arg-type]
    ):
        if expected != got:
            fix = f"take it from %{packed.name}, and the ranks from step.mesh"
            yield Violation(node, f"{what} {expected}", str(got), fix)


def _check_kept_back(packed: fx.Node) -> Iterator[Violation]:
    """What is chosen of a gradient is sent, and taken out of what is kept back."""
    x = packed.args[0]
    sends = [user for user in packed.users if user.target is c10d.all_gather]
    drops = [user for user in packed.users if user.target is drop_top_k and user.args[0] is x]
    if len(sends) != 1 or len(drops) != 1 or len(packed.users) != 2:
        got = ", ".join(equation(user) for user in packed.users) or "none"
        fix = "gather what was chosen, and keep back the rest of the same tensor"
        yield Violation(packed, f"one all_gather and one drop_top_k of %{x}", got, fix)


def _check_sum(node: fx.Node, mesh: dict[str, int]) -> Iterator[Violation]:
    wait: Any = node.args[0]
    packed = c10d.sent_to(wait) if c10d.is_wait(wait) else None
    if packed is None or packed.target is not pack_top_k:
        yield Violation(node, "the wait of gathered pack_top_k", f"%{wait}", "add up what was packed")
        return
    ranks = mesh[c10d.axis_of(c10d.launched_by(wait))]
    elements = packed.args[0].meta["val"].numel()  # type: ignore[union-attr]
    if node.args[2] != ranks or math.prod(node.args[1]) != elements:  # type: ignore[arg-type]
        got = f"{node.args[2]} parts of {node.args[1]}"
        yield Violation(node, f"{ranks} parts of {elements} elements", got, f"take the shape from %{packed.name}")
