"""A program whose part on the device is captured as one CUDA graph at its second run, and replayed from then on.

[Note: a step in one graph]
The first run is an ordinary one: it trains, and is the warm-up that libraries, kernels and communicators need. Before
the second one the device's part is captured, which executes nothing, and is then replayed: a step is computed once.

What a replay reads stands at the addresses of the capture. A batch is copied into tensors of the graph's own. Numbers
of the host are computed first ([Note: numbers by address] in `graph/host_side.py`) and sent to theirs. Parameters,
buffers and optimizer state are read and written where they rest: before each replay their addresses are compared, and
where one has moved (a user has replaced the tensor) the part is captured again. The tensors that a graph was captured
with are kept, so that no other one comes to stand at their addresses. Loss and metrics are copied, since the next
replay writes over them. Dropout draws from torch's own generator, which CUDA graphs advance with each replay.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxzero.errors import FxzeroError, LoweringError
from fxzero.graph import StepGraph, ops
from fxzero.graph.host_side import NUMBER, split_at_numbers
from fxzero.lower.lower_regions import Lowered
from fxzero.runtime.cuda_graph import Captured, GraphCalls, Values
from fxzero.runtime.program import Program, place_of

log = logging.getLogger("fxzero")

Key = tuple[str, str]
Given = Mapping[Key, Any]


class GraphedProgram:
    """A step graph, ready to run on this rank as one CUDA graph; stands where a `Program` does.

    Args:
        step: the final graph, with its numbers handed over.
        groups: mesh axis -> the process group that carries it.
        lower: makes functions of the regions of the device's part.
        calls: of the device.

    Attributes:
        entries: what the inputs are, in order.
        outputs: what `run` returns, in order.
        source: the Python texts of the host's part and the device's.
        body: the device's part.
        lowered: its regions.
        captured_at: the run at which the graph in use was captured; 0: there is none yet.
        num_replays, num_captures: so far.
    """

    def __init__(
        self,
        step: StepGraph,
        *,
        groups: Mapping[str, Any],
        lower: Callable[[StepGraph], Lowered | None],
        calls: GraphCalls,
    ) -> None:
        self.step = step
        self.entries = [node.meta["entry"] for node in step.placeholders]
        host, device = split_at_numbers(step)
        self.body, self.lowered = device, lower(device)
        self._host = Program(host, groups={}, name="numbers of a step")
        self._device = Program(device, groups=groups, lowered=self.lowered)
        self.source = f"# numbers of the host\n{self._host.source}\n# captured as one graph\n{self._device.source}"
        self.outputs = [key for key in self._host.outputs if key[0] != NUMBER] + self._device.outputs
        self._calls = calls
        self._numbers = Numbers(step, calls)
        self._captured: _Captured | None = None
        self._num_runs = 0
        self.captured_at = self.num_replays = self.num_captures = 0

    def run(self, inputs: list[Any]) -> Values:
        """Run the step; writes parameters, buffers and optimizer state in place.

        Args:
            inputs: one value an entry; the list is emptied.

        Raises:
            LoweringError: naming the call that a CUDA graph cannot hold; nothing has run then.
        """
        given = {entry.key: value for entry, value in zip(self.entries, inputs, strict=True)}
        inputs.clear()
        self._num_runs += 1
        if self._num_runs > 1:
            self._make_ready(given)
        of_host = self._run_host(given)
        if self._captured is None:
            return *of_host, *map(_copied, self._device.run(self._inputs(given)))
        for key, tensor in self._captured.batch.items():
            tensor.copy_(given[key], non_blocking=True)
        self._captured.graph.replay()
        self.num_replays += 1
        return *of_host, *map(_copied, self._captured.graph.values)

    def status(self) -> str:
        """What a report says of it."""
        if self._captured is None:
            return "one CUDA graph, to be captured at call 2"
        again = f", captured {self.num_captures} times" if self.num_captures > 1 else ""
        pool = f"{self._calls.pool_bytes() / 2**20:,.2f} MiB"
        return f"one CUDA graph, captured at call {self.captured_at}{again}, {self.num_replays} replays, pool {pool}"

    def _run_host(self, given: Given) -> list[Any]:
        """Compute and send the numbers of a step; returns what else the host's part returns."""
        values = self._host.run([given[entry.key] for entry in self._host.entries])
        named = dict(zip(self._host.outputs, values, strict=True))
        self._numbers.send({name: value for (kind, name), value in named.items() if kind == NUMBER})
        return [value for (kind, _), value in named.items() if kind != NUMBER]

    def _inputs(self, given: Given) -> list[Any]:
        """What the device's part takes: numbers at their address, all else as it is given."""
        tensors = self._numbers.tensors
        return [
            tensors[e.name] if e.kind == "constant" and e.name in tensors else given[e.key]
            for e in self._device.entries
        ]

    # ---- capture

    def _make_ready(self, given: Given) -> None:
        """Capture, unless there is a graph of what is given."""
        if self._captured is not None:
            moved = self._captured.moved(given)
            if moved is None:
                return
            log.info("fxzero: the CUDA graph is captured again: %s is another tensor than before", " ".join(moved))
            self._captured = None  # first of all, so that its memory is free
        self._captured = self._capture(given)
        self.captured_at = self._num_runs
        self.num_captures += 1

    def _capture(self, given: Given) -> _Captured:
        batch = {key: torch.empty_like(value) for key, value in given.items() if _is_batch(key, value)}
        keys = [entry.key for entry in self._device.entries if entry.key in given]
        read = {key: given[key] for key in keys if key not in batch}
        taken = self._inputs({**given, **batch})
        try:
            graph = self._calls.capture(lambda: self._device.run(list(taken)))
        except FxzeroError:
            raise
        except Exception as error:
            raise self._not_captured(error) from error
        return _Captured(graph, batch, read, {key: _address(value) for key, value in read.items()})

    def _not_captured(self, error: BaseException) -> LoweringError:
        """The error of a call that a graph cannot hold; the end of a capture may have failed in its wake."""
        first: BaseException = error
        node = self._device.node_of(first)
        while node is None and first.__context__ is not None:
            first = first.__context__
            node = self._device.node_of(first)
        place = f"%{node.name}, {node.meta['phase']} of {place_of(node)}" if node is not None else "the step"
        got = f"{type(first).__name__}: {str(first).partition(chr(10))[0]}"
        fix = "take the call out of the step, or set cuda_graph=False"
        return LoweringError.of(f"CUDA graph, {place}", expected="calls that can be captured", got=got, fix=fix)


@dataclass(frozen=True)
class _Captured:
    """A graph, and what it stands on.

    Args:
        graph: of the device's part.
        batch: key -> the tensor that the batch is copied to.
        read: key -> what else it takes, as it was captured.
        addresses: of these.
    """

    graph: Captured
    batch: Mapping[Key, torch.Tensor]
    read: Mapping[Key, Any]
    addresses: Mapping[Key, Any]

    def moved(self, given: Given) -> Key | None:
        """The first key whose value is no longer where it was, or another number."""
        for key, before in self.read.items():
            now = given[key]
            if _address(now) != self.addresses[key] or (now is not before and _layout(now) != _layout(before)):
                return key
        return None


class Numbers:
    """The 0-dim tensors through which a step's numbers come to the device, two memory blocks for all of them.

    Args:
        step: with its numbers handed over.
        calls: of the device.

    Attributes:
        tensors: name of an `on_device` call -> its tensor; each begins at a multiple of 16 bytes, as kernels like it.
    """

    def __init__(self, step: StepGraph, calls: GraphCalls) -> None:
        self._calls = calls
        self.tensors: dict[str, torch.Tensor] = {}
        self._blocks: list[tuple[list[str], torch.Tensor]] = []
        names: defaultdict[torch.dtype, list[str]] = defaultdict(list)
        for node in step.calls(ops.on_device):
            names[node.meta["val"].dtype].append(node.name)
        for dtype, group in names.items():
            memory = torch.zeros(len(group), 2, dtype=dtype, device=calls.device)
            self._blocks.append((group, memory))
            self.tensors |= {name: memory[index, 0] for index, name in enumerate(group)}

    def send(self, values: Mapping[str, float]) -> None:
        """Let the tensors hold these from here on."""
        for names, memory in self._blocks:
            self._calls.send([number for name in names for number in (values[name], 0)], memory)


def _is_batch(key: Key, value: Any) -> bool:
    return key[0] == "batch" and isinstance(value, torch.Tensor)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _address(value: Any) -> Any:
    """Where a tensor begins; what is none, itself."""
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def _layout(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else type(value)
