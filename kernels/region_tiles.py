"""Tiles of a generated kernel: a small table by columns, and the fastest of a few, found on the GPU where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxzero.kernels import launch

Tile = tuple[int, int, int]

_ROUNDS = 5


def tiles_of(rows: int, columns: int, *, by_row: bool) -> list[Tile]:
    """(rows, columns, warps) of the tiles that a kernel may have, the one of the table first.

    Args:
        rows, columns: of the region.
        by_row: a program must hold whole rows.
    """
    most = launch.MAX_COLUMNS if by_row else launch.TILE
    height, width, warps = launch.tile_of(max(columns, 1), most=most)
    height = min(height, launch.power_of_2(rows)) if rows else 1
    tiles = [(height, width, warps)]
    tiles += [(height, width, other) for other in (2 * warps, warps // 2) if 1 <= other <= 32]
    if height > 1:
        tiles += [(height // 2, width, warps), (max(height // 4, 1), width, warps)]
    if not by_row and width == most:
        tiles += [(height, 2 * width, warps), (height, width // 2, warps)]
    return list(dict.fromkeys(tiles))


class Tiles:
    """The tiles of one kernel, of which the fastest is kept once it is known.

    Args:
        tiles: the one of the table first.
    """

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._tiles = list(tiles)

    def fastest(self, run: Callable[..., None], x: torch.Tensor, written: Sequence[torch.Tensor]) -> Tile:
        """The fastest tile on this GPU, tried at the first call; on the CPU the first of the table.

        Args:
            run: launches the kernel with a tile and the tensors that it writes over.
            x: a tensor that says where the kernel runs.
            written: what it writes over; trials write over copies.
        """
        if not x.is_cuda or len(self._tiles) == 1:
            return self._tiles[0]
        copies = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in written]
        self._tiles = [min(self._tiles, key=lambda tile: _milliseconds(run, tile, copies))]
        return self._tiles[0]


def _milliseconds(run: Callable[..., None], tile: Tile, copies: Sequence[Any]) -> float:
    """The least time of a few launches; infinite where a tile needs more than the GPU has."""
    least = math.inf
    try:
        run(tile, *copies)
        for _ in range(_ROUNDS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(tile, *copies)
            end.record()
            end.synchronize()
            least = min(least, start.elapsed_time(end))
    except Exception:  # a tile may need more than the GPU has; where each does, the launch itself says so
        return math.inf
    return least
