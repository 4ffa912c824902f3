"""The rule of a step graph whose regions are cut: what is compiled as one stands together and holds no fence."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxzero import compat
from fxzero.graph import collectives as c10d
from fxzero.graph.lanes import is_launch, is_wait
from fxzero.graph.randomness import is_random
from fxzero.graph.regions import region_of
from fxzero.graph.rules import Context, Violation
from fxzero.graph.step_graph import is_getitem, yields_scalar


def is_fence(node: fx.Node) -> bool:
    """Whether the place of a call in the program is decided before: it stands between regions."""
    return is_launch(node) or is_wait(node) or c10d.is_release(node) or is_random(node)


def check_regions(context: Context) -> Iterator[Violation]:
    """The calls of a region stand together, in one phase, and are ops that launch, wait for and draw nothing.

    What it hands out are tensors: the parts of several values are in the region too.
    """
    ended: set[int] = set()
    before: fx.Node | None = None
    for node in context.calls:
        number, last = region_of(node), None if before is None else region_of(before)
        if last is not None and last != number:
            ended.add(last)
        if number in ended:
            got = f"a call of region {number} behind %{before}, which is not of it"
            yield Violation(node, "the calls of a region together", got, "run cut_regions last, or move the call")
        if number is not None and number == last and node.meta["phase"] != before.meta["phase"]:  # type: ignore[union-attr]
            yield Violation(node, "one phase in a region", node.meta["phase"], "cut the region between the phases")
        if number is not None and (is_fence(node) or yields_scalar(node) or not _is_op(node)):
            yield Violation(node, "an op that a region may hold", f"{node.target}", "take the call out of its region")
        if number is not None and isinstance(node.meta["val"], (list, tuple)):
            parts = (user for user in node.users if region_of(user) != number)
            for part in parts:
                yield Violation(part, f"the parts of %{node} in its region", "one outside", "mark it, behind the call")
        before = node


def _is_op(node: fx.Node) -> bool:
    return compat.is_op(node.target) or is_getitem(node)
