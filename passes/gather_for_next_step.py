"""The first gathers of a step are launched by the step before it, right behind the updates of what they gather.

[Note: carried over the end of a step]
At the start of a step nothing is there to hide its first gathers, and behind its last updates nothing is left to do. So
the program launches them for the next one: what it returns for the parameter is a gather under way, of kind "launched",
and an input of that kind stands for it in the next program, which waits for it where it first reads the parameter. In
between lie the rest of the updates, the loader of data, and what the ranks have to agree on. The launch stands in the
program of the step that it follows, the wait in the program that needs it: so each is where time is won or lost.
A parameter that is not trained is gathered from its rows as they are.

What is carried: in the fixed order, what a step launches before its first wait, as many gathers as are on their way
then in any case, which `prefetch` says. Where costs decide: what forward would wait for. If its lane gathers one
parameter after the other from the step's beginning on, as fast as it does beside compute, a gather that is not there
when compute comes to its reader is carried, and the lane goes on with the next one.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxzero.cost.contention import Lanes
from fxzero.cost.hardware import Hardware, hardware_of
from fxzero.cost.memory import memory_timeline
from fxzero.cost.tasks import step_tasks
from fxzero.graph import StateEntry, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.lanes import COMPUTE
from fxzero.graph.step_graph import CARRIED_KINDS, LAUNCHED, first_argument, identifier, is_getitem


@graph_pass(requires=("updates-placed", "parameters-sharded"), provides=("gathers-carried",))
def gather_for_next_step(
    step: StepGraph, *, memory_bytes: int | None = None, hardware: str | None = None, backend: str = ""
) -> int:
    """Launch gathers that forward begins with in the step before; [Note: carried over the end of a step].

    Of several microbatches the first one's program waits for what the last one's has launched.

    Args:
        step: the graph.
        memory_bytes: that tensors of the device may take, state included: as many of these gathers are carried, from
            the first on, as the peak allows. None: all.
        hardware: name or path of the machine whose costs say what is carried, "auto": the device's; None: no costs.
        backend: what carries collectives, for "auto".
    """
    if hardware is None:
        launches = _first_launches(step)
    else:
        launches = _late_launches(step, hardware_of(step, backend=backend, named=hardware))
    if memory_bytes is not None:
        launches = launches[: _how_many_fit(step, launches, memory_bytes)]
    return _carry(step, launches)


def _how_many_fit(step: StepGraph, launches: list[fx.Node], memory_bytes: int) -> int:
    """How many launches, from the first on, keep the peak within a bound, or no higher than it is."""
    names = [launch.name for launch in launches]
    most = max(memory_bytes, int(memory_timeline(step).total.max()))
    fitting, too_many = 0, len(names) + 1
    while too_many - fitting > 1:
        count = (fitting + too_many) // 2
        tried = step.copy()
        _carry(tried, [node for node in tried.calls() if node.name in names[:count]])
        if int(memory_timeline(tried).total.max()) <= most:
            fitting = count
        else:
            too_many = count
    return fitting


def _late_launches(step: StepGraph, machine: Hardware) -> list[fx.Node]:
    """The gathers of forward that would not be there in time if each were launched in this step."""
    tasks = step_tasks(step, machine)
    clock = 0.0
    lanes = Lanes(machine.slowdown, machine.hindrance)  # with what is gathered in this step
    found: dict[fx.Node, bool] = {}  # launch -> whether it would be late
    for node in step.calls():
        if node.meta["phase"] != "forward":
            continue
        if c10d.is_wait(node) and c10d.gathers_parameters(launch := c10d.launched_by(node)) and launch not in found:
            lane, seconds = tasks[launch].resource, tasks[launch].seconds
            found[launch] = lanes.free(lane) + seconds * machine.hindrance(lane) > clock
            if not found[launch]:
                lanes.occupy(lane, 0.0, seconds)
        if tasks[node].resource == COMPUTE:
            clock = lanes.end_of(clock, tasks[node].seconds)
    return [launch for launch, late in found.items() if late]


def _first_launches(step: StepGraph) -> list[fx.Node]:
    """The gathers of parameters that forward launches before it waits for the first of them."""
    launches: list[fx.Node] = []
    for node in step.calls():
        if c10d.is_wait(node) and c10d.launched_by(node) in launches:
            break
        if node.meta["phase"] == "forward" and c10d.gathers_parameters(node):
            launches.append(node)
    return launches


def _carry(step: StepGraph, launches: list[fx.Node]) -> int:
    if step.phase("update"):
        position = step.positions()
        ends = {wait: release for release, wait in _releases(step)}
        results = step.results
        for launch in launches:
            _launch_next(step, launch, position, ends, results)
        step.set_results(results)
    if not step.inputs(*CARRIED_KINDS):  # else an earlier microbatch's program begins the step
        for launch in launches:
            _wait_for_last(step, launch)
    return len(launches)


def _releases(step: StepGraph) -> list[tuple[fx.Node, fx.Node]]:
    """(release, wait of the gather that it ends), as far as these stand side by side in the graph."""
    return [(node, value) for node in step.calls() if c10d.is_release(node) for value in node.all_input_nodes]


def _launch_next(
    step: StepGraph,
    launch: fx.Node,
    position: dict[fx.Node, int],
    ends: dict[fx.Node, fx.Node],
    results: dict[tuple[str, str], fx.Node],
) -> None:
    """Launch a gather again for the next step, once all that it gathers has its next value."""
    parameters = [_parameter(source) for source in c10d.sent(launch)]
    names = [parameter.meta["entry"].name for parameter in parameters]
    values = [results.get(("parameter", name), parameter) for name, parameter in zip(names, parameters, strict=True)]
    gathered = [wait for wait in ends if c10d.is_wait(wait) and c10d.parameter_sent(c10d.sent_to(wait)) in parameters]
    behind = max([*values, *(ends[wait] for wait in gathered)], key=lambda node: position.get(node, -1))
    editor = Editor(step, phase="update", module=launch.meta["module"])
    with editor.after(behind):
        sources = [_sent_like(editor, source, value) for source, value in zip(c10d.sent(launch), values, strict=True)]
        coalesced = c10d.TABLE[launch.target].coalesced
        editor.meta = {key: launch.meta[key] for key in ("module", "param", "algorithm") if key in launch.meta}
        editor.meta["phase"] = "update"
        taken: Any = sources if coalesced else sources[0]
        gather: Any = launch.target
        ahead = editor.call(gather, taken, *launch.args[1:], name=f"{launch.name}_next")
        for index, name in enumerate(names):
            part = ahead
            if coalesced:
                part = editor.call(operator.getitem, ahead, index, name=f"{identifier(name)}_next")
            results[(LAUNCHED, name)] = part


def _sent_like(editor: Editor, source: fx.Node, value: fx.Node) -> fx.Node:
    """What `source` makes of a parameter, made of its next value."""
    if source.op == "placeholder":
        return value
    taken = _sent_like(editor, first_argument(source), value)
    sharding = source.meta.get("sharding")
    prepares: Any = source.target
    return editor.call(
        prepares, taken, *source.args[1:], sharding=sharding, name=f"{source.name}_next", **source.kwargs
    )


def _wait_for_last(step: StepGraph, launch: fx.Node) -> None:
    """Let the waits for a gather wait for an input instead, which the step before has launched."""
    for index, source in enumerate(c10d.sent(launch)):
        part = _getitem(launch, index) if c10d.TABLE[launch.target].coalesced else launch
        entry = _parameter(source).meta["entry"]
        with step.graph.inserting_after(step.placeholders[-1]):
            node = step.graph.placeholder(f"{identifier(entry.name)}_launched")
        node.meta = {"phase": "forward", "module": launch.meta["module"], "val": part.meta["val"]}
        node.meta["entry"] = StateEntry(LAUNCHED, entry.name, entry.shape)
        if "algorithm" in launch.meta:
            node.meta["algorithm"] = launch.meta["algorithm"]
        part.replace_all_uses_with(node)
        if part is not launch:
            step.graph.erase_node(part)
    sources = c10d.sent(launch)
    step.graph.erase_node(launch)
    for source in sources:
        while source.op != "placeholder" and not source.users:
            unused, source = source, first_argument(source)
            step.graph.erase_node(unused)


def _parameter(source: fx.Node) -> fx.Node:
    parameter = c10d.parameter_sent(source)
    assert parameter is not None, f"{source} is no parameter"
    return parameter


def _getitem(launch: fx.Node, index: int) -> fx.Node:
    return next(user for user in launch.users if is_getitem(user) and user.args[1] == index)
