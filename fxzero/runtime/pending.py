"""What a collective that this package carries itself returns when it is launched, until it is waited for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch


class Pending(ABC):
    """A collective under way.

    Attributes:
        own: of a gather, a copy of this rank's rows as they are sent, until `finish`; None where no copy is sent.
    """

    own: torch.Tensor | None = None

    @abstractmethod
    def arrive(self) -> None:
        """Return when what the other ranks send is there; may be called more than once, and by another thread."""

    @abstractmethod
    def finish(self) -> torch.Tensor:
        """Wait, and return what the collective yields; called once."""


def wait(pending: Pending) -> torch.Tensor:
    """What a collective yields: the whole tensor of a gather, this rank's rows of a reduction."""
    return pending.finish()


def reduced(parts: Iterable[torch.Tensor], *, mean: bool) -> torch.Tensor:
    """The sum, or mean, of what at least two ranks have, added in their order, in new memory."""
    first, second, *rest = parts
    total = first + second
    for part in rest:
        total += part
    return total.div_(2 + len(rest)) if mean else total
