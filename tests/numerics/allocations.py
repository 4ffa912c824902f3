"""What torch's allocator did while a block ran, by its own profiler: an account that knows nothing of graphs."""

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from fxzero.runtime.program import Program

_MARK = "fxzero: a program runs"


@dataclass
class Account:
    """Bytes that this thread allocated on the CPU and has not freed, from the beginning of the block.

    Attributes:
        setup_bytes: the most before the first program ran.
        peaks: the most between one program's start and the next one's, in order.
        live_bytes: at the end.
    """

    setup_bytes: int = 0
    peaks: list[int] = field(default_factory=list)
    live_bytes: int = 0


@contextmanager
def accounted() -> Iterator[Account]:
    """An account of the block, filled in at its end; the starts of programs are marks in it."""
    account = Account()
    run = Program.run

    def marked(self: Program, inputs: list[Any]) -> tuple[Any, ...]:
        with record_function(_MARK):
            return run(self, inputs)

    with (
        mock.patch.object(Program, "run", marked),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        yield account
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    starts = sorted(event.start_ns() for event in events if event.name() == _MARK)
    requests = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = [0] * (len(starts) + 1)
    for when, num_bytes in requests:
        account.live_bytes += num_bytes
        part = bisect.bisect(starts, when)
        most[part] = max(most[part], account.live_bytes)
    account.setup_bytes, account.peaks = most[0], most[1:]
