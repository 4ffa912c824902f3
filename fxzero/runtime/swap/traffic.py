"""How many bytes have been moved."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from fxzero.runtime.swap.places import TIERS


@dataclass(frozen=True)
class Traffic:
    """Bytes moved so far, by tier ("host", "nvme"). Of files what was moved is counted, padding included.

    Args:
        written: from the device to the tier.
        read: from the tier to the device.
    """

    written: dict[str, int]
    read: dict[str, int]

    def since(self, earlier: Traffic) -> Traffic:
        """What was moved after `earlier`."""
        return Traffic(
            {tier: self.written[tier] - earlier.written[tier] for tier in TIERS},
            {tier: self.read[tier] - earlier.read[tier] for tier in TIERS},
        )


class TrafficCount:
    """Counts bytes, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written = dict.fromkeys(TIERS, 0)
        self._read = dict.fromkeys(TIERS, 0)

    def add(self, tier: str, nbytes: int, *, writes: bool) -> None:
        """Count bytes that have been moved."""
        with self._lock:
            (self._written if writes else self._read)[tier] += nbytes

    def now(self) -> Traffic:
        """All that has been counted."""
        with self._lock:
            return Traffic(dict(self._written), dict(self._read))
