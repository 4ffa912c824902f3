"""Where tensors of the state rest between steps: by a rule for their kind, or as it was decided for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxzero.graph.swap_ops import DEVICE

AUTO = "auto"  # in a rule: as decided


@dataclass(frozen=True)
class Placement:
    """What was decided for single tensors.

    Args:
        tiers: (kind, parameter) -> "host" or "nvme", where the parameter, or its optimizer state, rests; of others it
            rests on the device.
        on_host: the parameters whose updates run on the host.
    """

    tiers: Mapping[tuple[str, str], str] = field(default_factory=dict)
    on_host: frozenset[str] = frozenset()

    def __repr__(self) -> str:  # in an order of its own, for the text that ranks agree on
        return f"Placement({dict(sorted(self.tiers.items()))}, on_host={sorted(self.on_host)})"


NOTHING_PLACED = Placement()


def resting_tier(
    key: tuple[str, str], shape: Sequence[int], rule: Mapping[str, str], below: int, placed: Placement = NOTHING_PLACED
) -> str:
    """Where a tensor of the state rests between steps.

    Args:
        key: (kind, name) of its entry.
        shape: single-device shape.
        rule: kind -> tier, for the kinds that are offloaded; "auto": as placed.
        below: tensors with fewer elements stay on the device, and so do scalars.
        placed: what was decided.
    """
    if not can_be_placed(shape, below):
        return DEVICE
    tier = rule.get(key[0], DEVICE)
    return tier if tier != AUTO else placed.tiers.get((key[0], owner_of(key)), DEVICE)


def can_be_placed(shape: Sequence[int], below: int) -> bool:
    """Whether a tensor of this single-device shape may rest off the device."""
    return bool(shape) and math.prod(shape) >= max(below, 1)


def owner_of(key: tuple[str, str]) -> str:
    """The parameter that an entry is, or belongs to."""
    return key[1].rpartition(":")[0] if key[0] == "optimizer" else key[1]
