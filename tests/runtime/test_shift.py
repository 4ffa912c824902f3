"""Tensors passed round an axis by real ranks over gloo: what arrives, beside other messages of the group.

Run as a module, this file is what each rank does.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fxzero.graph import collectives as c10d
from fxzero.graph.shift_op import launch_shift
from tests.numerics.worker import launch_for_results

ROUNDS = 20
LARGE = 200_000  # elements: more than a socket takes at once


def own(rank: int, number: int, elements: int = 3) -> torch.Tensor:
    """What a rank sends at a round."""
    return torch.arange(elements, dtype=torch.float32).view(1, -1) + 1000 * rank + number


def beside_others(ranks: int, rank: int, name: str) -> bool:
    """Whether all that arrives is right where shifts both ways and a sum are under way at once, in several rounds."""
    right = True
    for number in range(ROUNDS):
        sent = own(rank, number, LARGE)
        ways = [by for by in (1, ranks - 1) for _ in range(2)]
        launches = [launch_shift(sent + place, by, ranks, rank, name) for place, by in enumerate(ways)]
        total = c10d.all_reduce(torch.ones(LARGE), "sum", name)
        launches.append(torch.ops.fxzero.shift(own(rank, number), 1, ranks, rank, name))
        found = [c10d.wait(launch) for launch in reversed(launches)][::-1]
        wanted = [own((rank - by) % ranks, number, LARGE) + place for place, by in enumerate(ways)]
        wanted.append(own((rank - 1) % ranks, number))
        right = right and all(map(torch.equal, found, wanted)) and bool((c10d.wait(total) == ranks).all())
    return right


def main(path: Path) -> None:
    """One rank; rank 0 writes what all have found."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    name = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    arrived = {by: c10d.wait(launch_shift(own(rank, 0), by, ranks, rank, name)).tolist() for by in range(1, ranks)}
    found = {"arrived": arrived, "right": beside_others(ranks, rank, name)}
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, found)
    if rank == 0:
        path.write_text(json.dumps(everyone))
    dist.destroy_process_group()


@pytest.mark.multirank
@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_has_what_the_one_before_it_sent(ranks: int, tmp_path: Path) -> None:
    everyone = launch_for_results("tests.runtime.test_shift", tmp_path, ranks=ranks, timeout_s=90)
    assert len(everyone) == ranks
    for rank, found in enumerate(everyone):
        for by in range(1, ranks):
            assert found["arrived"][str(by)] == own((rank - by) % ranks, 0).tolist()
        assert found["right"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
