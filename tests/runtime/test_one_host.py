"""Which ranks share memory: ranks are threads here, with a store of one process."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fxzero.errors import RankMismatchError
from fxzero.runtime import one_host, shared_memory
from fxzero.runtime.one_host import open_channels
from fxzero.runtime.shared_memory import launch_all_gather
from fxzero.runtime.shared_segments import Segment

pytestmark = pytest.mark.skipif(not shared_memory.is_offered(), reason="Linux on x86-64 only")
RANK = threading.local()


@dataclass
class Group:
    """Some ranks, as much of a process group as is asked for."""

    ranks: list[int]

    def rank(self) -> int:
        return self.ranks.index(RANK.value)

    def size(self) -> int:
        return len(self.ranks)


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(one_host, "_meetings", iter(lambda: 0, 1))
    monkeypatch.setattr("fxzero.compat_distributed.default_store", lambda: store)
    monkeypatch.setattr(
        "fxzero.compat_distributed.timeout_of", lambda group: SimpleNamespace(total_seconds=lambda: 5.0)
    )
    monkeypatch.setattr(dist, "get_rank", lambda: RANK.value)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group.ranks)


def on_ranks(call: Callable[[int], Any], ranks: range = range(4)) -> list[Any]:
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        RANK.value = rank
        try:
            found[rank] = call(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in ranks]


def groups_of(rank: int) -> dict[str, Group]:
    """Those of a mesh of two by two."""
    return {"dp_replicate": Group([rank % 2, rank % 2 + 2]), "dp": Group([rank - rank % 2, rank - rank % 2 + 1])}


def test_each_axis_has_a_channel_between_its_ranks() -> None:
    opened = on_ranks(lambda rank: open_channels(groups_of(rank), timeout_s=5))
    for axis, other in (("dp", 1), ("dp_replicate", 2)):
        pending = [launch_all_gather(torch.tensor([rank]), 2, opened[rank][axis], 1) for rank in range(4)]
        found = [p.finish().tolist() for p in pending]
        assert found == [sorted([rank, rank ^ other]) for rank in range(4)]


def test_an_axis_of_one_rank_has_none() -> None:
    opened = on_ranks(lambda rank: open_channels({"dp": Group([0, 1, 2, 3]), "tp": Group([rank])}, timeout_s=5))
    assert [list(channels) for channels in opened] == [["dp"]] * 4


def test_none_where_a_rank_is_on_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_host, "_host", lambda: ["boot", 1, RANK.value // 2])
    assert on_ranks(lambda rank: open_channels(groups_of(rank), timeout_s=5)) == [{}] * 4


def test_none_where_one_rank_may_not_look_into_another(monkeypatch: pytest.MonkeyPatch) -> None:
    may_open = Segment.of_process

    def of_process(process: int, file: int) -> Segment:
        if RANK.value == 3:
            raise PermissionError(13, "Permission denied")
        return may_open(process, file)

    monkeypatch.setattr(Segment, "of_process", staticmethod(of_process))
    assert on_ranks(lambda rank: open_channels(groups_of(rank), timeout_s=5)) == [{}] * 4


def test_none_where_one_machine_does_not_offer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_host, "is_offered", lambda: RANK.value != 1)
    assert on_ranks(lambda rank: open_channels(groups_of(rank), timeout_s=5)) == [{}] * 4


def test_a_rank_that_does_not_come_is_named() -> None:
    errors = on_ranks(lambda rank: open_channels(groups_of(rank), timeout_s=0.3), range(3))
    for error in errors:
        assert isinstance(error, RankMismatchError)
        assert "rank 3: expected all ranks to call fxzero.compile within 0 s, got no word from it" in str(error)
