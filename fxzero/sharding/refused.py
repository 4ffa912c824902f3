"""What a plan asks of a split that a step does not allow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.sharding.attention import is_attention
from fxzero.sharding.rules import Rules
from fxzero.sharding.taken import tensors_taken
from fxzero.sharding.whole import Whole

_MOST_RANKS = 64  # of an axis, that an error names


def check_attention(step: StepGraph, axis: str, rules: Rules) -> None:
    """All attention can be made in the form that is asked for.

    Args:
        step: as captured.
        axis: of the mesh.
        rules: for it, with the form.

    Raises:
        PlanError: naming what cannot, and sizes of the axis that allow it.
    """
    for node in step.calls():
        if not is_attention(node.target) or _is_made_so(node, rules):
            continue
        others = (Rules(n, head_blocks=rules.head_blocks, attention=rules.attention) for n in range(2, _MOST_RANKS + 1))
        sizes = [str(other.ranks) for other in others if _is_made_so(node, other)]
        shapes = " and ".join(str(list(source.meta["val"].shape)) for source in tensors_taken(node)[:2])
        fix = f"sizes that do: {', '.join(sizes)}; or" if sizes else "no size does, by its mask, its dropout or its op:"
        raise PlanError.of(
            f"Plan.{axis}_attention",
            expected=f"attention that {axis}={rules.ranks} allows to make by {rules.attention!r}",
            got=f"{node.target} of {shapes} in {node.meta['module'] or 'the model'}",
            fix=f"{fix} leave it at 'auto'",
        )


def _is_made_so(node: fx.Node, rules: Rules) -> bool:
    return any(placement.is_shard for placement in rules.of(node)[0].inputs)


def refuse_unknown(step: StepGraph, rules: Rules) -> None:
    """A rule knows every op.

    Args:
        step: as captured.
        rules: that were asked.

    Raises:
        PlanError: naming those that none knows.
    """
    if not rules.unknown:
        return
    first = next(node for node in step.calls() if str(node.target) in rules.unknown)
    where = f"first in {first.meta['phase']} of {first.meta['module'] or 'the model'}"
    raise PlanError.of(
        "Plan.tp_strict",
        expected="a rule for every op, of DTensor's or of fxzero's own",
        got=f"none for {', '.join(rules.unknown)}, {where}",
        fix="leave tp_strict out (every rank then does all of it), or write a rule in fxzero/sharding/rules.py",
    )


def refuse_undivided(all_whole: Sequence[Whole], axis: str, ranks: int) -> None:
    """No call that takes time is done whole by every rank because of its sizes.

    Args:
        all_whole: what every rank does whole, longest first.
        axis: of the mesh.
        ranks: on it.

    Raises:
        PlanError: naming the one that takes most, and sizes that would do.
    """
    found = next((whole for whole in all_whole if whole.sizes), None)
    if found is None:
        return
    raise PlanError.of(
        "Plan.tp_strict",
        expected=f"sizes that {axis}={ranks} divides, of all that takes time",
        got=str(found),
        fix=f"change {axis} or the model's sizes to one of these, or leave tp_strict out",
    )
