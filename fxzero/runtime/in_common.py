"""What ranks that share a batch must have in common when they call a step: it, and their random number generators.

[Note: what a group has in common]
The ranks that differ on tp, sp or ep alone are a group: they compute parts of one forward and backward. Called with
different batches, or drawing different random numbers, they would join parts that do not belong together, and nothing
in a program could tell. So each rank says a digest of both where ranks agree, before anything is launched. At the
first call of a program everything is looked at. Later on only what costs nothing beside a step is: the generators,
numbers, and small tensors on the CPU; of others the shape. To read a batch on a GPU, the host would have to wait for
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxzero.capture.signature import flatten_batch
from fxzero.errors import RankMismatchError
from fxzero.runtime.microbatches import Batch

CHEAP_BYTES = 2**18  # what a hash reads in 0.2 ms
GENERATOR = "random number generator"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


@dataclass(frozen=True)
class InCommon:
    """What must be equal on all ranks of a group.

    Args:
        batch: of this call.
        device: of the model.
    """

    batch: Batch
    device: torch.device

    @property
    def form(self) -> int:
        """A number that stands for the shapes of the batch, and for its numbers: what has programs of its own."""
        return number_of({path: _form(leaf) for path, leaf in self._inputs()})

    def found(self, *, whole: bool) -> dict[str, str]:
        """ "batch input args.0" or the name of a generator -> what it holds.

        Args:
            whole: read all tensors; else only those of at most CHEAP_BYTES on the CPU, and of others the shape.
        """
        found = {path: _held(leaf, whole) for path, leaf in self._inputs()}
        found[GENERATOR] = _digest(torch.get_rng_state())
        if self.device.type == "cuda":
            found[f"{GENERATOR} of {self.device}"] = _digest(torch.cuda.get_rng_state(self.device))
        return found

    def _inputs(self) -> Iterator[tuple[str, object]]:
        microbatches = self.batch.microbatches
        for index, (args, kwargs) in enumerate(microbatches):
            of = f" of microbatch {index}" if len(microbatches) > 1 else ""
            yield from ((f"batch input {path}{of}", leaf) for path, leaf in flatten_batch(args, kwargs)[0])
        if self.batch.weights is not None:
            yield "batch input weights", self.batch.weights


def number_of(found: Mapping[str, str]) -> int:
    """A number of 56 bits that stands for all of what is to be equal."""
    text = "\n".join(f"{name} {held}" for name, held in found.items())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def difference_within(group: Sequence[int], found: Mapping[int, Mapping[str, str]]) -> str:
    """What ranks are told of a group that has not all in common: the first thing that differs; "" if it has.

    Args:
        group: its ranks.
        found: rank -> what `InCommon` finds there, with all tensors read.
    """
    first, *others = group
    for rank in others:
        for name in dict.fromkeys([*found[first], *found[rank]]):
            ours, theirs = (found[r].get(name, "nothing") for r in (first, rank))
            if ours != theirs:
                fix = "call the step with the same batch on all ranks of a tp, sp or ep group"
                if name.startswith(GENERATOR):
                    fix = "call torch.manual_seed(seed + dp index) on each rank, and draw the same numbers in a group"
                expected = f"the same on all ranks of a tp, sp or ep group, {list(group)}; rank {first} has {ours}"
                return str(RankMismatchError.of(name, expected=expected, got=f"rank {rank} has {theirs}", fix=fix))
    return ""


def _form(leaf: object) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__qualname__


def _held(leaf: object, whole: bool) -> str:
    if not isinstance(leaf, torch.Tensor):
        return _form(leaf)
    is_cheap = leaf.device.type == "cpu" and leaf.nbytes <= CHEAP_BYTES
    return f"{_form(leaf)} {_digest(leaf)}" if whole or is_cheap else _form(leaf)


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return f"digest {hashlib.sha256(data.numpy().data).hexdigest()[:16]}"
