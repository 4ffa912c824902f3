"""The directory that one process's files are in: made at start, removed at the end, and by the next start if need be.

[Note: who is alive]
The owner holds a lock (flock) on its directory for as long as it lives; the kernel drops it however the process ends.
So a directory whose lock can be had belongs to nobody. A process id in the name would not say that: ids are used
again, and in two containers the same id is two processes. A directory is there for a moment before it is locked; its
maker therefore looks, once it has the lock, whether the directory is still there, and else makes another.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import weakref
from collections.abc import Callable
from pathlib import Path

from fxzero.runtime.swap.files import file_error

log = logging.getLogger("fxzero")

PREFIX = "fxzero-swap"


class RunDirectory:
    """A directory of this process alone, mode 0700, below `parent`; removed by `remove`, or when the process ends.

    Left-over directories of dead processes of this user and host are removed first, with a line in the log.

    Args:
        parent: exists, and can be written to.

    Raises:
        OffloadError: it does not exist, is no directory, or cannot be written to.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent.absolute()
        what = f"offload directory {self.parent}"
        try:
            remove_leftovers(self.parent)
            self.path, lock = _make_locked(self.parent)
        except OSError as error:
            expected = "an existing directory that can be written to"
            raise file_error(what, expected, error) from error
        self.remove: Callable[[], object] = weakref.finalize(self, _remove, self.path, lock, os.getpid())


def name_of_host() -> str:
    """This host's name, as far as it may stand in a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", socket.gethostname())[:64]


def remove_leftovers(parent: Path) -> None:
    """Remove directories that dead processes of this user and host left below `parent` ([Note: who is alive])."""
    for path in sorted(parent.iterdir()):
        if not re.fullmatch(rf"{PREFIX}-{re.escape(name_of_host())}-\d+-[0-9a-f]{{16}}", path.name):
            continue
        lock = _lock(path)
        if lock is None:
            continue
        log.warning("removing %s, left over from a process that has ended", path)
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_locked(parent: Path) -> tuple[Path, int | None]:
    while True:
        path = parent / f"{PREFIX}-{name_of_host()}-{os.getpid()}-{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            lock = _lock(path, wait=True)
        except OSError:  # a file system without locks: then nobody removes what is not locked, either
            log.warning("%s cannot be locked: if this process dies, remove it by hand", path)
            return path, None
        if lock is not None:
            return path, lock


def _lock(path: Path, *, wait: bool = False) -> int | None:
    """The open, locked directory at `path`; None where another holds the lock, or it is no directory of ours.

    Raises:
        OSError: with `wait` only: the file system has no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if path.exists() and os.fstat(descriptor).st_uid == os.geteuid():
            return descriptor
    except OSError:
        if wait:
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _remove(path: Path, lock: int | None, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked process: the directory is its parent's
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)
