"""Ranks that are forks of warm processes are fresh, differ as processes do, and cannot hang or fail unseen.

Run as a module, this file is what each rank does.
"""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.numerics.worker import launch

pytestmark = pytest.mark.multirank


def run(what: str, *args: str, ranks: int = 2, timeout_s: float = 60) -> str:
    return launch("tests.numerics.test_rank_servers", what, *args, ranks=ranks, timeout_s=timeout_s)


def untouched() -> None:
    """What a process of its own begins with; leaves something else behind."""
    undrawn = torch.Generator().manual_seed(torch.initial_seed())
    assert torch.equal(torch.get_rng_state(), undrawn.get_state())
    assert torch.get_default_dtype() is torch.float32 and not hasattr(torch, "left_behind")
    torch.left_behind = os.environ["LEFT_BEHIND"] = "something"  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    torch.rand(1)


def meet() -> None:
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    every: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, hash("the order of sets"))
    assert total == dist.get_world_size() == int(os.environ["LOCAL_WORLD_SIZE"])
    assert every[0] != every[1], "ranks that are forks of one process have one order of sets"
    sys.stdout.write(f"rank {dist.get_rank()} of {dist.get_world_size()}\n")  # at once: ranks share the file
    dist.destroy_process_group()


def fail() -> None:
    """The last rank fails, the others would never end."""
    if os.environ["RANK"] != "1":
        time.sleep(1000)
    raise ValueError("planted in rank 1")


def hang(path: str) -> None:
    Path(path, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(1000)


@pytest.mark.parametrize("ranks", [1, 4])
def test_nothing_of_one_launch_reaches_the_next(ranks: int) -> None:
    for _ in range(2):
        assert run("untouched", ranks=ranks) == ""


def test_a_leftover_would_be_seen() -> None:
    with pytest.raises(AssertionError, match=r"rank \d exited 1(.|\n)*AssertionError"):
        run("untouched twice")


def test_ranks_meet_and_have_each_its_order_of_sets() -> None:
    ranks = 4
    assert sorted(run("meet", ranks=ranks).splitlines()) == [f"rank {rank} of {ranks}" for rank in range(ranks)]


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 exited 1(.|\n)*ValueError: planted in rank 1"):
        run("fail")
    assert time.monotonic() - start < 50


def test_ranks_that_hang_are_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="took too long"):
        run("hang", str(tmp_path), timeout_s=2)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert len(list(tmp_path.iterdir())) == 2


if __name__ == "__main__":
    if sys.argv[1] == "untouched twice":
        untouched()
        untouched()
    else:
        {"untouched": untouched, "meet": meet, "fail": fail, "hang": hang}[sys.argv[1]](*sys.argv[2:])
