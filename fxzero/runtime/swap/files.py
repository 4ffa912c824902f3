"""Files that tensors are streamed to and from, past the page cache.

A file is as long as its tensor, padded up to a multiple of BLOCK_BYTES, and is given its blocks when it is made, so
that a full disk shows there and not in the middle of a step.

A file is opened for each chunk and closed after it, for three reasons. A model has thousands of tensors and a process
often no more than 1,024 descriptors; so, never more are open than threads run. To open a file takes microseconds, to
move a chunk milliseconds. And a file that was removed is found out, where a descriptor would go on into nowhere.

[Note: coherence]
A file is also mapped, as the tensor that users and checkpoints see. On Linux a direct read first writes dirty pages
of the mapping back, and a direct write drops the pages that it made stale, so each sees the other without msync
(which would cost a flush of the device per tensor). `check_direct_io` tries this out on the very file system before
it is relied on.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxzero.errors import OffloadError, PlanError
from fxzero.runtime.swap.workers import UNTOUCHED

BLOCK_BYTES = 4096  # alignment of addresses, offsets and lengths; covers disks with sectors of 512 and 4096 bytes
IO = ("direct", "buffered")


def padded(nbytes: int) -> int:
    """Bytes, up to the next multiple of BLOCK_BYTES."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True)
class BlockFile:
    """A file of `nbytes`, a multiple of BLOCK_BYTES.

    Args:
        io: "direct" goes past the page cache; "buffered" through it, dropping the pages afterwards.
    """

    path: Path
    nbytes: int
    io: str

    def create(self, what: str) -> None:
        """Make the file and give it its blocks.

        Args:
            what: the tensor or value that it is for, for errors.

        Raises:
            OffloadError: no space, no permission, no directory; names the file and how much is free.
        """
        try:
            free_bytes = shutil.disk_usage(self.path.parent).free
            if free_bytes < self.nbytes:
                raise OffloadError.of(
                    what,
                    expected=f"{self.nbytes:,} bytes free in {self.path.parent}",
                    got=f"{free_bytes:,}",
                    fix="free space there, give another directory, or offload less",
                )
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self.nbytes)
            except OSError:
                os.unlink(self.path)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise file_error(what, f"a new file of {self.nbytes:,} bytes, {self.path}", error) from error

    def map(self, what: str) -> torch.Tensor:
        """uint8[nbytes] that is the file, shared with whatever else reads and writes it ([Note: coherence]).

        It holds no descriptor (Python's own mmap would), and lives on when the file is removed. torch's profiler counts
        it as memory of the CPU; its CPU allocator knows nothing of it.
        """
        try:
            return torch.from_file(str(self.path), shared=True, size=self.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise OffloadError.of(
                what, expected=f"a mapping of {self.path}", got=str(error), fix=f"look at `ulimit -v`; {UNTOUCHED}"
            ) from error

    def write(self, data: memoryview, offset: int, what: str) -> None:
        """Write `data`, aligned and padded as BLOCK_BYTES asks, at `offset`.

        Raises:
            OffloadError: an I/O error, a short write, a file that is gone or was cut short.
        """
        self._move(os.pwritev, data, offset, what, writes=True)

    def read(self, data: memoryview, offset: int, what: str) -> None:
        """Fill `data`, aligned and padded as BLOCK_BYTES asks, from `offset`; raises as `write`."""
        self._move(os.preadv, data, offset, what, writes=False)

    def _move(
        self,
        call: Callable[[int, list[memoryview], int], int],
        data: memoryview,
        offset: int,
        what: str,
        *,
        writes: bool,
    ) -> None:
        doing = "written to" if writes else "read from"
        expected = f"bytes {offset:,} to {offset + len(data):,} to be {doing} {self.path}"
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self.io == "direct" else 0)
        try:
            descriptor = os.open(self.path, flags)
            try:
                self._check_length(os.fstat(descriptor).st_size, what)
                moved = 0
                while moved < len(data):
                    count = call(descriptor, [data[moved:]], offset + moved)
                    moved += count
                    if count == 0 or (moved < len(data) and self.io == "direct" and count % BLOCK_BYTES):
                        raise OffloadError.of(what, expected=expected, got=f"only {moved:,} of them", fix=LOOK_AT_DISK)
                if self.io == "buffered":
                    self._drop_pages(descriptor, offset, len(data), writes=writes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise file_error(what, expected, error) from error

    def _check_length(self, nbytes: int, what: str) -> None:
        if nbytes == self.nbytes:
            return
        raise OffloadError.of(
            what,
            expected=f"the file {self.path} to have {self.nbytes:,} bytes",
            got=f"{nbytes:,}: something else has changed it",
            fix=f"keep other programs out of that directory, and start again from the last checkpoint; {UNTOUCHED}",
        )

    def _drop_pages(self, descriptor: int, offset: int, nbytes: int, *, writes: bool) -> None:
        if writes:
            os.fdatasync(descriptor)  # only clean pages can be dropped
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


LOOK_AT_DISK = f"look at the disk and at the kernel's log; {UNTOUCHED}"

WHAT_TO_DO = {
    errno.ENOSPC: "free space there, give another directory, or offload less",
    errno.EDQUOT: "free space within the quota, give another directory, or offload less",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "make the directory writable for this user, or give another one",
    errno.EPERM: "make the directory writable for this user, or give another one",
    errno.EROFS: "give a directory on a file system that is mounted for writing",
    errno.ENOENT: "make the directory, and let nothing remove it or its files while the program runs",
    errno.ENOTDIR: "give a directory, not a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def file_error(what: str, expected: str, error: OSError) -> OffloadError:
    """The OffloadError for an error of the operating system, with what to do about this one."""
    fix = WHAT_TO_DO.get(error.errno or 0)
    fix = LOOK_AT_DISK if fix is None else f"{fix}; {UNTOUCHED}"
    return OffloadError.of(what, expected=expected, got=f"{type(error).__name__}: {error.strerror or error}", fix=fix)


def check_direct_io(directory: Path, home: Path) -> None:
    """Raise unless direct I/O works below a directory, and sees what a mapping of the same file sees.

    Args:
        directory: where a probe file may be made and removed.
        home: the directory that the user gave, for the message.

    Raises:
        PlanError: direct I/O is refused, or mappings and direct I/O do not see each other's bytes.
        OffloadError: anything else, such as a full disk.
    """
    probe = BlockFile(directory / "probe", BLOCK_BYTES, "direct")
    what = f"offload directory {home}"
    if not hasattr(os, "O_DIRECT"):
        raise _refused(what, "an operating system without O_DIRECT")
    probe.create(what)
    try:
        try:
            coherent = _is_coherent(probe, what)
        except OffloadError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                raise _refused(what, f"refused: {error.__cause__.strerror}") from error
            raise
        if not coherent:
            raise _refused(what, "mapped files that do not show what was written directly")
    finally:
        probe.path.unlink(missing_ok=True)


def _is_coherent(probe: BlockFile, what: str) -> bool:
    mapping = probe.map(what)
    with mmap.mmap(-1, BLOCK_BYTES) as buffer, memoryview(buffer) as view:
        mapping[0] = ord("m")
        probe.read(view, 0, what)
        seen_by_read = view[:1] == b"m"
        view[:1] = b"d"
        probe.write(view, 0, what)
        return seen_by_read and bool(mapping[0] == ord("d"))


def _refused(what: str, got: str) -> PlanError:
    return PlanError.of(
        what,
        expected="a file system with direct I/O (O_DIRECT)",
        got=got,
        fix='give a directory on a local disk, or set io="buffered"',
    )
