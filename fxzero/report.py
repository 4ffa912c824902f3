"""Tables about a compiled step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from fxzero.cost.allocator import Allocator
from fxzero.cost.hardware import Hardware, hardware_of
from fxzero.cost.memory import MemoryProfile, highest_profile
from fxzero.decide import Decision
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import STATE_KINDS, num_bytes
from fxzero.graph.swap_ops import swapped_bytes
from fxzero.graph.synchronisation import synchronisations
from fxzero.lower.lower_regions import Lowered
from fxzero.pass_manager import PassRecord
from fxzero.plan import Plan
from fxzero.simulate.prediction import predict
from fxzero.simulate.summary import timeline_tables
from fxzero.simulate.timeline import SimulationError

MIB = 2**20
LARGEST = 12  # rows of what stands at the peak


def report(
    steps: Sequence[StepGraph],
    plan: Plan,
    records: Sequence[PassRecord],
    seconds: dict[str, float],
    *,
    allocator: Allocator | None = None,
    decision: Decision | None = None,
    hardware: Hardware | None = None,
    lowered: Lowered | None = None,
    shared: tuple[int, int] = (0, 0),
    graphed: str = "",
    shapes: str = "",
) -> str:
    """State, communication, memory, time, passes and compile time of a step, as text for a terminal.

    Args:
        steps: its programs, one a microbatch. Communication is that of all together, the peak that of the highest;
            state, passes and times are those of the last.
        plan: resolved.
        records, seconds: what the passes did, and how long each phase of compilation took.
        allocator: whose rules the peak follows; default: that of the graph's device.
        decision: what was decided for the last one.
        hardware: the machine that times are predicted for; default: the plan's.
        lowered: the compiled regions of the last one, where it has any.
        shared: bytes of this rank in memory that its host's ranks share: (rows of parameters, messages).
        graphed: what is known of the step's CUDA graph, where it is one.
        shapes: which sizes there were, in words.
    """
    last = steps[-1]
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.axes.items())
    several = f", {len(steps)} microbatches a step" if len(steps) > 1 else ""
    parts = [
        f"zero {plan.zero} on {mesh or 'one rank'}{several}, lowering {plan.lowering}",
        _state_table(last),
        _communication_table(steps),
        _ahead_line(last),
        memory_tables(highest_profile(steps, allocator=allocator)[1]),
        _shared_line(*shared),
        swap_table(swapped_in_step(steps)),
        _time(steps, hardware or hardware_of(last, named=plan.hardware)),
        "" if decision is None else str(decision),
        *last.remarks.values(),
        _waiting_lines(last),
        graphed,
        shapes,
        "" if lowered is None else region_table(lowered),
        _pass_table(records),
        "compiled in " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _time(steps: Sequence[StepGraph], hardware: Hardware) -> str:
    try:
        return timeline_tables(predict(steps, hardware))
    except SimulationError as error:
        return f"the time of the step is not predicted: {error}"


def _mib(num: float) -> str:
    return f"{num / MIB:,.2f}"


def _state_table(step: StepGraph) -> str:
    rows = []
    for kind in STATE_KINDS:
        nodes = step.inputs(kind)
        sharded = [n for n in nodes if "sharding" in n.meta or n.meta.get("placements")]
        here = sum(num_bytes(n.meta["val"]) for n in nodes)
        whole = sum(_whole_bytes(n) for n in nodes)
        rows.append([kind, len(nodes), len(sharded), _mib(whole), _mib(here)])
    return tabulate(rows, headers=["state", "tensors", "sharded", "whole MiB", "this rank MiB"], disable_numparse=True)


def _whole_bytes(node: fx.Node) -> int:
    """Bytes of an input as one device would have it."""
    val = node.meta["val"]
    return math.prod(node.meta["entry"].shape) * val.element_size() if isinstance(val, torch.Tensor) else 0


def _communication_table(steps: Sequence[StepGraph]) -> str:
    totals: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    for step in steps:
        for node in filter(c10d.is_collective, step.calls()):
            row = totals[(node.meta["phase"], c10d.TABLE[node.target].name, c10d.axis_of(node))]
            row[0] += 1
            row[1] += num_bytes(node.meta["val"])
            row[2] += c10d.wire_bytes(node, step.mesh)
    if not totals:
        return ""
    rows = [[*key, int(n), _mib(out), _mib(wire)] for key, (n, out, wire) in totals.items()]
    rows.append(["all", "", "", int(sum(r[0] for r in totals.values())), "", _mib(sum(r[2] for r in totals.values()))])
    headers = ["phase", "collective", "axis", "per step", "output MiB", "sent MiB a rank"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _ahead_line(step: StepGraph) -> str:
    """What the step launches for the next one, which rests in between."""
    found = c10d.launched_for_next(step)
    if not found:
        return ""
    names = [name for gathered in found.values() for name in gathered]
    size = _mib(sum(num_bytes(launch.meta["val"]) for launch in found))
    return f"gathered for the next step, from the end of this one: {len(names)} parameters, {size} MiB ({names[0]}, ..)"


def memory_tables(profile: MemoryProfile) -> str:
    """The predicted peak, by kind, and the largest of what stands there, as text."""
    lines = [
        f"predicted peak {_mib(profile.peak_bytes)} MiB of tensors on this rank, {_mib(profile.state_bytes)} MiB of it "
        f"state and inputs; at %{profile.peak_node.name} ({profile.peak_node.meta.get('phase', '')} of "
        f"{profile.peak_node.meta.get('module') or 'the model'})",
        f"about {_mib(profile.reserved_bytes)} MiB taken from the device, by the rules of {profile.allocator.device}'s "
        "allocator, if it serves nothing else",
    ]
    elsewhere = {"host": profile.host_bytes, "nvme": profile.nvme_bytes}
    lines += [f"and up to {_mib(size)} MiB in tier {tier}" for tier, size in elsewhere.items() if size]
    kinds = [[kind, _mib(size), f"{size / profile.peak_bytes:.1%}"] for kind, size in profile.by_kind.items() if size]
    largest = [[s.kind, s.module, s.what, s.count, _mib(s.num_bytes)] for s in profile.grouped()[:LARGEST]]
    headers = ["largest there", "in", "what", "tensors", "MiB"]
    align = ("left", "left", "left", "right", "right")
    return "\n\n".join(
        [
            "\n".join(lines),
            tabulate(kinds, headers=["at the peak, by kind", "MiB", ""], disable_numparse=True, colalign=align[2:]),
            tabulate(largest, headers=headers, disable_numparse=True, colalign=align),
        ]
    )


def swapped_in_step(steps: Sequence[StepGraph]) -> dict[tuple[str, str], int]:
    """(tier, "out" or "in") -> bytes that all programs of a step move."""
    total: dict[tuple[str, str], int] = {}
    for step in steps:
        for key, size in swapped_bytes(step.calls()).items():
            total[key] = total.get(key, 0) + size
    return total


def swap_table(swapped: Mapping[tuple[str, str], int]) -> str:
    """What a step moves off the device and back, as text; "" where that is nothing.

    Args:
        swapped: from `swapped_in_step`.
    """
    if not swapped:
        return ""
    tiers = sorted({tier for tier, _ in swapped})
    rows = [[tier, *(_mib(swapped.get((tier, way), 0)) for way in ("out", "in"))] for tier in tiers]
    headers = ["swapped in a step", "out MiB", "in MiB"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right"))


def region_table(lowered: Lowered) -> str:
    """The distinct regions of a program, what is in them and how often each stands there, as text."""
    rows: dict[str, list[Any]] = {}
    for region in lowered.regions.values():
        first = region.calls[0].meta
        place = first["module"] or first.get("param") or ""
        row = rows.setdefault(region.name, [region.name, first["phase"], place, len(region.calls), 0])
        row[-1] += 1
    num_calls = sum(len(region.calls) for region in lowered.regions.values())
    lines = [
        f"{len(lowered.regions)} regions of {num_calls} calls in all, "
        f"{lowered.num_distinct} distinct, {lowered.num_compiled} compiled now"
    ]
    if lowered.refused:
        lines.append(f"{len(lowered.refused)} regions run op by op: {next(iter(lowered.refused.values()))}")
    by_onednn = len(lowered.ops) + sum(region.num_chosen for region in lowered.regions.values())
    if by_onednn:
        lines.append(f"{by_onednn} matrix products by oneDNN, measured to be faster here")
    headers = ["region", "phase", "first at", "calls", "times"]
    return "\n".join(lines) + "\n\n" + tabulate(rows.values(), headers=headers, disable_numparse=True)


def _shared_line(rows_bytes: int, message_bytes: int) -> str:
    """What of the peak, and what beside it, ranks of this host read of each other."""
    if not rows_bytes + message_bytes:
        return ""
    rows = f"{_mib(rows_bytes)} MiB of it, rows of parameters that gathers read in place; " if rows_bytes else ""
    return f"in memory shared with ranks of this host: {rows}beside it {_mib(message_bytes)} MiB for messages"


def _waiting_lines(step: StepGraph) -> str:
    waits = synchronisations(step)
    if not waits:
        return "the host waits for the device nowhere inside the step"
    where = {node.name: node.meta.get("module") or node.meta.get("phase", "") for node in step.calls()}
    rows = [[f"%{name}", where[name], reason] for name, reason in waits.items()]
    return tabulate(rows, headers=["the host waits for the device at", "in", "because it"], disable_numparse=True)


def _pass_table(records: Sequence[PassRecord]) -> str:
    rows = [
        [
            r.name,
            r.edits,
            ", ".join(f"{op} {n:+d}" for op, n in r.op_diff.items()),
            f"{r.seconds:.2f}",
            f"{r.verify_seconds:.2f}",
        ]
        for r in records
    ]
    return tabulate(rows, headers=["pass", "edits", "ops", "s", "verify s"], maxcolwidths=[36, None, 60, None, None])
