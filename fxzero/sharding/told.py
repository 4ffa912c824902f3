"""What was decided for an axis, as people are told it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware
from fxzero.graph import StepGraph
from fxzero.graph.blocks import with_stars
from fxzero.graph.step_graph import num_bytes
from fxzero.graph.text import size_text
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import Answer
from fxzero.sharding.whole import Whole

_MOST_LINES = 40


def told(step: StepGraph, axis: str, answer: Answer, rules: Rules, all_whole: Sequence[Whole]) -> str:
    """The cost of an answer beside its bound, how parameters lie, equal blocks as one line, and what is not split.

    Args:
        step: as captured, before it is rewritten.
        axis: the mesh axis.
        answer: for that axis.
        rules: that were asked.
        all_whole: what every rank does whole, longest first.
    """
    hardware = answer.problem.hardware
    lines = [
        f"tensors over {axis}={answer.problem.ranks} on {hardware.name}: {answer.seconds * 1e3:.3f} ms a step by the "
        f"model of costs, {answer.bound_s * 1e3:.3f} ms at least (gap {answer.gap:.2%})"
    ]
    lies: Counter[tuple[str, str, str]] = Counter()
    whole = here = 0
    for node in step.inputs("parameter"):
        (placement,) = answer.strategy(node).outputs
        assert placement is not None
        entry, size = node.meta["entry"], num_bytes(node.meta["val"])
        whole, here = whole + size, here + (size // answer.problem.ranks if placement.is_shard else size)
        lies[(with_stars(entry.name), str(list(entry.shape)), str(placement))] += 1
    lines[0] += f"; parameters {size_text(whole)}, of which a rank has {size_text(here)}"
    for (name, shape, lie), count in [*lies.items()][:_MOST_LINES]:
        lines.append(f"  {lie:5} {name} {shape}{f' x{count}' if count > 1 else ''}")
    if len(lies) > _MOST_LINES:
        lines.append(f"  .. and {len(lies) - _MOST_LINES} more; the graph's text has all")
    lines += [f"  {line}" for line in all_whole]
    unknown = _unknown(step, rules, hardware)
    lines += [f"  no rule for {op}: every rank does all of it ({text})" for op, text in unknown.items()]
    return "\n".join(lines)


def _unknown(step: StepGraph, rules: Rules, machine: Hardware) -> dict[str, str]:
    """Op that no rule knows -> how often it is called, and what that costs on each rank."""
    found: dict[str, tuple[int, float]] = {}
    for node in step.calls():
        if str(node.target) in rules.unknown:
            calls, seconds = found.get(str(node.target), (0, 0.0))
            found[str(node.target)] = calls + 1, seconds + compute_seconds(node, machine)
    return {op: f"{calls} calls, {seconds * 1e6:.1f} us" for op, (calls, seconds) in found.items()}
