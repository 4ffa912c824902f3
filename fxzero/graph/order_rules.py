"""The rule of a step graph about order that no read shows: what has to come first although nothing is handed on.

A data dependence, the end of a gathered tensor and the order of random numbers have rules of their own. Here are the
others: a parameter is not gathered again while it is gathered, the old value of state is read before its next one is
made (else the program would have to copy it), and rows that are read in place are released before their owner may write
them ([Note: rows side by side] in `shared_rows.py`). A scheduler asks `required_order` what it may not turn around.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.shared_rows import reads_before_writes_in_place
from fxzero.graph.step_graph import STATE_KINDS, StepGraph, is_getitem, is_view, iter_views, tensor_val, yields_tensor
from fxzero.graph.storage import done_with
from fxzero.graph.swap_ops import is_wait as is_swap_wait

Pair = tuple[fx.Node, fx.Node]

_UPDATED = tuple(kind for kind in STATE_KINDS if kind != "buffer")


def required_order(step: StepGraph) -> Iterator[Pair]:
    """(earlier, later) for each pair of calls whose order matters, beside what the other rules know."""
    yield from gathers_in_turn(step)
    yield from reads_before_writes(step)
    yield from reads_before_writes_in_place(step)


def gathers_in_turn(step: StepGraph) -> Iterator[Pair]:
    """(the release that ends a gather, the launch of the parameter's next one, for the next program too)."""
    ends: dict[fx.Node, fx.Node] = {}
    for release in filter(c10d.is_release, step.calls()):
        for value in release.args[0]:  # type: ignore[union-attr]
            if wait := _gathered_by(value):  # type: ignore[arg-type]
                ends[wait] = release
    last: dict[fx.Node, fx.Node] = {}
    for wait in step.calls(c10d.wait):
        if wait not in ends or (parameter := c10d.parameter_sent(c10d.sent_to(wait))) is None:
            continue
        if parameter in last:
            yield ends[last[parameter]], c10d.launched_by(wait)
        last[parameter] = wait
    waits = {parameter.meta["entry"].name: wait for parameter, wait in last.items()}
    for launch, names in c10d.launched_for_next(step).items():
        yield from ((ends[waits[name]], launch) for name in names if name in waits)


def _gathered_by(value: fx.Node) -> fx.Node | None:
    """The wait of the gather that a released value comes from."""
    while not c10d.is_wait(value):
        if value.op != "call_function" or not value.all_input_nodes:
            return None
        value = value.all_input_nodes[0]
    return value


def reads_before_writes(step: StepGraph) -> Iterator[Pair]:
    """(a call that reads the old value of state, the call that makes its next value); numbers may be copied.

    So may buffers: where backward computes a norm again, it reads the running statistics from before forward.
    """
    inputs = {node.meta["entry"].key: node for node in step.inputs(*_UPDATED)}
    for key, value in step.results.items():
        state = inputs.get(key)
        if state is None or value is state or is_view(value) or not yields_tensor(value) or not tensor_val(value).dim():
            continue
        # what a move stores lies in its home from the launch on
        made = value.all_input_nodes[0] if is_swap_wait(value) or is_getitem(value) else value
        for alias in (state, *iter_views(state)):
            for reader in alias.users:
                if reader.op != "output" and reader not in (made, value):
                    yield done_with(reader), made


def late(step: StepGraph, position: dict[fx.Node, int]) -> dict[tuple[str, str], Pair]:
    """Names of the pairs of `required_order` that a program turns around -> the pair."""
    pairs = ((a, b) for a, b in required_order(step) if position[a] > position[b])
    return {(a.name, b.name): (a, b) for a, b in pairs}
