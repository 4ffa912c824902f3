"""What the operating system says of memory in use and bytes moved, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxzero.runtime.swap.files import BlockFile

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

PREPARE = """
import json, pathlib, sys, torch
from fxzero.runtime.swap import Swapper
MIB = 2**20
torch.set_num_threads(1)

def proc(name, key):
    lines = pathlib.Path("/proc/self", name).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])
"""

# Writes one tensor of 16 MiB to 16 slots at once, then reads them one by one.
PEAK = """
num_buffers, buffer_bytes, io = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options = dict(buffer_bytes=buffer_bytes, num_buffers=num_buffers, num_threads=16, io=io)
with Swapper(torch.device("cpu"), directory=pathlib.Path(sys.argv[1]), **options) as swapper:
    value = torch.arange(4 * MIB)[: 2 * MIB]
    swapper.reserve([value.nbytes] * 16, "nvme")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = proc("status", "VmHWM")
    stored = [swapper.written(write) for write in [swapper.write(value, "x", "nvme") for _ in range(16)]]
    for each in stored:
        assert torch.equal(swapper.loaded(swapper.read(each)), value)
    print((proc("status", "VmHWM") - before) * 1024)
"""

# Bytes that the system says went to and came from the disk, and those that the swapper counted.
COUNTED = """
with Swapper(torch.device("cpu"), directory=pathlib.Path(sys.argv[1]), io="direct") as swapper:
    if sys.argv[2] == "True":  # the planted fault
        add = swapper._traffic.add
        swapper._traffic.add = lambda tier, nbytes, *, writes: add(tier, nbytes - 4095, writes=writes)
    homes = [swapper.home(str(i), (MIB + 1,), torch.uint8, "nvme") for i in range(64)]
    values = [torch.full((MIB + 1,), i, dtype=torch.uint8) for i in range(64)]
    for _ in range(2):  # the first round warms everything up
        start = swapper.traffic()
        at_start = proc("io", "write_bytes")
        for i in range(64):
            swapper.written(swapper.write(values[i], str(i), "nvme", into=homes[i]))
        written = proc("io", "write_bytes") - at_start
        at_start = proc("io", "read_bytes")
        for i in range(64):
            assert (swapper.loaded(swapper.read(str(i))) == i).all()
        read = proc("io", "read_bytes") - at_start
        moved = swapper.traffic().since(start)
    print(json.dumps([moved.written["nvme"], written, moved.read["nvme"], read]))
"""


def run(source: str, *args: object) -> str:
    """What it prints. malloc is told to give freed tensors back to the system, as it does not do by itself."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + source, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory in /proc here")
@pytest.mark.parametrize(("num_buffers", "buffer_bytes"), [(2, MIB), (16, 16 * MIB)])
def test_host_memory_is_bounded_by_the_pool(tmp_path, direct_io, num_buffers, buffer_bytes):
    """512 MiB in all. The second pool is the planted fault: without a bound, all buffers were in use at once."""
    grown = int(run(PEAK, tmp_path, num_buffers, buffer_bytes, "direct" if direct_io else "buffered"))
    allowed = 16 * MIB + 2 * MIB + 14 * MIB  # the tensor that is read, the pool, and for all else
    assert (grown < allowed) == (num_buffers == 2), f"{grown:,} bytes more at the peak"


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="no /proc/self/io here")
@pytest.mark.parametrize("padding_is_forgotten", [False, True])
def test_traffic_is_what_the_system_counts(tmp_path, direct_io, padding_is_forgotten):
    if not direct_io:
        pytest.skip("the file system of the tests' directories refuses O_DIRECT")
    counted_written, written, counted_read, read = json.loads(run(COUNTED, tmp_path, padding_is_forgotten))
    if not written and not read:
        pytest.skip("the file system of the tests' directories is in memory")
    own_records = 128 * 1024  # of the file system
    assert (0 <= written - counted_written <= own_records) == (not padding_is_forgotten), (written, counted_written)
    assert (0 <= read - counted_read <= own_records) == (not padding_is_forgotten), (read, counted_read)


def is_cached(path: Path) -> bool:
    """Whether the first bytes of a file can be read without waiting for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@pytest.fixture
def pages_can_be_dropped(tmp_path) -> None:
    """Skips where the file system is in memory, or does not say what is cached."""
    path = tmp_path / "probe"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.write(descriptor, bytes(4096))
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 4096, os.POSIX_FADV_DONTNEED)
        if is_cached(path):
            pytest.skip("the file system of the tests' directories is in memory")
    except (OSError, AttributeError) as error:
        pytest.skip(f"pages of files are not told apart here: {error}")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("io", "dropped"), [("direct", True), ("buffered", True), ("buffered", False)])
def test_the_page_cache_does_not_grow(make_swapper, pages_can_be_dropped, monkeypatch, io, dropped):
    """The planted fault is buffered I/O of which the pages are kept."""
    swapper = make_swapper(io=io)
    if not dropped:
        monkeypatch.setattr(BlockFile, "_drop_pages", lambda *_, **__: None)
    written, read = (swapper.written(swapper.write(torch.ones(10000), "x", "nvme")) for _ in range(2))
    swapper.loaded(swapper.read(read))
    for stored in (written, read):  # each once: to ask has the kernel read ahead
        assert is_cached(stored.place.file.path) == (not dropped)
