"""One microbatch of several: what its program does with the loss and with the gradients so far.

[Note: microbatches]
A step of k microbatches runs up to three programs: the first's hands on its gradients, each middle one's adds to what
it is handed, the last one's adds and updates. So the cost of compiling does not grow with k, each program is a step
graph like any other, and the last backward overlaps with the update. The sums travel as inputs and results of the
programs: "accumulated" are sums of reduced gradients (rows, wherever optimizer state is rows), "unreduced" are sums of
this rank's own gradients, reduced once at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from fxzero.capture.inventory import dense_strides
from fxzero.graph import StateEntry
from fxzero.graph.step_graph import WEIGHTS

POSITIONS = ("only", "first", "middle", "last")
WEIGHT = StateEntry("batch", "microbatch.weight")  # of this microbatch


@dataclass(frozen=True)
class Accumulation:
    """Where a microbatch stands in its step.

    Args:
        number: microbatches in a step.
        position: one of POSITIONS.
        weighted: microbatches count by weights that come with the batch, rather than alike.
        unsharded: gradients add up before they are reduced, rather than after.
        carried: the parameters whose gradients earlier microbatches hand on.
    """

    number: int = 1
    position: str = "only"
    weighted: bool = False
    unsharded: bool = False
    carried: tuple[str, ...] = ()

    def at(self, index: int, *, weighted: bool = False, carried: Iterable[str] = ()) -> Accumulation:
        """That of the microbatch `index`."""
        position = "first" if index == 0 else "last" if index == self.number - 1 else "middle"
        position = "only" if self.number == 1 else position
        return replace(self, position=position, weighted=weighted, carried=tuple(carried))

    @property
    def updates(self) -> bool:
        """Whether the step ends here."""
        return self.position in ("only", "last")

    @property
    def kind(self) -> str:
        """The kind of entry that carries gradients from one microbatch to the next."""
        return "unreduced" if self.unsharded else "accumulated"

    @property
    def weights(self) -> tuple[StateEntry, ...]:
        """The inputs that say how much this microbatch counts: its weight, and those of all."""
        return (WEIGHT, StateEntry("batch", WEIGHTS, (self.number,))) if self.weighted else ()

    def share(self, loss: torch.Tensor, table: Mapping[tuple[str, str], torch.Tensor]) -> torch.Tensor:
        """What a microbatch contributes to the loss of the step.

        Its part of the weights of all ranks, times the number of ranks: the mean over ranks is then the weighted
        mean over all microbatches (the pass that averages gradients averages the sum of the weights too).
        """
        if self.weighted:
            weight, weights = (table[entry.key] for entry in self.weights)
            return loss * (weight / weights.sum())
        return loss / self.number if self.number > 1 else loss

    def summed(
        self, so_far: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The gradients of all microbatches up to this one; a parameter may have none in some of them."""
        out = dict(so_far)
        for name, gradient in gradients.items():
            out[name] = so_far[name] + gradient if name in so_far else gradient
        return out


def in_layout_of(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with the strides in which the next program expects it: those of its parameter."""
    if gradient.stride() == dense_strides(parameter):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
