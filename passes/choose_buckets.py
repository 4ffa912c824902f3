"""Which gathers and reductions share a launch, and which parameters stay gathered, is decided by what it costs.

Nothing moves here: each launch learns the number of its bucket (`meta["bucket"]`), or that it is left out
(`meta["stays"]`), and the passes behind this one do the rest. docs/schedule.md says how it is decided.
"""

from __future__ import annotations

from fxzero.cost.hardware import hardware_of
from fxzero.cost.memory import memory_timeline
from fxzero.cost.tasks import step_tasks
from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.passes.bucket_all_gathers import bucket_all_gathers
from fxzero.passes.bucket_reduce_scatters import bucket_reduce_scatters
from fxzero.passes.keep_gathered import keep_gathered
from fxzero.passes.place_updates import place_updates
from fxzero.passes.prefetch_all_gathers import prefetch_all_gathers
from fxzero.schedule.buckets import Choice, Search, even, told
from fxzero.schedule.evaluate import peak_of
from fxzero.schedule.flow import Rules
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.problem import Problem
from fxzero.schedule.traffic import Traffic, traffic_of

SMALL_BYTES = 4 * 2**20  # of a bucket, where none that was chosen fits
_NEAR = 0.9  # of the bound: a peak below it is not counted again, call by call
_TRIES = 3


@graph_pass(requires=("gradients-reduced",), provides=("buckets-chosen",))
def choose_buckets(
    step: StepGraph,
    *,
    by_cost: bool,
    hardware: str = "auto",
    backend: str = "",
    form: str = "coalesced",
    prefetch: int = 1,
    memory_bytes: int | None = None,
    bucket_bytes: int | None = None,
    keep: bool = False,
) -> int:
    """Number the bucket of each gather and reduction so that the step takes least time by the cost model.

    Args:
        step: the graph, each gather and reduction with a launch of its own.
        by_cost: the order of the step will be found by cost; else it is the fixed one.
        hardware: name or path of a machine's description; "auto": by the graph's device.
        backend: what carries collectives, for "auto".
        form: how a bucket is launched, "coalesced" or "separate".
        prefetch: buckets that a gather goes ahead, in the fixed order.
        memory_bytes: that tensors of the device may take; None: the machine's, and nothing more to keep parameters.
        bucket_bytes: of each bucket, where that is given and only what stays gathered is decided.
        keep: parameters may stay gathered from forward to backward, where that pays.
    """
    machine = hardware_of(step, backend=backend, named=hardware)
    traffic = traffic_of(step, machine)
    if not traffic.messages:
        return 0
    limit = memory_bytes
    for _ in range(_TRIES):
        rules = Rules(by_cost, prefetch, form, limit)
        choice = Search(traffic, rules, room_bytes=machine.memory_bytes).find(given=bucket_bytes, keep=keep)
        _mark(traffic, choice)
        above = _above(step, traffic, choice, rules, memory_bytes)
        if above <= 0 or limit is None:
            break
        limit -= above
    else:
        choice = Search(traffic, rules).judge(even(SMALL_BYTES if bucket_bytes is None else bucket_bytes))
        _mark(traffic, choice)
    step.remarks["choose_buckets"] = told(traffic, choice, rules)
    return sum(len(bucket) for bucket in choice.buckets if len(bucket) > 1) + len(choice.kept)


def _mark(traffic: Traffic, choice: Choice) -> None:
    for message in traffic.messages:
        message.node.meta.pop("stays", None)
    for number, bucket in enumerate(choice.buckets):
        for index in bucket:
            for node in (traffic.messages[index].node, *traffic.messages[index].later):
                node.meta["bucket"] = number
    for index in choice.kept:
        traffic.messages[index].node.meta["stays"] = True


def _above(step: StepGraph, traffic: Traffic, choice: Choice, rules: Rules, memory_bytes: int | None) -> int:
    """Bytes above the bound of the program with these buckets, counted call by call where the estimate is near it."""
    if memory_bytes is None or choice.flow.peak_bytes < _NEAR * memory_bytes:
        return 0
    trial = step.copy()
    keep_gathered.run(trial)
    bucket_all_gathers.run(trial, bucket_bytes=None, form=rules.form)
    bucket_reduce_scatters.run(trial, bucket_bytes=None, form=rules.form)
    if rules.by_cost:
        problem = Problem.of(trial, step_tasks(trial, traffic.hardware))
        return peak_of(problem, least_memory_order(problem)) - memory_bytes
    prefetch_all_gathers.run(trial, distance=rules.prefetch)
    place_updates.run(trial)
    return int(memory_timeline(trial).total.max()) - memory_bytes
