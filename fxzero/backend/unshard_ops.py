"""The two ops of a sharded parameter: what a module reads of it, and what comes back as its gradient.

unshard(rows, count, by) -> whole            all `count` rows, gathered from the ranks; -1: `rows` is whole already
reduce_gradient(whole, rows, by) -> rows     the mean over ranks of a gradient: the first `rows` of this rank's; -1: all

`by` names what `fxzero.shard` has made (`fxzero.backend.sharded`). Eager code and other compilers call them; no step
graph holds them.
"""

from __future__ import annotations

from typing import Any

import torch

from fxzero.backend.sharded import WHOLE, sharded_by

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("unshard(Tensor rows, int count, str by) -> Tensor")
_LIBRARY.define("reduce_gradient(Tensor whole, int rows, str by) -> Tensor")


@torch.library.impl(_LIBRARY, "unshard", "CompositeExplicitAutograd")
def _unshard(rows: torch.Tensor, count: int, by: str) -> torch.Tensor:
    # a copy where it is whole: what an op yields may not share memory with what it takes
    return rows.clone() if count == WHOLE else sharded_by(by).gather(rows, count)


@torch.library.register_fake("fxzero::unshard", lib=_LIBRARY)
def _unshard_fake(rows: torch.Tensor, count: int, by: str) -> torch.Tensor:
    return torch.empty_like(rows) if count == WHOLE else rows.new_empty((count, *rows.shape[1:]))


@torch.library.impl(_LIBRARY, "reduce_gradient", "CompositeExplicitAutograd")
def _reduce_gradient(whole: torch.Tensor, rows: int, by: str) -> torch.Tensor:
    return sharded_by(by).reduce(whole, rows)


@torch.library.register_fake("fxzero::reduce_gradient", lib=_LIBRARY)
def _reduce_gradient_fake(whole: torch.Tensor, rows: int, by: str) -> torch.Tensor:
    return whole.new_empty(whole.shape if rows == WHOLE else (rows, *whole.shape[1:]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, count, ctx.by = inputs
    ctx.rows = WHOLE if count == WHOLE else rows.shape[0]


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return reduce_gradient(gradient, ctx.rows, ctx.by), None, None


torch.library.register_autograd("fxzero::unshard", _differentiate, setup_context=_keep, lib=_LIBRARY)

unshard = torch.ops.fxzero.unshard.default
reduce_gradient = torch.ops.fxzero.reduce_gradient.default
