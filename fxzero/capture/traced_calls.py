"""What each op of a trace passes before it is recorded."""

from __future__ import annotations

from typing import Any

from fxzero import compat
from fxzero.capture.draws import RandomDraws
from fxzero.capture.scalars import ScalarReader
from fxzero.graph.randomness import draws


class TracedCalls(compat.dispatch_mode()):  # type: ignore[misc]
    """While tracing, random ops go to `RandomDraws`, and all ops to `ScalarReader`.

    One mode for both: each further one takes every op from Python to the dispatcher and back once more.
    """

    def __init__(self, reader: ScalarReader) -> None:
        super().__init__()
        self.reader = reader
        self.random = RandomDraws(reader.call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs) and kwargs.get("generator") is None:
            return self.random.draw(func, args, kwargs)
        return self.reader.call(func, args, kwargs)
