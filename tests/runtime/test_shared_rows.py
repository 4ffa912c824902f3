"""Rows of all ranks side by side; several ranks in one process, over segments that all of them map."""

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fxzero.errors import PlanError
from fxzero.runtime import shared_memory
from fxzero.runtime.shared_memory import Channel
from fxzero.runtime.shared_rows import RowsForm, SharedRows, launch_gather
from fxzero.runtime.shared_segments import Segment
from tests.runtime.test_shared_memory import channels

pytestmark = pytest.mark.skipif(not shared_memory.is_offered(), reason="Linux on x86-64 only")
FORM = RowsForm((3, 2), torch.float32)


def connected(size: int, forms: dict[str, RowsForm]) -> list[Channel]:
    """The channels of all ranks, with rows in a segment that all map."""
    group = channels(size)
    first = Segment.new(2**16)
    for channel in group:
        segment = Segment.of_process(channel.process_of(0), first.file)
        channel.rows = SharedRows(segment, forms, me=channel.me, size=size)
    return group


def own(channel: Channel, name: str = "a") -> torch.Tensor:
    assert channel.rows is not None
    return channel.rows.own[name]


@given(
    size=st.integers(2, 4),
    shapes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]),
)
def test_what_one_rank_writes_all_have_gathered(
    size: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> None:
    forms = {str(index): RowsForm(shape, dtype) for index, shape in enumerate(shapes)}
    group = connected(size, forms)
    values = {(c.me, name): (torch.rand(form.shape) * 9).to(dtype) for c in group for name, form in forms.items()}
    for channel in group:
        for name in forms:
            assert torch.equal(channel.rows.settle(name, values[channel.me, name]), values[channel.me, name])
    for name in forms:
        whole = torch.cat([values[rank, name] for rank in range(size)])
        launched = [launch_gather(own(channel, name), size, channel, 1, name) for channel in group]
        for pending in launched:
            assert torch.equal(pending.finish(), whole)


def test_a_gather_copies_nothing_and_an_update_is_there_at_the_next() -> None:
    group = connected(2, {"a": FORM})
    wholes = [p.finish() for p in [launch_gather(own(c), 2, c, 1, "a") for c in group]]
    own(group[1]).fill_(7)
    assert wholes[0].tolist() == [[0, 0]] * 3 + [[7, 7]] * 3
    assert own(group[0]).data_ptr() == wholes[0].data_ptr()
    assert own(group[0]).untyped_storage().nbytes() == FORM.num_bytes  # what saves it saves no more


def test_rows_that_the_user_has_put_elsewhere_are_copied() -> None:
    group = connected(2, {"a": FORM})
    elsewhere = torch.full((3, 2), 5.0)
    first, second = launch_gather(elsewhere, 2, group[0], 1, "a"), launch_gather(own(group[1]), 2, group[1], 1, "a")
    assert second.finish().tolist() == [[5, 5]] * 3 + [[0, 0]] * 3
    first.finish()


def test_rows_are_read_when_all_have_said_so() -> None:
    group = channels(2, timeout_s=0.1)
    rows = connected(2, {"a": FORM})[0].rows
    group[0].rows = rows
    with pytest.raises(RuntimeError, match="rank 1 has not sent message 0"):
        launch_gather(torch.zeros(3, 2), 2, group[0], 1, "a").finish()


def test_ranks_at_different_gathers_find_out() -> None:
    group = connected(2, {"a": FORM})
    first, _ = launch_gather(own(group[0]), 2, group[0], 1, "a"), launch_gather(own(group[1]), 2, group[1], 2, "a")
    with pytest.raises(RuntimeError, match=r"message 0 of rank 1: expected 0 bytes of collective 1, got 0 .* 2"):
        first.finish()


def test_words_without_content_use_slots_again_but_not_unread_ones() -> None:
    group = connected(2, {"a": FORM})
    for tag in range(shared_memory.SLOTS + 5):
        for pending in [launch_gather(own(channel), 2, channel, tag, "a") for channel in group]:
            pending.finish()
    for tag in range(shared_memory.SLOTS):
        group[0].announce(tag)
    with pytest.raises(RuntimeError, match="expected at most 1024 collectives under way"):
        group[0].announce(0)


def test_memory_of_messages_comes_back_after_many_words() -> None:
    group = connected(2, {"a": FORM})
    for _ in range(6):
        sent = [channel.send(torch.ones(2**18), 0) for channel in group]
        for channel, (number, _) in zip(group, sent, strict=True):
            channel.arrive(number)
            channel.done(number)
        for _ in range(shared_memory.SLOTS + 1):  # what says that a message was read is written over
            for channel in group:
                channel.done(channel.announce(0))
    assert [len(channel.room.segments) for channel in group] == [1, 1]


def test_all_ranks_learn_that_one_cannot_map_it() -> None:
    channel = channels(2)[1]

    def gets(tensor: torch.Tensor, *_: object, **__: object) -> None:
        tensor.fill_(-1) if tensor.dtype == torch.int64 else tensor.fill_(0)

    with (
        mock.patch.object(dist, "broadcast", gets),
        mock.patch.object(dist, "all_reduce", gets),
        pytest.raises(PlanError, match="every rank can map, got another rank that cannot; raise the host's limits"),
    ):
        SharedRows.between(None, channel, {"a": FORM})
