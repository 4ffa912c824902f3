"""A lowered step graph, ready to run: one Python function, whose errors name the node they come from."""

from __future__ import annotations

import contextlib
import linecache
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph
from fxzero.lower.lower_regions import Lowered
from fxzero.runtime.emitter import Emitter

RunFunction = Callable[[list[Any]], tuple[Any, ...]]


class Program:
    """A step graph, ready to run on this rank.

    Args:
        step: the final graph.
        groups: mesh axis -> the process group that carries it.
        swapper: what moves tensors off the device and back, where the graph does.
        lowered: the functions of its regions; None: each call runs by itself.
        name: where tracebacks say that they are.

    Attributes:
        entries: what the inputs are, in order.
        outputs: what `run` returns, in order: the loss, metrics, and state that is a Python number.
        body: the graph that `lowered` has the regions of.
        source: the Python text; ops in place end with an underscore.
    """

    def __init__(
        self,
        step: StepGraph,
        *,
        groups: Mapping[str, Any],
        swapper: Any = None,
        lowered: Lowered | None = None,
        name: str = "step",
    ) -> None:
        self.step = self.body = step
        self.entries = [node.meta["entry"] for node in step.placeholders]
        self.groups = dict(groups)
        self.swapper = swapper
        self.lowered = lowered
        self._emitter = Emitter(step, self.groups, swapper, self.lowered)
        self.source = self._emitter.text()
        self.outputs = self._emitter.outputs
        self.file = f"<fxzero {name} {id(self):x}>"
        self._function = _load(self._emitter, self.source, self.file)

    @contextlib.contextmanager
    def written_by(
        self, emitter: Emitter, around: Callable[[RunFunction], RunFunction] = lambda function: function
    ) -> Iterator[None]:
        """Within the block the same graph runs as another emitter writes it.

        Args:
            emitter: of this program's step, groups and swapper.
            around: what is made of the function that it has written.
        """
        before = self._emitter, self.file, self._function
        self._emitter, self.file = emitter, f"{self.file[:-1]}, {type(emitter).__name__}>"
        self._function = around(_load(emitter, emitter.text(), self.file))
        try:
            yield
        finally:
            linecache.cache.pop(self.file, None)
            self._emitter, self.file, self._function = before

    def run(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Run the step; writes parameters, buffers and optimizer state in place.

        Args:
            inputs: one value an entry; the list is emptied, so that a caller that keeps no reference frees memory.
        """
        with torch.no_grad():
            try:
                return self._function(inputs)
            except Exception as error:
                self._explain(error)
                raise

    def node_of(self, error: BaseException) -> fx.Node | None:
        """The call of the graph at which an error has surfaced in the program; None where it did elsewhere."""
        found, frame = None, error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == self.file:
                found = self._emitter.line_nodes.get(frame.tb_lineno, found)
            frame = frame.tb_next
        return found

    def _explain(self, error: Exception) -> None:
        """Add the node of the graph to an error that surfaces in the program."""
        node = self.node_of(error)
        if node is not None and hasattr(error, "add_note"):
            error.add_note(f"fxzero: in {node.meta['phase']} of {place_of(node)}, node %{node.name}: {node.target}")


def place_of(node: fx.Node) -> str:
    """The module that a call belongs to, as errors name it."""
    return str(node.meta.get("module") or "the model")


def _load(emitter: Emitter, source: str, file: str) -> RunFunction:
    """The function of a source, whose lines tracebacks can show."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = dict(emitter.names)
    exec(compile(source, file, "exec"), scope)
    return scope["run"]
