"""What the tests of the optimizers' kernels share: lists of shards, each kernel's update, and how far off it may be."""

from __future__ import annotations

import torch

from tests.kernels.closeness import assert_close
from tests.kernels.drawn import drawn

SIZES = (1, 0, 2047, 2049, 5003)  # around a block, and none
GRADIENT = {"inverse_scale": 1.0, "clip": 1.0, "overflow": None, "maximize": False}


def lists(roles, *, device, sizes=SIZES, dtypes=None, seed=0):
    """role -> tensors; squares are not negative, copies are empty."""
    made = {}
    for number, role in enumerate(roles):
        dtype = (dtypes or {}).get(role, torch.float32)
        tensors = [drawn(n, device=device, seed=seed + 100 * number + i) for i, n in enumerate(sizes)]
        if "sq" in role:
            tensors = [x.square() for x in tensors]
        made[role] = [x.to(dtype) for x in tensors]
    return made


def clones(made, *, dtype=None):
    """The same lists in new memory."""
    return {role: [x.to(dtype or x.dtype, copy=True) for x in tensors] for role, tensors in made.items()}


def wide(arguments):
    """The arguments of a reference: tensors in fp64, and no second argument for any number."""
    values = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in (GRADIENT | arguments).items()}
    return values | {f"{x}_tensor": None for x in ("lr", "correction1", "correction2", "inverse_scale", "clip")}


def check(update, made, *, magnitudes, ops, roundings=12, **arguments):
    """After `ops`' update, every list is near what the reference makes of it in fp64.

    Args:
        update: `update(ops, lists, arguments)` runs the update in place.
        made: role -> tensors before the update.
        magnitudes: `magnitudes(before, after)` yields role -> tensors in fp64, what roundings scale with.
        ops: the module whose update is checked.
        roundings: as in `assert_close`.
        arguments: of the update.
    """
    before, got, want = clones(made, dtype=torch.float64), clones(made), clones(made, dtype=torch.float64)
    update(ops, got, arguments)
    update(None, want, arguments)
    sizes = magnitudes(before, want)
    for role, tensors in got.items():
        for i, tensor in enumerate(tensors):
            size = sizes[role][i] if role in sizes else 0.0
            assert_close(tensor, want[role][i], roundings=roundings, magnitude=size, name=f"{role}[{i}]")
