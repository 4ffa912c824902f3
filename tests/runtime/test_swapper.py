"""What is written comes back bit-equal, in the order of the launches; users and transfers see the same homes."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxzero.errors import OffloadError, PlanError
from fxzero.runtime.swap import Swapper
from fxzero.runtime.swap.places import Place, slot_bytes

TIERS = ("host", "nvme")
CPU = torch.device("cpu")
CHUNK = 8192  # buffer_bytes of the swappers here
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.uint8, torch.complex64)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bytes, NaNs among them; zeros and ones where the dtype is bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert raw(one) == raw(other)


def there_and_back(swapper: Swapper, tensor: torch.Tensor, tier: str) -> torch.Tensor:
    stored = swapper.written(swapper.write(tensor, "x", tier))
    transfer = swapper.read(stored)
    swapper.drop(stored)
    return swapper.loaded(transfer)


# ---- values


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 17])
def test_any_number_of_bytes_comes_back(make_swapper, tier, num_bytes, io):
    tensor = random_tensor((num_bytes,), torch.uint8)
    assert_same(there_and_back(make_swapper(io=io), tensor, tier), tensor)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_comes_back(swapper, tier, dtype):
    for shape in ((), (0, 3), (7,), (33, 129)):
        tensor = random_tensor(shape, dtype)
        assert_same(there_and_back(swapper, tensor, tier), tensor)


VIEWS = {
    "transposed": lambda x: x.t(),
    "permuted": lambda x: x.view(6, 4, 10).permute(2, 0, 1),
    "an inner part": lambda x: x[3:9],
    "every other": lambda x: x[::2, 1::3],
    "expanded": lambda x: x[:, :1].expand(24, 7),
    "a dim of one": lambda x: x[:, None].transpose(0, 1),
    "one element": lambda x: x[2, 3],
    "conjugate": lambda x: torch.view_as_complex(x.view(-1, 2)).conj(),
    "requires grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_comes_back_with_the_strides_of_its_clone(swapper, tier, view):
    tensor = VIEWS[view](torch.randn(24, 10))
    back = there_and_back(swapper, tensor, tier)
    assert_same(back, tensor.detach().resolve_conj())
    assert back.stride() == torch.empty_like(tensor).stride()
    assert back.untyped_storage().nbytes() == back.nbytes
    assert not back.requires_grad


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    tier=st.sampled_from(TIERS),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**30),
    num_threads=st.integers(1, 3),
    num_buffers=st.integers(1, 3),
    at_home=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_comes_back_is_bit_equal(direct_io, shape, dtype, tier, order, seed, num_threads, num_buffers, at_home):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    tensors = [random_tensor(shape, dtype, seed + i).permute(dims) for i in range(3)]
    io = "direct" if direct_io else "buffered"
    options = {"io": io, "buffer_bytes": 4096, "num_threads": num_threads, "num_buffers": num_buffers}
    with tempfile.TemporaryDirectory() as directory, Swapper(CPU, directory=Path(directory), **options) as swapper:
        homes = {}
        if at_home:
            homes = {i: swapper.home(str(i), x.shape, dtype, tier, stride=x.stride()) for i, x in enumerate(tensors)}
        writes = [swapper.write(x, str(i), tier, into=homes.get(i)) for i, x in enumerate(tensors)]
        stored = [swapper.written(write) for write in writes]
        reads = [swapper.read(each) for each in reversed(stored)]
        for tensor, read in zip(reversed(tensors), reads, strict=True):
            back = swapper.loaded(read)
            assert_same(back, tensor)
            assert back.stride() == tensor.stride()


# ---- homes


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_home_and_transfers_see_each_other(make_swapper, tier, io):
    swapper = make_swapper(io=io)
    shape = (5, 1000)
    home = swapper.home("p", shape, torch.float32, tier)
    assert_same(home, torch.zeros(shape))
    for seed in range(5):
        tensor = random_tensor(shape, torch.float32, seed)
        swapper.written(swapper.write(tensor, "p", tier, into=home))
        assert_same(home, tensor)  # a direct write is seen by the mapping, of which pages were in memory
        home[3, 7:20] = seed
        home.view(-1)[-1] = -seed
        assert_same(swapper.loaded(swapper.read("p")), home)  # what the user wrote is seen by a direct read
        tensor.fill_(seed)
        swapper.written(swapper.write(tensor, "p", tier, into=home))
        assert_same(home, tensor)  # the pages that the user changed are not written over what came later


def test_a_file_system_that_keeps_mappings_apart_is_refused(make_swapper, monkeypatch):
    """The planted fault of the check behind [Note: coherence]: direct writes go nowhere."""
    make_swapper(io="direct")
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: sum(map(len, data)))
    with pytest.raises(PlanError, match=r"mapped files that do not show .* io=\"buffered\""):
        make_swapper(io="direct")


@pytest.mark.parametrize("tier", TIERS)
def test_a_home_is_asked_for_again_and_outlives_the_swapper(make_swapper, tier):
    swapper = make_swapper()
    home = swapper.home("p", (3, 4), torch.bfloat16, tier)
    assert swapper.home("p", (3, 4), torch.bfloat16, tier) is home
    with pytest.raises(OffloadError, match=r"home of tensor 'p': expected .*bfloat16\[3, 4\].*, got .*\[4, 3\]"):
        swapper.home("p", (4, 3), torch.bfloat16, tier)
    home.fill_(2)
    swapper.close()
    home += 1
    assert (home == 3).all()


@pytest.mark.parametrize("tier", TIERS)
def test_a_home_keeps_its_strides(swapper, tier):
    tensor = torch.randn(2, 3, 8, 5).to(memory_format=torch.channels_last)
    home = swapper.home("p", tensor.shape, tensor.dtype, tier, stride=tensor.stride())
    for same in (tensor, tensor.contiguous(), torch.stack([tensor, tensor], -1)[..., 0]):
        home.zero_()
        swapper.written(swapper.write(same, "p", tier, into=home))
        assert home.stride() == tensor.stride()
        assert_same(home, tensor)
        back = swapper.loaded(swapper.read("p"))
        assert back.stride() == tensor.stride()
        assert_same(back, tensor)


def test_host_homes_are_not_in_torch_s_memory(swapper):
    """They are mapped pages; what torch's allocator hands out is not aligned to pages."""
    for name in "ab":
        assert swapper.home(name, (100,), torch.float32, "host").data_ptr() % 4096 == 0


def test_a_home_with_holes_is_refused(swapper):
    with pytest.raises(OffloadError, match=r"home of tensor 'p': expected dense strides, got \[8, 2\]"):
        swapper.home("p", (3, 4), torch.float32, "host", stride=(8, 2))


# ---- ordering


class Gate:
    """Holds every piece of work back until it is opened."""

    def __init__(self, swapper: Swapper, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        copies = swapper._carriers["host"].copies
        copy = copies.copy

        def held_back(*args, **kwargs):
            assert self.opened.wait(20)
            copy(*args, **kwargs)

        monkeypatch.setattr(copies, "copy", held_back)


def interleaved(swapper: Swapper, tier: str, gate: Gate) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what a read gave, what it should) of ten writes of one home and three reads after each, all launched at once."""
    home = swapper.home("p", (3 * CHUNK,), torch.uint8, tier)
    values = [random_tensor((3 * CHUNK,), torch.uint8, seed) for seed in range(10)]
    writes, reads = [], []
    for value in values:
        writes.append(swapper.write(value, "p", tier, into=home))
        reads.append([swapper.read("p") for _ in range(3)])
    gate.opened.set()
    for write in writes:
        swapper.written(write)
    return [(swapper.loaded(read), value) for value, each in zip(values, reads, strict=True) for read in each]


@pytest.mark.parametrize("tier", TIERS)
def test_transfers_of_one_home_happen_in_the_order_of_their_launch(make_swapper, tier, monkeypatch):
    swapper = make_swapper(num_threads=4)
    for got, expected in interleaved(swapper, tier, Gate(swapper, monkeypatch)):
        assert_same(got, expected)


@pytest.mark.parametrize("forgotten", ["before_read", "before_write"])
def test_a_forgotten_order_is_seen(make_swapper, forgotten, monkeypatch):
    """The planted fault of the test above."""
    swapper = make_swapper(num_threads=4)
    monkeypatch.setattr(Place, forgotten, lambda place: [])
    wrong = 0
    for _ in range(5):
        pairs = interleaved(swapper, "nvme", Gate(swapper, monkeypatch))
        wrong += sum(raw(got) != raw(expected) for got, expected in pairs)
    assert wrong > 0


@pytest.mark.parametrize("tier", TIERS)
def test_a_slot_dropped_under_a_read_is_not_written_over(make_swapper, tier, monkeypatch):
    swapper = make_swapper(num_threads=4)
    values = [random_tensor((3 * CHUNK,), torch.uint8, seed) for seed in range(8)]
    reads = []
    for value in values:
        stored = swapper.written(swapper.write(value, "x", tier))
        reads.append(swapper.read(stored))
        swapper.drop(stored)
    for read, value in zip(reads, values, strict=True):
        assert_same(swapper.loaded(read), value)
    assert swapper.held()[tier] == 3 * CHUNK  # one slot did


# ---- slots, memory


def test_a_dropped_value_is_gone(swapper):
    stored = swapper.written(swapper.write(torch.ones(3), "x", "host"))
    swapper.drop(stored)
    for use in (swapper.read, swapper.drop):
        with pytest.raises(OffloadError, match=r"of tensor 'x'.*: expected a value that is still stored, got one that"):
            use(stored)
    swapper.written(swapper.write(torch.ones(3), "y", "host"))  # takes the same slot
    with pytest.raises(OffloadError, match="dropped"):
        swapper.read(stored)


def test_a_home_is_not_dropped(swapper):
    home = swapper.home("p", (3,), torch.float32, "host")
    stored = swapper.written(swapper.write(torch.ones(3), "p", "host", into=home))
    with pytest.raises(OffloadError, match="drop of tensor 'p': expected a value in a slot, got a home"):
        swapper.drop(stored)


def test_slots_are_used_again_from_step_to_step(swapper):
    for _ in range(4):
        stored = [swapper.written(swapper.write(torch.ones(n), f"x{n}", "nvme")) for n in (10, 3000, 3000, 3001)]
        for each in stored:
            swapper.loaded(swapper.read(each))
            swapper.drop(each)
    assert swapper.held() == {"host": 0, "nvme": 4096 + 3 * 12288}


def test_reserved_slots_are_the_ones_used(swapper):
    swapper.reserve([100, 5000, 5000], "nvme")
    held = swapper.held()
    for nbytes in (100, 5000, 5000):
        swapper.written(swapper.write(torch.ones(nbytes, dtype=torch.uint8), "x", "nvme"))
    assert swapper.held() == held == {"host": 0, "nvme": 4096 + 2 * 8192}


@given(st.integers(0, 2**40))
def test_a_slot_has_room_and_at_most_an_eighth_more(nbytes):
    capacity = slot_bytes(nbytes)
    assert nbytes <= capacity < nbytes * 1.125 + 4096 + 1
    assert capacity % 4096 == 0


@pytest.mark.parametrize("tier", TIERS)
def test_a_tensor_dies_when_it_is_written(swapper, tier):
    tensor = torch.ones(5 * CHUNK)
    memory = weakref.ref(tensor.untyped_storage())
    gone = weakref.ref(tensor)
    transfer = swapper.write(tensor, "x", tier)
    swapper.written(transfer)
    del tensor
    assert gone() is None
    assert memory() is None


@pytest.mark.parametrize(("num_threads", "num_buffers"), [(1, 4), (4, 1), (4, 2), (2, 4)])
def test_buffers_stay_within_the_pool(make_swapper, num_threads, num_buffers):
    swapper = make_swapper(num_threads=num_threads, num_buffers=num_buffers)
    tensors = [random_tensor((20 * CHUNK + i,), torch.uint8, i) for i in range(8)]
    writes = [swapper.write(tensor, "x", "nvme") for tensor in tensors]
    stored = [swapper.written(write) for write in writes]
    for read, tensor in zip([swapper.read(each) for each in stored], tensors, strict=True):
        assert_same(swapper.loaded(read), tensor)
    assert 1 <= swapper.buffers.num_made <= min(num_threads, num_buffers)


# ---- the rest of the interface


def test_traffic_counts_bytes_by_tier_and_direction(swapper):
    start = swapper.traffic()
    for nbytes in (1, 5000):
        there_and_back(swapper, torch.ones(nbytes, dtype=torch.uint8), "host")
        there_and_back(swapper, torch.ones(nbytes, dtype=torch.uint8), "nvme")
    stored = swapper.written(swapper.write(torch.ones(7, dtype=torch.uint8), "x", "nvme"))
    moved = swapper.traffic().since(start)
    assert moved.written == {"host": 5001, "nvme": 4096 + 8192 + 4096}
    assert moved.read == {"host": 5001, "nvme": 4096 + 8192}
    assert swapper.traffic().since(swapper.traffic()).read == {"host": 0, "nvme": 0}
    swapper.drop(stored)


@pytest.mark.parametrize("tier", TIERS)
def test_settled_homes_hold_what_was_written(make_swapper, tier, monkeypatch):
    swapper = make_swapper()
    gate = Gate(swapper, monkeypatch)
    home = swapper.home("p", (3 * CHUNK,), torch.uint8, tier)
    write = swapper.write(torch.full_like(home, 7), "p", tier, into=home)
    assert not home.any()
    gate.opened.set()
    swapper.settle()
    assert (home == 7).all()
    swapper.written(write)


def test_an_abandoned_step_leaves_slots_free_and_homes_in_place(swapper):
    home = swapper.home("p", (10,), torch.float32, "host")
    swapper.written(swapper.write(torch.ones(10), "p", "host", into=home))
    for _ in range(3):
        stored = swapper.written(swapper.write(torch.ones(10), "x", "host"))
        swapper.read(stored)
        swapper.write(torch.ones(10), "y", "host")
        swapper.abandon()
        with pytest.raises(OffloadError, match="dropped"):
            swapper.read(stored)
    assert swapper.held()["host"] == 3 * 4096
    assert_same(swapper.loaded(swapper.read("p")), torch.ones(10))


def test_no_thread_runs_before_the_first_transfer(make_swapper):
    before = threading.active_count()
    swapper = make_swapper(num_threads=3)
    swapper.home("p", (3,), torch.float32, "nvme")
    assert threading.active_count() == before
    swapper.written(swapper.write(torch.ones(3), "x", "host"))
    assert threading.active_count() == before + 3
    swapper.close()
    assert threading.active_count() == before


def test_values_out_of_range_are_refused(tmp_path):
    for options, where in (
        ({"io": "mmap"}, "io: expected .*, got 'mmap'"),
        ({"buffer_bytes": 5000}, "buffer_bytes: expected a multiple of 4096 above 0, got 5000; give 4096"),
        ({"buffer_bytes": 0}, "buffer_bytes: .* got 0"),
        ({"num_buffers": 0}, "num_buffers: expected 1 or more, got 0"),
        ({"num_threads": -1}, "num_threads: expected 1 or more, got -1"),
    ):
        with pytest.raises(PlanError, match=where):
            Swapper(CPU, directory=tmp_path, **options)
    with pytest.raises(PlanError, match="expected a CPU or CUDA device, got 'meta'"):
        Swapper(torch.device("meta"))
    assert list(tmp_path.iterdir()) == []
