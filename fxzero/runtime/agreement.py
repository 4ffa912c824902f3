"""Ranks agree, through the store, before the first collective: same plan, same passes, same communication.

[Note: what must agree]
Ranks may hold batches of different shapes, so their programs may differ; what must not is what they tell each
other. The agreed text is the plan, the passes with their options, the versions, the state with its sharding, and
every collective in program order with its shapes. A graph whose text was agreed upon before needs no new round, so
that batches of other lengths cost no communication.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fxzero import compat
from fxzero.errors import RankMismatchError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import num_bytes

_steps = itertools.count()


def agreed_text(step: StepGraph, *, plan: str, passes: str) -> str:
    """What a program tells other ranks, as lines that a person can read; see [Note: what must agree]."""
    lines = [f"torch {torch.__version__}", f"plan {plan}", *(f"pass {line}" for line in passes.splitlines())]
    for node in step.inputs("parameter", "optimizer"):
        entry, sharding = node.meta["entry"], node.meta.get("sharding")
        rest = f"rows over {sharding.axis}" if sharding else "whole"
        dtype = getattr(node.meta["val"], "dtype", "number")
        lines.append(f"{entry.kind} {entry.name} {list(entry.shape)} {dtype} {rest}")
    for node in step.calls():
        if c10d.is_collective(node):
            sizes = num_bytes(node.meta["val"])
            rest = ", ".join(map(str, node.args[1:]))
            lines.append(
                f"{node.name} {c10d.TABLE[node.target].name} [{rest}] {_shapes(node.meta['val'])} {sizes} bytes"
            )
    return "\n".join(lines)


def _shapes(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{val.dtype}{list(val.shape)}"
    return ", ".join(map(_shapes, val))


class Agreement:
    """Rounds of agreement for one step; made on every rank, in the same order."""

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.number = next(_steps)
        self.round = 0
        self.store = compat.default_store() if dist.is_available() and dist.is_initialized() else None
        self.rank = dist.get_rank() if self.store is not None else 0
        self.world_size = dist.get_world_size() if self.store is not None else 1

    def settle(self, text: str) -> None:
        """Return when all ranks hold the same text.

        Raises:
            RankMismatchError: on every rank, naming the first line that differs; or ranks that failed or are missing.
        """
        if self.store is None or self.world_size == 1:
            return
        self.round += 1
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._put(f"digest/{self.rank}", digest.encode())
        verdict = self._judge() if self.rank == 0 else self._wait_for("verdict", self.timeout_s + 5)
        if verdict == b"differ":
            self._put(f"text/{self.rank}", zlib.compress(text.encode()))
            report = self._compare(text) if self.rank == 0 else self._wait_for("report", self.timeout_s + 5)
            raise RankMismatchError(report.decode())
        if verdict != b"same":
            raise RankMismatchError(verdict.decode())

    def fail(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on, so that they need not wait for it."""
        if self.store is not None and self.world_size > 1:
            self.round += 1
            self._put(f"digest/{self.rank}", f"failed: {reason}".encode())
            if self.rank == 0:
                self._put("verdict", f"rank 0 failed before the first collective: {reason}".encode())

    def _judge(self) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        digests: dict[int, bytes] = {}
        missing = []
        for rank in range(self.world_size):
            try:
                digests[rank] = self._wait_for(f"digest/{rank}", max(0.05, deadline - time.monotonic()))
            except RankMismatchError:
                missing.append(rank)
        failed = [(r, d.decode()) for r, d in digests.items() if d.startswith(b"failed: ")]
        if failed:
            verdict = f"rank {failed[0][0]} failed before the first collective: {failed[0][1][8:]}".encode()
        elif missing:
            verdict = _missing_message(missing, self.timeout_s).encode()
        else:
            verdict = b"same" if len(set(digests.values())) == 1 else b"differ"
        self._put("verdict", verdict)
        return verdict

    def _compare(self, mine: str) -> bytes:
        reports = []
        for rank in range(1, self.world_size):
            theirs = zlib.decompress(self._wait_for(f"text/{rank}", self.timeout_s)).decode()
            if theirs != mine:
                reports.append(_first_difference(mine, theirs, rank))
        report = " | ".join(reports[:3]).encode()
        self._put("report", report)
        return report

    def _put(self, key: str, value: bytes) -> None:
        self.store.set(f"fxzero/{self.number}/{self.round}/{key}", value)  # type: ignore[union-attr]

    def _wait_for(self, key: str, timeout_s: float) -> bytes:
        name = f"fxzero/{self.number}/{self.round}/{key}"
        try:
            self.store.wait([name], timedelta(seconds=timeout_s))  # type: ignore[union-attr]
        except Exception as error:
            if key == "verdict":
                raise RankMismatchError(_missing_message([0], timeout_s)) from error
            raise RankMismatchError.of(
                where=f"rank {self.rank}",
                expected=f"{key!r} from another rank within {timeout_s:.0f} s",
                got="nothing",
                fix="look at the first error of the other ranks",
            ) from error
        return bytes(self.store.get(name))  # type: ignore[union-attr]


def _missing_message(ranks: list[int], timeout_s: float) -> str:
    return str(
        RankMismatchError.of(
            where=f"ranks {', '.join(map(str, ranks))}",
            expected=f"all ranks to compile the same step within {timeout_s:.0f} s",
            got="no word from them",
            fix="let every rank call the step the same number of times, or raise the plan's timeout_s",
        )
    )


def _first_difference(mine: str, theirs: str, rank: int) -> str:
    for number, (a, b) in enumerate(itertools.zip_longest(mine.splitlines(), theirs.splitlines()), start=1):
        if a != b:
            return str(
                RankMismatchError.of(
                    where=f"line {number} of the program",
                    expected=f"all ranks to agree; rank 0 has {a!r}",
                    got=f"rank {rank} has {b!r}",
                    fix="give every rank the same model, optimizer and plan",
                )
            )
    return ""
