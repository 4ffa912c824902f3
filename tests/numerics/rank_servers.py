"""Processes that have imported torch and fxzero and taken a first step: each fork of one is a rank ready to work.

A rank started from nothing spends four seconds on that. A fork has what its server had when it was started: nothing
that one launch leaves behind reaches the next. There are two servers, which ranks take in turns, because processes
started apart differ in the order of their sets and in their addresses, and programs must be the same all the same.

Run as a module, this file is a server. It reads requests, a JSON object a line, starts the ranks, and writes
a line with the ids of their processes, then one whenever one of them has ended, with its exit code.
"""

import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUM_SERVERS = 2


class RanksFailed(Exception):
    """A rank ended with another exit code than 0, or not in time."""


@dataclass
class Server:
    """A server, and what is known of its ranks that have not ended.

    Args:
        process: it.
        alive: rank -> id of its process.
        unread: what it has written of a line that is not complete.
    """

    process: subprocess.Popen[bytes]
    alive: dict[int, int] = field(default_factory=dict)
    unread: bytes = b""

    def start(self, module: str, args: Sequence[str], *, environments: dict[int, dict[str, str]], output: Path) -> None:
        """Start ranks; those that run after this are in `alive`."""
        request = {"module": module, "args": args, "environments": environments, "output": str(output)}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while b"\n" not in self.unread:
            self._read()
        line, self.unread = self.unread.split(b"\n", 1)
        self.alive = {int(rank): pid for rank, pid in json.loads(line).items()}

    def ended(self) -> dict[int, int]:
        """Rank -> exit code of those that have ended since; waits for one of them."""
        if b"\n" not in self.unread:
            self._read()
        *lines, self.unread = self.unread.split(b"\n")
        codes = {int(rank): code for line in lines for rank, code in json.loads(line).items()}
        for rank in codes:
            del self.alive[rank]
        return codes

    def kill(self) -> None:
        """End the ranks that run, and wait until they have."""
        for pid in self.alive.values():
            os.killpg(pid, signal.SIGKILL)
        while self.alive:
            self.ended()

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        read = os.read(self.process.stdout.fileno(), 2**16)
        if not read:
            raise RanksFailed(f"a server of ranks ended by itself, exit code {self.process.wait()}")
        self.unread += read


@functools.cache
def servers(root: Path) -> list[Server]:
    """The servers of this process, started by the first call; `close` ends them."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    environment.pop("PYTHONHASHSEED", None)
    command = [sys.executable, "-m", "tests.numerics.rank_servers"]
    pipe = subprocess.PIPE
    return [
        Server(subprocess.Popen(command, cwd=root, env=environment, stdin=pipe, stdout=pipe))
        for _ in range(NUM_SERVERS)
    ]


def close(root: Path) -> None:
    """End the servers, if there are any."""
    if servers.cache_info().currsize:
        for server in servers(root):
            server.close()
        servers.cache_clear()


def run_ranks(
    module: str,
    args: Sequence[str],
    *,
    ranks: int,
    timeout_s: float,
    environment: dict[str, str],
    root: Path,
    output: Path,
) -> None:
    """Run a module as `python -m` does, once a rank, in forks of the servers, until all have ended.

    Args:
        module: its name.
        args: of its command line.
        ranks: how many.
        timeout_s: after which they are killed.
        environment: of a rank, which gets what torchrun sets beside it.
        root: of the checkout.
        output: the file that what ranks write is appended to.

    Raises:
        RanksFailed: if a rank fails, whereupon the others are killed, or if they take too long.
    """
    from torch.distributed import TCPStore  # not needed by a process that starts no ranks

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # ranks may end in any order
    common = environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    seconds_left = timeout_s
    chosen = servers(root)[:ranks]
    try:
        for index, server in enumerate(chosen):
            own = range(index, ranks, len(chosen))
            environments = {rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in own}
            server.start(module, args, environments=environments, output=output)
        while running := [server for server in chosen if server.alive]:
            if seconds_left <= 0:
                raise RanksFailed("took too long")
            seconds_left -= _wait_a_second(running)
    finally:
        for server in chosen:
            server.kill()


def _wait_a_second(running: list[Server]) -> float:
    """Wait until a rank ends, at most a second; returns for how long: not for as long as all of this was suspended."""
    start = time.monotonic()
    ready = [server for server in running if server.unread]
    if not ready:
        streams, _, _ = select.select([server.process.stdout for server in running], [], [], 1.0)
        ready = [server for server in running if server.process.stdout in streams]
    codes = {rank: code for server in ready for rank, code in server.ended().items()}
    failed = {rank: code for rank, code in codes.items() if code}
    if failed:
        raise RanksFailed(", ".join(f"rank {rank} exited {code}" for rank, code in failed.items()))
    return min(1.0, time.monotonic() - start)


# ---- a server


def take_first_step() -> None:
    """Load what a first step loads; random numbers stay where they were."""
    import torch
    from torch import nn

    import fxzero

    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.GELU(), nn.Linear(4, 4))
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), fxzero.Plan(), loss=lambda m, x: m(x).sum())
        step(torch.ones(2, 4))


def fork_ranks(request: dict[str, Any]) -> dict[int, int] | None:
    """Start the ranks of a request, as id of process -> rank; in a rank, None."""
    alive = {}
    for rank, environment in request["environments"].items():
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            os.environ.clear()
            os.environ.update(environment)
            return None
        os.setpgid(pid, pid)
        alive[pid] = int(rank)
    return alive


def become_rank(request: dict[str, Any]) -> None:
    """Run the module of a request, all that it writes going to the file named there."""
    written = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    sys.argv = [request["module"], *request["args"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries complain at exit that what is frozen is still there


def serve() -> None:
    """Fork ranks until there are no more requests; returns in a rank too, when its module has ended."""
    requests, nothing = os.fdopen(os.dup(0), "rb"), os.open(os.devnull, os.O_RDONLY)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    take_first_step()
    gc.collect()
    gc.freeze()  # forks neither look through what is there nor take it apart when they end
    listed = Path("/proc/self/task")  # of Linux: those of libraries too
    num_threads = len(list(listed.iterdir())) if listed.is_dir() else threading.active_count()
    assert num_threads == 1, f"expected no other thread in a process that is forked, got {num_threads - 1}"
    for line in requests:
        request = json.loads(line)
        alive = fork_ranks(request)
        if alive is None:
            requests.close()
            answers.close()
            return become_rank(request)
        answers.write(json.dumps({rank: pid for pid, rank in alive.items()}).encode() + b"\n")
        while alive:
            pid, status = os.wait()
            answers.write(json.dumps({alive.pop(pid): os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    os._exit(0)  # what was frozen cannot be taken apart, which libraries would complain about


if __name__ == "__main__":
    serve()
