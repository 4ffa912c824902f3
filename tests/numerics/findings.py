"""What each of several ranks has found, written by one of them."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.numerics.sparing import verifying_less


def write_findings(path: Path, find: Callable[[int], dict[str, Any]]) -> None:
    """Run on each rank over gloo, or alone; rank 0 writes a list of what all have found, as JSON.

    Args:
        path: where to.
        find: (number of ranks) -> what this rank finds. Rank 0 verifies for all.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with verifying_less({}, broken=False):
        found = find(ranks)
    everyone: list[Any] = [found]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, found)
    if ranks == 1 or dist.get_rank() == 0:
        path.write_text(json.dumps(everyone))
    if ranks > 1:
        dist.destroy_process_group()
