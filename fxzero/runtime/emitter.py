"""The text of a program: a scheduled step graph as one Python function that frees every tensor at its last use.

Compiled regions are single calls in it; all other ops are called one by one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.blocked_runs import BlockedRun, block_elements, blocked_runs
from fxzero.graph.shift_op import launch_shift
from fxzero.graph.step_graph import CALL_RESULTS, STATE_KINDS, device_of, first_argument, yields_tensor
from fxzero.graph.storage import InPlace
from fxzero.lower.lower_regions import Lowered, LoweredRegion
from fxzero.runtime import gloo, pending, send_recv, shared_memory, shared_rows
from fxzero.runtime.one_host import channel_key
from fxzero.runtime.swap_lines import SWAPPER_METHODS, SwapLines

FIRST_TAG_AHEAD = 2**20  # of messages that are under way from one program to the next, beside the next one's own


def _with_grad_mode(op: Any) -> Any:
    """An op that, without grad mode, leaves out what its backward op needs: the program runs without."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return op(*args, **kwargs)

    return call


_READS_GRAD_MODE = {torch.ops.aten.mkldnn_rnn_layer.default: _with_grad_mode(torch.ops.aten.mkldnn_rnn_layer.default)}


def in_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same elements of contiguous tensors of one shape, block after block."""
    return zip(*(tensor.view(-1).split(block_elements()) for tensor in tensors), strict=True)


class Emitter:
    """Writes the source, line by line.

    Attributes:
        names: what the source knows beside Python's own.
        lines: so far.
        line_nodes: number of a line, from 1 -> the call that stands there.
    """

    def __init__(
        self,
        step: StepGraph,
        groups: Mapping[str, Any],
        swapper: Any,
        lowered: Lowered | None = None,
    ) -> None:
        self.step = step
        self.groups = groups
        self.region_at = {n: region for region in lowered.regions.values() for n in region.calls} if lowered else {}
        self.ops = lowered.ops if lowered else {}
        self.names: dict[str, Any] = {f"swap_{name}": getattr(swapper, name, None) for name in SWAPPER_METHODS}
        self.constants: dict[int, str] = {}
        self.lines: list[str] = []
        self.line_nodes: dict[int, fx.Node] = {}
        self.in_place = InPlace(step)
        self.outputs: list[tuple[str, str]] = []
        self.position = self.in_place.position
        self.swaps = SwapLines(step, self.in_place)
        self.copies = self._copies()
        self.aside = self._set_aside()
        self.messages = 0
        self.ahead = c10d.launched_for_next(step)
        self.device = device_of(step)
        runs = blocked_runs(step, self.in_place, device=self.device)
        self.run_of = {node: run for run in runs for node in run.nodes if run.nodes[-1] not in self.region_at}
        self.indent = "    "
        self.block_names: dict[fx.Node, str] = {}

    def text(self) -> str:
        """The source."""
        inputs = "".join(f"{node.name}, " for node in self.step.placeholders)
        self.lines = ["def run(inputs):", f"    ({inputs}) = inputs", "    inputs.clear()"]
        dying = self._dying()
        written: set[fx.Node] = set()
        for first in self.step.graph.nodes:
            if first in written:
                continue
            run, region = self.run_of.get(first), self.region_at.get(first)
            nodes = region.calls if region is not None else (first,) if run is None else run.nodes
            written.update(nodes)
            if region is not None:
                left = self.region(region, [name for node in nodes for name in dying.pop(node, ())])
                dying[nodes[-1]] = left
            elif run is not None:
                self.blocked(run)
            elif first.op == "call_function":
                self.call(first)
            for node in nodes:
                for line in (*self.copies.get(node, ()), *self.swaps.after(node)):
                    self.lines.append(f"    {line}")
            names = [name for node in nodes if node.op != "output" for name in dying.get(node, ())]
            if names:
                self.lines.append(f"    del {', '.join(names)}")
        returned = []
        for key, node in self.step.results.items():
            if key[0] not in STATE_KINDS or not yields_tensor(node):
                self.outputs.append(key)
                returned.append(self.aside.get(node, node.name))
        self.lines.append(f"    return ({''.join(f'{name}, ' for name in returned)})")
        return "\n".join(self.lines) + "\n"

    def blocked(self, run: BlockedRun) -> None:
        """Write the lines of a run: a loop over blocks ([Note: blocked runs])."""
        for node in run.before:
            self.call(node)
        self.block_names = {source: f"{source.name}_block" for source in run.taken}
        names = "".join(f"{name}, " for name in self.block_names.values())
        taken = ", ".join(source.name for source in run.taken)
        self.lines.append(f"    for {names}in {self._bind('in_blocks', in_blocks)}({taken}):")
        self.indent = "        "
        for node in run.calls:
            Emitter.call(self, node)
        self.indent = "    "
        self.block_names = {}
        whole = {self.in_place.storage.get(source, source): source.name for source in run.taken}
        for node in run.calls:
            if any(user not in run.calls for user in node.users):
                self.lines.append(f"    {node.name} = {whole[self.in_place.storage[node]]}")
        self.lines.append(f"    del {names.rstrip(', ')}")

    def region(self, lowered: LoweredRegion, dying: list[str]) -> list[str]:
        """Write the lines of a region: its inputs, after the sizes that it is open for, go into a list and die with it.

        Args:
            lowered: the region and what runs it.
            dying: variables that nothing needs after it.

        Returns:
            Those of them that are there still.
        """
        form, calls = lowered.form, set(lowered.calls)
        inputs = ", ".join([*map(str, lowered.sizes), *(self._region_input(node) for node in form.inputs)])
        self.lines.append(f"    values = [{inputs}]")
        read_after = {name for node in calls for line in self.copies.get(node, ()) for name in re.findall(r"\w+", line)}
        kept = self._returned_names | read_after
        named = {
            source.name: node
            for source, node in form.written.items()
            if node.name in kept or any(user.op != "output" and user not in calls for user in node.users)
        }
        stay = read_after | {*named}
        handed = [node.name for node in form.inputs if node.name in dying and node.name not in stay]
        if handed:
            self.lines.append(f"    del {', '.join(handed)}")
        returned = "".join(f"{node.name}, " for node in form.outputs)
        function = self._bind(lowered.name, lowered.function)
        self.lines.append(f"    {f'({returned}) = ' if returned else ''}{function}(values)")
        self.line_nodes[len(self.lines)] = lowered.calls[-1]
        self.lines += [f"    {node.name} = {source}" for source, node in named.items()]
        inside = {node.name for node in calls} - {node.name for node in (*form.outputs, *named.values())}
        return [name for name in dying if name not in inside and name not in handed]

    def _region_input(self, node: fx.Node) -> str:
        """What a region takes for a node: numbers of the host as 0-dim tensors of the widest dtype."""
        if yields_tensor(node):
            return node.name
        number = self._bind("number", torch.tensor)
        double, long = self._bind("float64", torch.float64), self._bind("int64", torch.int64)
        return f"{number}({node.name}, dtype={long if isinstance(node.meta['val'], int) else double})"

    def call(self, node: fx.Node) -> None:
        """Write the line of one call."""
        if c10d.is_release(node):
            return  # the memory goes with the last reference, which this node has
        target: Any = self.ops.get(node, self.in_place.forms.get(node, node.target))
        args = [self._argument(a) for a in node.args]
        if node in self.swaps:
            self.lines.append(f"    {self.swaps.line(node, args)}")
            self.line_nodes[len(self.lines)] = node
            return
        if c10d.is_collective(node):
            target, args = self.collective(node, args)
        elif c10d.is_wait(node) and c10d.carrier_of(c10d.launched_by(node)):
            target = pending.wait
        args += [f"{key}={self._argument(value)}" for key, value in node.kwargs.items()]
        self.lines.append(f"{self.indent}{node.name} = {self._op(target)}({', '.join(args)})")
        self.line_nodes[len(self.lines)] = node

    def collective(self, node: fx.Node, args: list[str]) -> tuple[Any, list[str]]:
        """The call that launches a collective on this rank's groups."""
        position, axis = c10d.TABLE[node.target].axis_arg, c10d.axis_of(node)
        group, carrier = self.groups[axis], c10d.carrier_of(node)
        if carrier is None:
            args[position] = repr(str(group.group_name))
            if node.target is c10d.shift:
                return launch_shift, args
            return gloo.launcher_of(node.target) if gloo.carries(group, self.device) else node.target, args
        self.messages += 1
        tag = self.messages + (FIRST_TAG_AHEAD if node in self.ahead else 0)
        is_gather = node.target is c10d.all_gather
        if carrier in c10d.IN_MEMORY:
            args[position] = self._bind(f"channel_{axis}", self.groups[channel_key(axis)])
            if carrier == c10d.SHARED_ROWS:
                return shared_rows.launch_gather, [*args, str(tag), repr(c10d.sent(node)[0].meta["entry"].name)]
            launch = shared_memory.launch_all_gather if is_gather else shared_memory.launch_reduce_scatter
            return launch, [*args, str(tag)]
        args[position] = self._bind(f"group_{axis}", group)
        gather = send_recv.launch_all_gather_ahead if node in self.ahead else send_recv.launch_all_gather
        return gather if is_gather else send_recv.launch_reduce_scatter, [*args, str(tag)]

    def _bind(self, name: str, value: Any) -> str:
        self.names[name] = value
        return name

    def _op(self, target: Any) -> str:
        if compat.is_op(target):
            name = target.name().replace("::", "_").replace(".", "_")
        else:
            name = f"py_{getattr(target, '__name__', 'call')}"
        call = _READS_GRAD_MODE.get(target, target)
        while name in self.names and self.names[name] != call:
            name += "_"
        self.names[name] = call
        return name

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.block_names.get(value, value.name)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self._argument(item) for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        name = str(value).replace(".", "_").replace(":", "_").replace("-", "minus_")
        name = "const_" + "".join(c if c.isidentifier() or c.isdigit() else "_" for c in name)
        while name in self.names and self.names[name] != value:
            name += "_"
        self.names[name] = value
        return name

    def _copies(self) -> dict[fx.Node, list[str]]:
        """Node -> lines to run after it: results that did not come to stand in their state's memory.

        A result that stands in the memory of another state is set aside first: that state may be written before.
        """
        out: dict[fx.Node, list[str]] = {}
        nodes = list(self.step.graph.nodes)
        inputs = {node.meta["entry"].key: node for node in self.step.inputs(*STATE_KINDS)}
        for key, node in self.step.results.items():
            state = inputs.get(key)
            if state is None or not yields_tensor(node) or self.in_place.storage[node] is state:
                continue
            if node in self.swaps and first_argument(node) in self.swaps.stores:
                continue
            source = node.name
            if self._stands_in_state(node):
                source = f"{node.name}_for_{state.name}"
                out.setdefault(node, []).append(f"{source} = {node.name}.clone()")
            last = max(self.in_place.last_reading(state), self.position[node])
            last = min(last, len(nodes) - 2)  # not behind the output
            out.setdefault(nodes[last], []).append(f"{state.name}.copy_({source})")
        for lines in out.values():
            lines.sort(key=lambda line: ".copy_(" in line)  # what is set aside comes first
        return out

    def _set_aside(self) -> dict[fx.Node, str]:
        """Returned values that stand in a state's memory, which the step will have written: node -> their copy.

        A graph that a loop of the user's own calls writes no state, and hands on its inputs as they are.
        """
        aside: dict[fx.Node, str] = {}
        for key, node in self.step.results.items():
            returned_as_copy = key[0] not in (*STATE_KINDS, *CALL_RESULTS) and yields_tensor(node)
            if returned_as_copy and self._stands_in_state(node):
                aside[node] = f"{node.name}_returned"
                self.copies.setdefault(node, []).insert(0, f"{aside[node]} = {node.name}.clone()")
        return aside

    def _stands_in_state(self, node: fx.Node) -> bool:
        root = self.in_place.storage[node]
        return root.op == "placeholder" and root.meta["entry"].kind in STATE_KINDS

    @functools.cached_property
    def _returned_names(self) -> set[str]:
        """The variables that the program returns."""
        return {
            self.aside.get(node, node.name)
            for key, node in self.step.results.items()
            if key[0] not in STATE_KINDS or not yields_tensor(node)
        }

    def _dying(self) -> dict[fx.Node, list[str]]:
        """Node -> names of variables that nothing needs after it."""
        kept = self._returned_names
        last: dict[str, fx.Node] = {}
        for node in self.step.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "call_function" and not c10d.is_release(node):
                last[node.name] = node
            for source in node.all_input_nodes:
                last[source.name] = node
            if node in self.swaps.stores:
                last[self.swaps.stores[node].name] = node
            for line in self.copies.get(node, ()):
                for name in re.findall(r"\w+", line.replace(".copy_", " ").replace(".clone", " ")):
                    last[name] = node
        out: dict[fx.Node, list[str]] = {}
        for name, node in last.items():
            if name not in kept:
                out.setdefault(node, []).append(name)
        return out
