"""Messages through shared memory; several ranks in one process, which may open its own files as another would."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.runtime import shared_memory
from fxzero.runtime.shared_memory import Card, Channel, launch_all_gather, launch_reduce_scatter
from fxzero.runtime.shared_segments import ALIGNMENT, LEAST_BYTES, Room

pytestmark = pytest.mark.skipif(not shared_memory.is_offered(), reason="Linux on x86-64 only")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def channels(size: int, *, timeout_s: float = 5.0) -> list[Channel]:
    """Those of all ranks of a group."""
    made = [Channel(rank, size, timeout_s=timeout_s) for rank in range(size)]
    for channel in made:
        channel.connect([other.card(rank) for rank, other in enumerate(made)])
    return made


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=st.integers(2, 4), shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
def test_gathers_are_the_rows_of_all(dtype: torch.dtype, size: int, shape: tuple[int, ...]) -> None:
    sent = [values(shape, dtype, rank) for rank in range(size)]
    launched = [launch_all_gather(row, size, channel, 1) for row, channel in zip(sent, channels(size), strict=True)]
    for pending in launched:
        assert torch.equal(pending.finish(), torch.cat(sent))


@pytest.mark.parametrize("op", ["sum", "avg"])
@given(size=st.integers(2, 4), rows=st.integers(0, 5), width=st.integers(0, 9))
def test_reductions_are_sums_in_the_order_of_ranks(op: str, size: int, rows: int, width: int) -> None:
    sent = [values((rows * size, width), torch.float32, rank) for rank in range(size)]
    total = sent[0].clone()
    for other in sent[1:]:
        total += other
    total = total / size if op == "avg" else total
    launched = [launch_reduce_scatter(x, op, size, channel, 1) for x, channel in zip(sent, channels(size), strict=True)]
    for rank, pending in enumerate(launched):
        assert torch.equal(pending.finish(), total[rank * rows : (rank + 1) * rows])


def test_what_was_sent_may_be_written_at_once() -> None:
    sent, group = [torch.ones(4), torch.full((4,), 2.0)], channels(2)
    launched = [launch_all_gather(rows, 2, channel, 1) for rows, channel in zip(sent, group, strict=True)]
    for rows in sent:
        rows.zero_()
    assert launched[1].own is not None and launched[1].own.tolist() == [2.0] * 4
    assert [pending.finish().tolist() for pending in launched] == [[1.0] * 4 + [2.0] * 4] * 2


def test_messages_are_read_in_any_order_and_their_memory_is_used_again() -> None:
    group, tensors = channels(2), [values((1000, 100), torch.float32, seed) for seed in range(4)]
    for _ in range(300):  # 480 MB a rank
        launched = [[launch_all_gather(x, 2, channel, tag) for tag, x in enumerate(tensors)] for channel in group]
        for order, messages in zip(([3, 1, 0, 2], [0, 2, 3, 1]), launched, strict=True):
            for index in order:
                assert torch.equal(messages[index].finish()[:1000], tensors[index])
    assert all(channel.room.num_bytes <= 4 * LEAST_BYTES for channel in group)


def test_a_message_that_nobody_has_read_yet_stays() -> None:
    group = channels(2)
    early = [launch_all_gather(torch.full((8,), float(rank)), 2, channel, 7) for rank, channel in enumerate(group)]
    for _ in range(50):
        for pending in [launch_all_gather(torch.full((8,), 9.0), 2, channel, 1) for channel in group]:
            pending.finish()
    assert [pending.finish().tolist() for pending in early] == [[0.0] * 8 + [1.0] * 8] * 2


def test_no_more_messages_than_slots() -> None:
    group = channels(2)
    for number in range(shared_memory.SLOTS):
        group[0].send(torch.zeros(1), number)
    with pytest.raises(RuntimeError, match="expected at most 1024 collectives under way"):
        group[0].send(torch.zeros(1), 0)


def test_ranks_at_different_calls_find_out() -> None:
    group = channels(2)
    one, _ = launch_all_gather(torch.zeros(4), 2, group[0], 1), launch_all_gather(torch.zeros(4), 2, group[1], 2)
    with pytest.raises(RuntimeError, match=r"message 0 of rank 1: expected 16 bytes of collective 1, got 16 .* 2"):
        one.finish()
    one, _ = launch_all_gather(torch.zeros(4), 2, group[0], 3), launch_all_gather(torch.zeros(5), 2, group[1], 3)
    with pytest.raises(RuntimeError, match="message 1 of rank 1: expected 16 bytes of collective 3, got 20"):
        one.finish()


def test_a_rank_that_does_not_send() -> None:
    group = channels(2, timeout_s=0.1)
    pending = launch_all_gather(torch.zeros(4), 2, group[0], 1)
    with pytest.raises(RuntimeError, match=r"rank 1 has not sent message 0 in 0 s, the timeout of the process group"):
        pending.finish()


@contextmanager
def silent_process(size: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with a head that says nothing, and the head's descriptor there."""
    text = f"import os, time; f = os.memfd_create('x'); os.ftruncate(f, {size}); print(f, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_rank_that_has_ended() -> None:
    channel = Channel(0, 2, timeout_s=60)
    size = os.fstat(channel.card(0).file).st_size
    with silent_process(size) as (process, file):
        channel.connect([channel.card(0), Card(5, process.pid, file)])
        pending = launch_all_gather(torch.zeros(4), 2, channel, 1)
        process.kill()
        with pytest.raises(RuntimeError, match="rank 5 has ended: it was to send message 0"):
            pending.finish()


def test_files_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    group = channels(3)
    for pending in [launch_all_gather(torch.zeros(4), 3, channel, 1) for channel in group]:
        pending.finish()
    del pending, group
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * LEAST_BYTES)), max_size=40))
def test_room_is_never_given_twice_and_comes_back_whole(asked: list[tuple[bool, int]]) -> None:
    room, taken = Room(), []
    for gives_back, size in asked:
        if gives_back and taken:
            room.give_back(*taken.pop(size % len(taken)))
            continue
        if (place := room.take(size)) is None:
            room.grow(size)
            place = room.take(size)
        assert place is not None and place[1] % ALIGNMENT == 0
        assert place[1] + size <= room.segments[place[0]].size
        assert all(place[0] != s or place[1] + max(size, 1) <= o or o + max(n, 1) <= place[1] for s, o, n in taken)
        taken.append((*place, size))
    for part in taken:
        room.give_back(*part)
    for index, segment in enumerate(room.segments):
        assert room.take(segment.size) is not None, f"segment {index} is in pieces"
