"""The collective that passes tensors round an axis, for which torch's functional ones have no word that all ranks say.

shift(x, by, group_size, index, group_name) -> like x
                                            what the rank `by` places before this one has: rank i's tensor arrives at
                                            rank (i + by) mod n; `index` is this rank's place on the axis

[Note: shifts]
A send and a receive name a peer, which is another one on each rank; a graph is the same on all. So a shift is one node
with the rank's index for an argument, and sends match receives because `by` is the same everywhere.
It runs as an all-to-all in which each rank has rows for one peer alone. That is asynchronous on every backend, has its
place among the other collectives of the group (nothing can wait for a message that its peer sends later), and is the
same call where both neighbours are one rank. gloo sends the peers that get nothing an empty message each; NCCL leaves
them out, and has a send and a receive in one group, as `batch_isend_irecv` has. Under LocalTensorMode `index` is a
number of several ranks, so splits are computed by arithmetic alone.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("shift(Tensor x, int by, int group_size, SymInt index, str group_name) -> Tensor")

all_to_all = torch.ops._c10d_functional.all_to_all_single.default


def launch_shift(x: torch.Tensor, by: int, group_size: int, index: int, group_name: str) -> torch.Tensor:
    """Start to send a tensor on, and to receive another one; what is returned has to be waited for.

    Args:
        x: contiguous, with at least one dim, of the same shape on all ranks.
        by: how many places on; from 1 to `group_size` - 1.
        group_size: ranks of the group.
        index: this rank's place in it.
        group_name: of the process group.
    """
    rows, n = x.shape[0], group_size
    # 1 for the one peer at that distance, else 0
    sent = [rows * ((n - (peer - index - by) % n) // n) for peer in range(n)]
    received = [rows * ((n - (index - by - peer) % n) // n) for peer in range(n)]
    return all_to_all(x, received, sent, group_name)  # type: ignore[no-any-return]


@torch.library.impl(_LIBRARY, "shift", "CompositeExplicitAutograd")
def _shift(x: torch.Tensor, by: int, group_size: int, index: int, group_name: str) -> torch.Tensor:
    return launch_shift(x, by, group_size, index, group_name)


@torch.library.register_fake("fxzero::shift", lib=_LIBRARY)
def _shift_fake(x: torch.Tensor, by: int, group_size: int, index: int, group_name: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


shift = torch.ops.fxzero.shift.default
