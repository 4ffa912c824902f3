"""Gathers that read the rows of all ranks where they rest: which may, and what has to come first.

[Note: rows side by side]
Where ranks share the memory of one host, the rows of a sharded parameter can rest side by side in memory that all map.
Its gather then copies nothing: a rank says that its rows are ready, waits for the others' word, and reads the whole
where it stands. Nobody may write his rows while others read them. Each rank has read the parameter for the last time
when it releases it; and the gradient is reduced when all ranks have launched that reduction. So it is enough that on
each rank the release comes before that launch, the meeting, and what updates the rows after its wait: all of it, since
an update that decays weights writes over them before it looks at a gradient. Between steps everything is read; and the
next step's gathers begin when the owner of the rows says so.

A parameter that no collective stands behind is written by nobody here, and might be by the user, at any time: its
gathers stay copies. One whose gradients this program hands on is written by the program that takes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import CARRIED_KINDS, StepGraph

Pair = tuple[fx.Node, fx.Node]


def gathers_in_place(step: StepGraph) -> Iterator[fx.Node]:
    """The launches of gathers that may read the rows where they rest, in the order that the program has."""
    position = step.positions()
    meetings = meetings_before_writes(step)
    for launch in step.calls(c10d.all_gather):
        parameter, release = rows_gathered(launch), release_of(launch)
        if parameter is None or parameter not in meetings or release is None:
            continue
        pairs = _in_turn(parameter, release, meetings[parameter])
        if all(position[earlier] < position[later] for earlier, later in pairs):
            yield launch


def reads_before_writes_in_place(step: StepGraph) -> Iterator[Pair]:
    """(earlier, later): the release of a reading in place and the launch of the meeting; its wait and what writes."""
    launches = [launch for launch in step.calls(c10d.all_gather) if c10d.carrier_of(launch) == c10d.SHARED_ROWS]
    meetings = meetings_before_writes(step) if launches else {}
    for launch in launches:
        parameter, release = rows_gathered(launch), release_of(launch)
        if parameter is not None and release is not None:
            yield from _in_turn(parameter, release, meetings.get(parameter))


def _in_turn(parameter: fx.Node, release: fx.Node, meeting: fx.Node | None) -> Iterator[Pair]:
    if meeting is None:
        return
    yield release, meeting
    waits = [user for part in (meeting, *meeting.users) for user in part.users if c10d.is_wait(user)]
    updates = [user for user in parameter.users if user.op == "call_function" and user.meta["phase"] == "update"]
    yield from ((waits[0], user) for user in updates if not c10d.is_collective(user))


def rows_gathered(launch: fx.Node) -> fx.Node | None:
    """The parameter of which a gather takes the rows as they rest; None where it takes something else."""
    (source,) = c10d.sent(launch)
    if source.op != "placeholder" or source.meta["entry"].kind != "parameter" or "sharding" not in source.meta:
        return None
    return source if source.meta["sharding"].axis == c10d.axis_of(launch) else None


def release_of(launch: fx.Node) -> fx.Node | None:
    """The release of what a gather yields, if it has one."""
    waits = [user for user in launch.users if c10d.is_wait(user)]
    return next((user for wait in waits for user in wait.users if c10d.is_release(user)), None)


def meetings_before_writes(step: StepGraph) -> dict[fx.Node, fx.Node | None]:
    """Sharded parameter -> the launch at which all ranks meet before it is written; None: a later program writes it.

    That is what reduces its gradient, the last launch of several. Parameters that no rank writes are left out, and so
    are those that a rank writes without having heard of the others.
    """
    results = step.results
    carried = {name for kind, name in results if kind in CARRIED_KINDS}
    reductions = {
        (node.meta.get("param"), c10d.axis_of(node)): node
        for node in step.calls()
        if c10d.is_collective(node) and not any(map(c10d.parameter_sent, c10d.sent(node)))
    }
    found: dict[fx.Node, fx.Node | None] = {}
    for parameter in step.inputs("parameter"):
        sharding, name = parameter.meta.get("sharding"), parameter.meta["entry"].name
        if sharding is None:
            continue
        meeting = reductions.get((name, sharding.axis))
        if results.get(("parameter", name), parameter) is parameter:
            found |= {parameter: None} if name in carried else {}
        elif meeting is not None:
            found[parameter] = meeting
    return found
