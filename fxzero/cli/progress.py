"""What a command is doing, on stderr, with the time that it took and the peak of resident memory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

MIB = 2**20


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """Writes one line a stage.

    Args:
        stream: None says nothing.

    Attributes:
        seconds: stage -> time.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Say what begins, then how long it took.

        Args:
            name: key in `seconds`.
            what: words for it.
        """
        self._write(f"{what:<56}")
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self._write("\n")
            raise
        self.seconds[name] = time.perf_counter() - start
        self._write(f"{self._cost(self.seconds[name])}\n")

    def done(self, what: str, seconds: float) -> None:
        """Say what has been done."""
        self._write(f"{what:<56}{self._cost(seconds)}\n")

    def _cost(self, seconds: float) -> str:
        peak = peak_rss_bytes()
        return f"{seconds:8.2f} s" + (f", peak {peak / MIB:,.0f} MiB" if peak else "")

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()
