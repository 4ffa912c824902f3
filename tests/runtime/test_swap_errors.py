"""Whatever goes wrong is an OffloadError that names tensor and file, each time one asks; nothing hangs."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from fxzero.errors import OffloadError, PlanError
from fxzero.runtime.swap import Swapper, workers

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
UNTOUCHED = "the last checkpoint is untouched"


def run_python(source: str, *, fails: bool = False) -> str:
    """What a Python process prints, or, where it fails, its last line of stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source], env=env, text=True, capture_output=True, timeout=120, check=False
    )
    assert (done.returncode != 0) == fails, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr.strip().splitlines()[-1] if fails else done.stdout


def data_files(swapper: Swapper) -> list[Path]:
    directory = swapper._places.directory
    assert directory is not None
    return sorted(directory.iterdir())


def fail_with(number: int):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


# ---- at set-up


def test_no_directory(tmp_path):
    swapper = Swapper(CPU)
    for launch in (
        lambda: swapper.home("p", (3,), torch.float32, "nvme"),
        lambda: swapper.write(torch.ones(3), "p", "nvme"),
    ):
        with pytest.raises(OffloadError, match="tensor 'p': expected a directory for the nvme tier, got none"):
            launch()
    swapper.close()


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_directory_that_is_none(tmp_path, kind):
    path = tmp_path / "below"
    if kind == "a file":
        path.write_text("")
    with pytest.raises(
        OffloadError, match=rf"offload directory {path}: expected an existing directory .*; .*directory"
    ):
        Swapper(CPU, directory=path)


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.EROFS, "mounted for writing"), (errno.EACCES, "make the directory writable")]
)
def test_a_directory_that_cannot_be_written_to(tmp_path, monkeypatch, number, fix):
    """Planted: the tests may run as root, whom no mode stops."""
    monkeypatch.setattr(os, "mkdir", fail_with(number))
    with pytest.raises(OffloadError, match=rf"offload directory .*: .*{os.strerror(number)}; .*{fix}"):
        Swapper(CPU, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_refused(make_swapper, tmp_path, monkeypatch):
    """Planted: most file systems here take O_DIRECT."""
    real_open = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PlanError, match=rf"offload directory {tmp_path}: .*O_DIRECT.*refused: .*io=\"buffered\""):
        Swapper(CPU, directory=tmp_path, io="direct")
    assert list(tmp_path.iterdir()) == []
    swapper = make_swapper(io="buffered")
    swapper.written(swapper.write(torch.ones(3), "x", "nvme"))


def test_too_little_space(swapper, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=8191)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    swapper.home("fits", (2000,), torch.uint8, "nvme")
    for what, launch in (
        ("home of tensor 'p'", lambda: swapper.home("p", (2049,), torch.float32, "nvme")),
        ("tensor 'p'", lambda: swapper.write(torch.ones(2049), "p", "nvme")),
        ("1 slots in nvme", lambda: swapper.reserve([2049 * 4], "nvme")),
    ):
        with pytest.raises(
            OffloadError, match=rf"{what}: expected 12,288 bytes free in .*, got 8,191; free space there"
        ):
            launch()


def test_a_disk_that_fills_up_while_a_file_is_made(swapper, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.ENOSPC))
    with pytest.raises(OffloadError, match=r"'p': expected a new file of 4,096 bytes, /.*No space left.*free space"):
        swapper.home("p", (5,), torch.float32, "nvme")
    assert data_files(swapper) == []
    monkeypatch.undo()
    swapper.home("p", (5,), torch.float32, "nvme")


def test_a_limit_on_file_sizes_shows_at_set_up(tmp_path, direct_io):
    io = "direct" if direct_io else "buffered"
    last = run_python(
        f"""
import resource, torch, pathlib
from fxzero.runtime.swap import Swapper
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
swapper = Swapper(torch.device("cpu"), directory=pathlib.Path({str(tmp_path)!r}), io={io!r})
swapper.home("fits", (2**18,), torch.float32, "nvme")
swapper.home("p", (2**18 + 1,), torch.float32, "nvme")
""",
        fails=True,
    )
    assert "OffloadError: home of tensor 'p': expected a new file of 1,052,672 bytes" in last
    assert "ulimit -f" in last
    assert list(tmp_path.iterdir()) == []  # removed, although the program failed


def test_no_host_memory(swapper):
    with pytest.raises(OffloadError, match=r"home of tensor 'p': expected 1,.* bytes of host memory"):
        swapper.home("p", (2**60,), torch.uint8, "host")


# ---- in the middle of a run


def fails_twice(swapper: Swapper, wait, transfer, match: str) -> OffloadError:
    """The error of a wait, which is the same when one waits again; afterwards the swapper works and closes."""
    with pytest.raises(OffloadError, match=match) as first:
        wait(transfer)
    with pytest.raises(OffloadError) as second:
        wait(transfer)
    assert (str(second.value), vars(second.value)) == (str(first.value), vars(first.value))
    assert second.value.__cause__ is first.value.__cause__
    return first.value


def still_works(swapper: Swapper) -> None:
    for tier in ("host", "nvme"):
        tensor = torch.arange(9999)
        stored = swapper.written(swapper.write(tensor, "y", tier))
        assert torch.equal(swapper.loaded(swapper.read(stored)), tensor)
    swapper.close()
    assert not any(thread.name.startswith("fxzero-swap") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (fail_with(errno.EIO), "Input/output error; look at the disk"),
        (fail_with(errno.ENOSPC), "No space left on device; free space there"),
        (lambda *_: 0, "only 0 of them; look at the disk"),
    ],
)
def test_a_write_that_fails(swapper, monkeypatch, call, got):
    home = swapper.home("p", (10000,), torch.float32, "nvme")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", call)
        write = swapper.write(torch.ones(10000), "p", "nvme", into=home)
        where = r"write of tensor 'p' to nvme: expected bytes .* to be written to /.*0-p, got"
        error = fails_twice(swapper, swapper.written, write, rf"{where} .*{got}.*{UNTOUCHED}")
    # What was to be read is not there; a read gives the write's error until a write succeeds.
    assert fails_twice(swapper, swapper.loaded, swapper.read("p"), "write of tensor 'p'").args == error.args
    swapper.written(swapper.write(torch.ones(10000), "p", "nvme", into=home))
    assert torch.equal(swapper.loaded(swapper.read("p")), home)
    still_works(swapper)


def test_a_read_of_host_memory_that_was_not_written_gives_the_error_of_the_write(swapper, monkeypatch):
    home = swapper.home("p", (10000,), torch.float32, "host")
    with monkeypatch.context() as patched:
        patched.setattr(ctypes, "memmove", fail_with(errno.EFAULT))
        write = swapper.write(torch.ones(10000), "p", "host", into=home)
        fails_twice(swapper, swapper.written, write, "write of tensor 'p' to host")
    fails_twice(swapper, swapper.loaded, swapper.read("p"), "write of tensor 'p' to host")
    swapper.written(swapper.write(torch.ones(10000), "p", "host", into=home))
    assert torch.equal(swapper.loaded(swapper.read("p")), home)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (fail_with(errno.EIO), "Input/output error; look at the disk"),
        (lambda *_: 0, "only 0 of them; look at the disk"),
    ],
)
def test_a_read_that_fails(swapper, monkeypatch, call, got):
    stored = swapper.written(swapper.write(torch.ones(10000), "x", "nvme"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", call)
        where = r"read of tensor 'x' from nvme: expected bytes .* to be read from /.*0-slot, got"
        fails_twice(swapper, swapper.loaded, swapper.read(stored), rf"{where} .*{got}.*{UNTOUCHED}")
    assert torch.equal(swapper.loaded(swapper.read(stored)), torch.ones(10000))
    still_works(swapper)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_transfer_in_several_calls_of_the_system_is_carried_on(make_swapper, monkeypatch, io):
    """Linux moves at most 2 GiB a call, and may move less."""
    swapper = make_swapper(io=io)
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: pwritev(fd, [data[0][:4096]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, data, offset: preadv(fd, [data[0][:4096]], offset))
    tensor = torch.arange(5000)
    stored = swapper.written(swapper.write(tensor, "x", "nvme"))
    assert torch.equal(swapper.loaded(swapper.read(stored)), tensor)


def test_a_short_transfer_that_cannot_be_carried_on(make_swapper, monkeypatch):
    """Direct I/O goes on only from a multiple of the block."""
    swapper = make_swapper(io="direct")
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: pwritev(fd, data, offset) - 100)
    write = swapper.write(torch.ones(10), "x", "nvme")
    fails_twice(swapper, swapper.written, write, "write of tensor 'x' .*, got only 3,996 of them")


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("harm", ["gone", "truncated"])
def test_a_file_that_something_else_changed(make_swapper, harm, io):
    swapper = make_swapper(io=io)
    stored = swapper.written(swapper.write(torch.ones(10000), "x", "nvme"))
    home = swapper.home("p", (10000,), torch.float32, "nvme")
    for path in data_files(swapper):
        if harm == "gone":
            path.unlink()
        else:
            os.truncate(path, 4096)
    got = "No such file" if harm == "gone" else "4,096: something else has changed it"
    fails_twice(swapper, swapper.loaded, swapper.read(stored), rf"read of tensor 'x' .*-slot.*{got}.*{UNTOUCHED}")
    write = swapper.write(torch.ones(10000), "p", "nvme", into=home)
    fails_twice(swapper, swapper.written, write, rf"write of tensor 'p' .*-p.*{got}.*{UNTOUCHED}")
    swapper.abandon()
    swapper.close()


def test_an_error_that_is_none_of_ours_names_the_tensor(swapper, monkeypatch):
    monkeypatch.setattr(ctypes, "memmove", fail_with(errno.EFAULT))
    match = r"write of tensor 'x' to host: expected it to succeed, got OSError: .*Bad address; report this"
    error = fails_twice(swapper, swapper.written, swapper.write(torch.ones(10), "x", "host"), match)
    assert isinstance(error.__cause__, OSError)
    monkeypatch.undo()
    still_works(swapper)


def test_a_failed_transfer_keeps_no_tensor(swapper, monkeypatch):
    monkeypatch.setattr(os, "pwritev", fail_with(errno.EIO))
    tensor = torch.ones(10000)
    memory = weakref.ref(tensor.untyped_storage())
    transfer = swapper.write(tensor, "x", "nvme")
    with pytest.raises(OffloadError):
        swapper.written(transfer)
    del tensor, transfer
    gc.collect()
    assert memory() is None


def test_an_error_keeps_nothing_of_the_step_that_it_ended(swapper, monkeypatch):
    """The home remembers that it was not written, but not who wanted to know."""
    monkeypatch.setattr(os, "pwritev", fail_with(errno.EIO))
    home = swapper.home("p", (10,), torch.float32, "nvme")

    class Activation:
        """Stands for a tensor in a local variable of the step."""

    seen = []

    def step():
        activation = Activation()
        seen.append(weakref.ref(activation))
        swapper.written(swapper.write(torch.ones(10), "p", "nvme", into=home))

    with pytest.raises(OffloadError) as info:
        step()
    assert seen[0]() is not None
    del info
    gc.collect()
    assert seen[0]() is None


def test_settle_raises_what_nobody_waited_for_and_abandon_forgets_it(swapper, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", fail_with(errno.EIO))
        swapper.write(torch.ones(10), "x", "nvme")
        with pytest.raises(OffloadError, match="write of tensor 'x'"):
            swapper.settle()
        swapper.abandon()
    swapper.settle()
    still_works(swapper)


# ---- threads, processes, end


def test_a_wait_for_a_dead_thread_raises(make_swapper, monkeypatch):
    monkeypatch.setattr(workers, "CHECK_S", 0.05)
    monkeypatch.setattr(workers.Workers, "_serve", lambda self: None)  # planted: threads that end at once
    swapper = make_swapper()
    write = swapper.write(torch.ones(3), "x", "nvme")
    fails_twice(swapper, swapper.written, write, "write of tensor 'x' .*alive, got dead: fxzero-swap-0, fxzero-swap-1")
    swapper.close()


def test_closing_drops_what_has_not_begun(make_swapper, monkeypatch):
    swapper = make_swapper(num_threads=1)
    began, go_on = threading.Event(), threading.Event()
    pwritev = os.pwritev

    def slow(*args):
        began.set()
        assert go_on.wait(20)
        return pwritev(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    home = swapper.home("p", (10,), torch.float32, "nvme")
    transfers = [swapper.write(torch.ones(10), "p", "nvme", into=home) for _ in range(3)]
    read = swapper.read("p")
    assert began.wait(20)
    threading.Timer(0.1, go_on.set).start()
    swapper.close()
    for transfer in transfers:
        fails_twice(swapper, swapper.written, transfer, "write of tensor 'p' .*, got one that was closed before")
    fails_twice(swapper, swapper.loaded, read, "closed before")
    swapper.close()
    for launch in (
        lambda: swapper.write(torch.ones(3), "x", "host"),
        lambda: swapper.home("q", (3,), torch.float32, "host"),
        lambda: swapper.reserve([3], "host"),
    ):
        with pytest.raises(OffloadError, match="expected an open swapper, got a closed one"):
            launch()


def test_a_thread_stuck_in_the_kernel_does_not_hold_closing_up(make_swapper, monkeypatch):
    monkeypatch.setattr(workers, "CLOSE_S", 0.1)
    go_on = threading.Event()
    swapper = make_swapper()
    monkeypatch.setattr(os, "pwritev", lambda *_: go_on.wait(20) and 0)
    swapper.write(torch.ones(3), "x", "nvme")
    start = time.monotonic()
    swapper.close()
    assert time.monotonic() - start < 10
    go_on.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_gets_an_error_and_removes_nothing(tmp_path, direct_io):
    """In a process of its own: pytest's must not be forked."""
    io = "direct" if direct_io else "buffered"
    out = run_python(f"""
import os, sys, torch, pathlib
from fxzero.errors import OffloadError
from fxzero.runtime.swap import Swapper
swapper = Swapper(torch.device("cpu"), directory=pathlib.Path({str(tmp_path)!r}), io={io!r})
stored = swapper.written(swapper.write(torch.ones(3), "x", "nvme"))
pid = os.fork()
if pid == 0:
    try:
        swapper.read(stored)
    except OffloadError as error:
        print(error, flush=True)
    sys.exit(0)  # finalizers run here, too
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print(swapper.loaded(swapper.read(stored)).tolist())
""")
    said, read = out.splitlines()
    assert said.startswith("read of tensor 'x' from nvme: expected a call in process ")
    assert "forked from it" in said
    assert read == "[1.0, 1.0, 1.0]"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_moved_is_named(swapper):
    for tensor in (torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(OffloadError, match="tensor 'x': expected a plain strided tensor on cpu, got Tensor with"):
            swapper.write(tensor, "x", "host")
    with pytest.raises(OffloadError, match='expected tier "host" or "nvme", got \'disk\''):
        swapper.write(torch.ones(3), "x", "disk")


def test_a_home_that_is_not_the_one_is_named(swapper):
    home = swapper.home("p", (3,), torch.float32, "host")
    for tensor, name, tier, into in (
        (torch.ones(3), "q", "host", home),
        (torch.ones(3), "p", "nvme", home),
        (torch.ones(3), "p", "host", torch.ones(3)),
        (torch.ones(4), "p", "host", home),
        (torch.ones(3).double(), "p", "host", home),
    ):
        with pytest.raises(OffloadError, match=rf"write of tensor '{name}' to {tier}: expected the home of that name"):
            swapper.write(tensor, name, tier, into=into)
    with pytest.raises(OffloadError, match="read of tensor 'q': expected a home of that name, got none"):
        swapper.read("q")


def test_waits_are_not_mixed_up(swapper):
    write = swapper.write(torch.ones(3), "x", "host")
    with pytest.raises(OffloadError, match="tensor 'x': expected a read, got a write"):
        swapper.loaded(write)
    read = swapper.read(swapper.written(write))
    with pytest.raises(OffloadError, match="tensor 'x': expected a write, got a read"):
        swapper.written(read)
