"""Threads that move bytes: work is cut into pieces, pieces run side by side, work runs after other work.

[Note: never a hang]
A piece takes a buffer only once it runs, and gives it back when it ends; it never waits for other work. What must
come first is not waited for in a thread: work stands in the queue only when all that it follows is done, and it can
follow only what was submitted before it, so there is always a piece that can run. A wait looks now and then whether
all threads still live, and raises where one does not. Threads are daemons: one that hangs in the kernel (a dead
network file system) cannot keep the process from ending.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fxzero.errors import OffloadError

Piece = Callable[[], None]

CHECK_S = 0.5  # how often a wait looks whether the threads still live
CLOSE_S = 60.0  # how long closing waits for what is in the kernel
UNTOUCHED = "the last checkpoint is untouched"


class Work:
    """Pieces under way. `done` is set when no piece runs or will run; then `error` says whether all went well.

    Args:
        what: such as "write of 'layers.0.weight' to nvme", for errors.
        pieces: run in any order, at the same time too; none after one has failed.
    """

    def __init__(self, what: str, pieces: Sequence[Piece] = ()) -> None:
        self.what = what
        self.error: OffloadError | None = None
        self.done = threading.Event()
        self.pieces: Sequence[Piece] = pieces
        self.num_left = len(pieces)
        self.num_before = 0
        self.followers: list[Work] = []

    def finished(self) -> bool:
        """Whether no piece runs or will run."""
        return self.done.is_set()

    def check(self) -> None:
        """Raise the error of this work, which is done, if it has one."""
        raise_again(self.error)


class Workers:
    """`num_threads` threads, started at the first submission."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._queue: deque[tuple[Work, Piece]] = deque()
        self._unfinished: set[Work] = set()
        self._closed = False

    def submit(self, work: Work, *, after: Iterable[Work] = ()) -> None:
        """Run the work's pieces once all of `after`, submitted here before, is done, whether well or not.

        Raises:
            OffloadError: closed, or in a process that was forked from the one that made this.
        """
        self._check_process(work)
        with self._changed:
            if self._closed:
                raise _closed(work)
            if not self._threads:
                self._start(work)
            before = [other for other in after if other in self._unfinished]
            for other in before:
                other.followers.append(work)
            work.num_before = len(before)
            self._unfinished.add(work)
            if not before:
                self._enqueue(work)

    def wait(self, work: Work) -> None:
        """Block until the work is done.

        Raises:
            OffloadError: the work's error, each time; or a thread has died.
        """
        self._check_process(work)
        while not work.done.wait(CHECK_S):
            self._check_threads(work)
        work.check()

    def close(self) -> None:
        """Let pieces that run end, drop the others with an error, and end the threads. May be called again."""
        if os.getpid() != self._pid:
            return  # a forked process: no thread is there, and one may have held the lock
        with self._changed:
            self._closed = True
            for work in self._unfinished:
                work.error = work.error or _closed(work)
            self._changed.notify_all()
        until = time.monotonic() + CLOSE_S
        for thread in self._threads:
            if thread is threading.current_thread():
                continue  # the garbage collector may close a swapper from anywhere
            thread.join(max(0.0, until - time.monotonic()))

    def _start(self, work: Work) -> None:
        for index in range(self.num_threads):
            thread = threading.Thread(target=self._serve, name=f"fxzero-swap-{index}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise OffloadError.of(
                    work.what,
                    expected=f"{self.num_threads} threads that move it",
                    got=f"{index}, then {error}",
                    fix=f"raise the limit on threads (ulimit -u); {UNTOUCHED}",
                ) from error
            self._threads.append(thread)

    def _serve(self) -> None:
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Run one piece; False when there will be none. Lets go of its tensors before the work counts as done."""
        with self._changed:
            while not self._queue:
                if self._closed and not self._unfinished:
                    return False
                self._changed.wait()
            work, piece = self._queue.popleft()
        error = None
        if work.error is None:
            try:
                piece()
            except BaseException as raised:
                error = _as_offload_error(raised, work)
        del piece
        with self._changed:
            work.error = work.error or error
            work.num_left -= 1
            if work.num_left == 0:
                self._finish(work)
        return True

    def _enqueue(self, work: Work) -> None:
        self._queue.extend((work, piece) for piece in work.pieces)
        if work.num_left == 0:
            self._finish(work)
        self._changed.notify_all()

    def _finish(self, work: Work) -> None:
        work.pieces = ()  # they hold tensors
        self._unfinished.discard(work)
        work.done.set()
        followers, work.followers = work.followers, []
        for follower in followers:
            follower.num_before -= 1
            if follower.num_before == 0:
                self._enqueue(follower)
        if self._closed:
            self._changed.notify_all()

    def _check_process(self, work: Work) -> None:
        if os.getpid() != self._pid:
            raise OffloadError.of(
                work.what,
                expected=f"a call in process {self._pid}, which has the threads and files",
                got=f"one in process {os.getpid()}, forked from it",
                fix="compile the step again in the forked process, or start processes by spawn",
            )

    def _check_threads(self, work: Work) -> None:
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        if not dead or work.done.is_set():
            return
        with self._changed:
            work.error = work.error or OffloadError.of(
                work.what,
                expected="the threads that move it to be alive",
                got=f"dead: {', '.join(dead)}",
                fix=f"start the program again; {UNTOUCHED}",
            )
        work.check()


def raise_again(error: OffloadError | None) -> None:
    """Raise a copy of an error, if there is one. Raised itself, it would keep the frames of the step with tensors."""
    if error is not None:
        raise copy.copy(error) from error.__cause__


def _closed(work: Work) -> OffloadError:
    return OffloadError.of(
        work.what,
        expected="an open swapper",
        got="one that was closed before this was done",
        fix="close it after the last step",
    )


def _as_offload_error(raised: BaseException, work: Work) -> OffloadError:
    traceback.clear_frames(raised.__traceback__)  # the line numbers stay, the tensors go
    if isinstance(raised, OffloadError):
        return raised
    error = OffloadError.of(
        work.what,
        expected="it to succeed",
        got=f"{type(raised).__name__}: {raised}",
        fix=f"report this; {UNTOUCHED}",
    )
    error.__cause__ = raised
    return error
