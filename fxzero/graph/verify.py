"""The verifier: a step graph that passes it keeps every rule that passes rely on.

docs/verifier.md says what each rule protects from. Rules run in the order of RULES, cheap and specific ones
first, so that the first violation is the one that explains the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import fx

from fxzero.errors import VerifyError
from fxzero.graph.call_signature import call_signature, has_symbols
from fxzero.graph.collective_rules import check_collectives, check_release, check_sharding
from fxzero.graph.compression_rules import check_compression
from fxzero.graph.edit import describe, evaluate, fake_mode
from fxzero.graph.placement_rules import check_placements
from fxzero.graph.region_rules import check_regions
from fxzero.graph.rules import (
    Context,
    Summary,
    Violation,
    check_functional,
    check_gradients,
    check_meta,
    check_order,
    check_phases,
    check_random,
    check_state,
    check_structure,
    check_synchronisation,
    equation,
    schema_of,
)
from fxzero.graph.step_graph import StepGraph, yields_scalar
from fxzero.graph.swap_rules import check_swaps

aten = torch.ops.aten


def verify(step: StepGraph, *, before: StepGraph | Summary | None = None, values: bool = True) -> Summary:
    """A graph keeps all rules.

    Args:
        step: the graph.
        before: the graph that a pass was given to make `step`, or what a call of `verify` returned for it; rules
            that compare are left out without it.
        values: also compute every value anew (most of the time that verification takes).

    Returns:
        What the rules that compare need to know of this graph, for the next call's `before`.

    Raises:
        VerifyError: at the first broken rule, with its name.
    """
    context = Context(step, Summary.of(before) if isinstance(before, StepGraph) else before)
    for name, rule in RULES.items():
        if name == "values" and not values:
            continue
        for violation in rule(context):
            where = violation.where if isinstance(violation.where, str) else equation(violation.where)
            raise VerifyError.of(
                where=f"{step.title}, rule '{name}', {where}",
                expected=violation.expected,
                got=violation.got,
                fix=violation.fix,
            )
    return context.summary


def check_values(context: Context) -> Iterator[Violation]:
    """What each node says about its value is what its op yields for its inputs.

    [Note: evaluating once]
    What an op yields under fake mode depends only on the op and on dtype, shape, strides and device of its
    inputs, so each distinct combination is evaluated once, in all verifications of copies of one capture together:
    repeated layers, what a pass has left alone, and what another pipeline has made too, cost a look-up. Sizes
    known only when the step runs (the rows that a mask selects) cannot be compared: a node that reads or yields such
    a tensor is left out.
    """
    mode = fake_mode(context.step)
    symbolic = {n for n in context.step.graph.nodes if n.op != "output" and has_symbols(n.meta["val"])}
    signatures: dict[fx.Node, Hashable] = {}
    evaluated = context.step.evaluated
    fix = "call retype() on what a pass changed, or let Editor make the node"
    for node in context.calls:
        if symbolic and (node in symbolic or any(n in symbolic for n in node.all_input_nodes)):
            continue
        # the type, because a number is not computed anew
        key = (call_signature(node, signatures), yields_scalar(node) and type(node.meta["val"]))
        try:
            if key not in evaluated:
                evaluated[key] = _expected(node, mode)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            yield Violation(node, "an op that takes what its inputs are now", got, fix)
            continue
        got = describe(node.meta["val"])
        if got != evaluated[key]:
            yield Violation(node, f"meta['val'] {evaluated[key]}", str(got), fix)


def _expected(node: fx.Node, mode: Any) -> Any:
    """Description of what a call yields."""
    if not yields_scalar(node):
        return describe(evaluate(node, mode))
    standing = type(node.meta["val"]).__name__
    schema = schema_of(node)
    if schema is None:
        return _scalar_type(node, standing)
    if node.target is aten._local_scalar_dense.default:
        dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
        return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "int"
    return "a tensor" if "Tensor" in str(schema.returns[0].type) else standing


def _scalar_type(node: fx.Node, standing: str) -> str:
    """The type that a function of Python yields; the representative numbers may lie outside of its domain."""
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (ArithmeticError, ValueError):
        return standing
    return standing if isinstance(result, complex) else describe(result)


RULES: dict[str, Callable[[Context], Iterator[Violation]]] = {
    "structure": check_structure,
    "meta": check_meta,
    "functional": check_functional,
    "state": check_state,
    "phases": check_phases,
    "collectives": check_collectives,
    "compression": check_compression,
    "placements": check_placements,
    "sharding": check_sharding,
    "swaps": check_swaps,
    "release": check_release,
    "random": check_random,
    "order": check_order,
    "regions": check_regions,
    "synchronisation": check_synchronisation,
    "gradients": check_gradients,
    "values": check_values,
}
