"""What every rank of an axis does whole, and the sizes that stand in the way of a split."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxzero import compat
from fxzero.cost.compute import compute_seconds
from fxzero.graph import StepGraph
from fxzero.graph.axis_placement import REPLICATED
from fxzero.sharding.places import Places
from fxzero.sharding.solve import Answer
from fxzero.sharding.strategy import Call, Tensor

_LEAST_PART = 0.01  # of one device's time: what is less is no news
_HEADS = 1


@dataclass
class Whole:
    """Calls of an op at one place of equal blocks that every rank does whole.

    Args:
        place: of the module, a star for the number of a block.
        op: name of the op.
        part: of the time that one device takes for the step.
        sizes: words about each size that the ranks do not divide; empty: it is cheaper so.
    """

    place: str
    op: str
    part: float
    sizes: tuple[str, ...]

    def __str__(self) -> str:
        why = f" ({'; '.join(self.sizes)})" if self.sizes else ""
        return f"every rank does all of {self.op} in {self.place}, {self.part:.1%} of one device's time{why}"


def done_whole(step: StepGraph, answer: Answer) -> list[Whole]:
    """What takes most time of what is not split, longest first.

    Args:
        step: as captured, before it is rewritten.
        answer: for an axis.
    """
    ranks, places = answer.problem.ranks, Places(step)
    found: dict[tuple[str, str, tuple[str, ...]], float] = {}
    total = 0.0
    for node in step.calls():
        seconds = compute_seconds(node, answer.problem.hardware)
        total += seconds
        if seconds and compat.is_op(node.target) and _is_whole(node, answer):
            sizes = tuple(undivided(Call.of(node, ranks)))
            place = places.starred(node.meta.get("param") or node.meta["module"]) or "the model"
            key = (place, node.target.name(), sizes)  # type: ignore[union-attr]
            found[key] = found.get(key, 0.0) + seconds
    lines = [
        Whole(*key[:2], seconds / total, key[2]) for key, seconds in found.items() if seconds / total > _LEAST_PART
    ]
    return sorted(lines, key=lambda line: -line.part)


def _is_whole(node: fx.Node, answer: Answer) -> bool:
    if node not in answer.problem.of_node:
        return False
    way = answer.strategy(node)
    return all(lies is None or lies == REPLICATED for lies in (*way.inputs, *way.outputs))


def undivided(call: Call) -> list[str]:
    """What to say of a call's sizes that its ranks do not divide: of attention, of its heads.

    Args:
        call: that every rank does whole.
    """
    ranks, tensors = call.ranks, call.tensors
    if "scaled_dot_product" in str(call.target):
        if call.argument("dropout_p", 0.0):
            return ["it draws its dropout inside"]
        heads = max(tensor.shape[_HEADS] for tensor in tensors if len(tensor.shape) == len(tensors[0].shape))
        return [] if heads % ranks == 0 else [f"{heads} heads: {_divisors(heads, ranks)} ranks would divide them"]
    whole = [*tensors, *(output for output in call.outputs if isinstance(output, Tensor))]
    sizes = sorted({size for tensor in whole for size in tensor.shape if size > ranks and size % ranks})
    return [f"{size} is not divided by {ranks}, {-(-size // ranks) * ranks} is" for size in sizes]


def _divisors(size: int, near: int) -> str:
    """The divisors of a size next to a number, as words: 2 or 7."""
    divisors = [number for number in range(2, size + 1) if size % number == 0]
    below, above = [d for d in divisors if d < near][-1:], [d for d in divisors if d > near][:1]
    return " or ".join(map(str, below + above))
