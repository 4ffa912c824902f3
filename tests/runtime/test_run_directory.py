"""Files are in a directory of the process alone, and gone with it; those of living processes are left alone."""

from __future__ import annotations

import logging
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxzero.runtime.swap import Swapper, run_directory
from fxzero.runtime.swap.run_directory import PREFIX, RunDirectory, name_of_host

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

# Makes a run directory with a file in it, says so, and then does what it is told.
OWNER = """
import os, sys, signal, pathlib
from fxzero.runtime.swap.run_directory import RunDirectory
owned = RunDirectory(pathlib.Path(sys.argv[1]))
(owned.path / "data").write_text("x")
print(owned.path, flush=True)
command = sys.stdin.readline().strip()
if command == "raise":
    raise RuntimeError
if command == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if command == "terminate":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.kill(os.getpid(), signal.SIGTERM)
"""


def start_owner(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(parent)],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], command: str) -> int:
    process.communicate(command + "\n", timeout=60)
    return process.returncode


def test_the_directory_is_private_and_removed_with_its_owner(tmp_path):
    owned = RunDirectory(tmp_path)
    assert re.fullmatch(rf"{PREFIX}-{re.escape(name_of_host())}-{os.getpid()}-[0-9a-f]{{16}}", owned.path.name)
    assert stat.S_IMODE(owned.path.stat().st_mode) == 0o700
    (owned.path / "data").write_text("x")
    del owned
    assert list(tmp_path.iterdir()) == []


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    owned = RunDirectory(Path())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert owned.path.parent == tmp_path
    owned.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("command", ["return", "raise", "terminate"])
def test_a_process_that_ends_removes_its_directory(tmp_path, command):
    process, path = start_owner(tmp_path)
    assert (path / "data").exists()
    assert end(process, command) == (0 if command == "return" else 1)
    assert list(tmp_path.iterdir()) == []


def test_only_what_dead_processes_left_is_removed(tmp_path, caplog):
    killed, left_over = start_owner(tmp_path)
    living, used = start_owner(tmp_path)
    own = RunDirectory(tmp_path)
    assert end(killed, "kill") == -signal.SIGKILL
    others = [
        tmp_path / f"{PREFIX}-{name_of_host()}x-1-{'0' * 16}",  # of another host
        tmp_path / f"{PREFIX}-{name_of_host()}-1-mine",  # not a name that we give
        tmp_path / "checkpoint",
    ]
    for path in others:
        path.mkdir()
    with caplog.at_level(logging.WARNING, logger="fxzero"):
        new = RunDirectory(tmp_path)
    assert caplog.messages == [f"removing {left_over}, left over from a process that has ended"]
    assert set(tmp_path.iterdir()) == {used, own.path, new.path, *others}
    assert (used / "data").exists()
    assert end(living, "return") == 0


def test_a_link_is_not_followed(tmp_path, caplog):
    target = tmp_path / "target"
    target.mkdir()
    (target / "data").write_text("x")
    below = tmp_path / "below"
    below.mkdir()
    (below / f"{PREFIX}-{name_of_host()}-1-{'0' * 16}").symlink_to(target)
    RunDirectory(below)
    assert (target / "data").exists()
    assert caplog.messages == []


def test_what_another_user_left_is_not_removed(tmp_path, monkeypatch):
    path = tmp_path / f"{PREFIX}-{name_of_host()}-1-{'0' * 16}"
    path.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    run_directory.remove_leftovers(tmp_path)
    assert path.exists()
    monkeypatch.undo()
    run_directory.remove_leftovers(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_directory_taken_for_left_over_is_made_again(tmp_path, monkeypatch, moment):
    """Planted: another process starts in the moment between mkdir and lock."""
    mkdir, flock = Path.mkdir, run_directory.fcntl.flock
    made, removed = [], []

    def start_another():
        if not removed:
            removed.extend(made)
            run_directory.remove_leftovers(tmp_path)
            assert not made[0].exists()

    def mkdir_then(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        made.append(path)
        if moment == "before it is opened":
            start_another()

    def then_flock(*args):
        start_another()
        flock(*args)

    monkeypatch.setattr(Path, "mkdir", mkdir_then)
    monkeypatch.setattr(run_directory.fcntl, "flock", then_flock)
    owned = RunDirectory(tmp_path)
    assert [owned.path] == made[1:] == list(tmp_path.iterdir())


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING, logger="fxzero"):
        first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    assert set(tmp_path.iterdir()) == {first.path, second.path}
    assert "cannot be locked" in caplog.text
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_swapper_that_dies_takes_its_files_along(make_swapper, tmp_path, direct_io):
    swapper = Swapper(CPU, directory=tmp_path, io="direct" if direct_io else "buffered")
    swapper.written(swapper.write(torch.ones(3), "x", "nvme"))
    home = swapper.home("p", (3,), torch.float32, "nvme")
    del swapper
    assert list(tmp_path.iterdir()) == []
    assert home.tolist() == [0, 0, 0]


def test_names_of_tensors_are_never_paths(swapper, tmp_path):
    names = ["../x", "a/b", "a b", "a_b", ".", "", "x" * 300, "\N{GREEK SMALL LETTER ALPHA}", "a\nb", "A", "a"]
    homes = {name: swapper.home(name, (2,), torch.int64, "nvme") for name in names}
    for index, name in enumerate(names):
        swapper.written(swapper.write(torch.full((2,), index), name, "nvme", into=homes[name]))
    for index, name in enumerate(names):
        assert swapper.loaded(swapper.read(name)).tolist() == homes[name].tolist() == [index, index]
    (directory,) = tmp_path.iterdir()
    assert len(list(directory.iterdir())) == len(names)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())


def test_a_file_holds_nothing_of_other_tensors(make_swapper):
    """What a buffer held before does not get into the padding."""
    swapper = make_swapper(num_threads=1)
    swapper.written(swapper.write(torch.full((8192,), 255, dtype=torch.uint8), "x", "nvme"))
    stored = swapper.written(swapper.write(torch.full((10,), 7, dtype=torch.uint8), "y", "nvme"))
    assert stored.place.file.path.read_bytes() == bytes([7] * 10) + bytes(4086)


def test_thousands_of_tensors_under_a_small_limit_of_open_files(tmp_path, direct_io):
    source = f"""
import resource, torch, pathlib
from fxzero.runtime.swap import Swapper
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
io = {"direct" if direct_io else "buffered"!r}
with Swapper(torch.device("cpu"), directory=pathlib.Path({str(tmp_path)!r}), io=io, num_threads=4) as swapper:
    homes = [swapper.home(str(i), (5,), torch.int64, "nvme") for i in range(2000)]
    writes = [swapper.write(torch.full((5,), i), str(i), "nvme", into=home) for i, home in enumerate(homes)]
    reads = [swapper.read(str(i)) for i in range(2000)]
    for i, (write, read) in enumerate(zip(writes, reads)):
        swapper.written(write)
        assert swapper.loaded(read)[0] == i
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", source], env=env, check=True, timeout=120)
