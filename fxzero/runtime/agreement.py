"""Ranks agree at each step, before its first collective: same plan, same passes, same communication.

[Note: what must agree]
Ranks may hold batches of different shapes, so their programs may differ; what must not is what they tell each
other. The agreed text is the plan, the passes with their options, the versions, the state with its sharding, and
every collective in program order with its parameter and its shapes.

[Note: how ranks agree]
The first step agrees through the store: it names ranks that are missing, and needs no working collective. Later steps
vote: one all-reduce of four numbers on the CPU (0.1 ms over loopback), so that no step mixes two programs, though
both be known, and a rank that cannot compile ends the others at once. Only when a vote fails do texts go through the
store, to say which line differs. A rank whose parameters were changed between two steps says so in its vote: gathers
that are under way are then no rank's to use. Each call of a step votes exactly once, so that votes stay paired when one
has failed. Where ranks of a group over tp and sp must have more in common ([Note: what a group has in common] in
`runtime/in_common.py`), a vote has two numbers more for each group, and what differs goes through the store, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fxzero import compat_distributed
from fxzero.errors import RankMismatchError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import num_bytes
from fxzero.runtime.in_common import InCommon, difference_within, number_of

_NOT_MINE = -(2**62)  # less than any number of a group: what a rank says for the groups that it is not in
_steps = itertools.count()
_PLAN = re.compile(r"(?:\w+ )*plan (\{.*\})")  # a line that holds a fingerprint


def agreed_text(step: StepGraph, *, plan: str, passes: str) -> str:
    """What a program tells other ranks, as lines that a person can read; see [Note: what must agree]."""
    lines = [f"torch {torch.__version__}", f"plan {plan}", *(f"pass {line}" for line in passes.splitlines())]
    for node in step.inputs("parameter", "optimizer"):
        entry, sharding = node.meta["entry"], node.meta.get("sharding")
        lies = [f"{p} over {axis}" for axis, p in node.meta.get("placements", {}).items()]
        rest = ", ".join([*lies, f"rows over {sharding.axis}"] if sharding else lies) or "whole"
        dtype = getattr(node.meta["val"], "dtype", "number")
        lines.append(f"{entry.kind} {entry.name} {list(entry.shape)} {dtype} {rest}")
    for node in filter(c10d.is_ahead, step.placeholders):
        lines.append(f"{node.name} is waited for, launched before: {_shapes(node.meta['val'])}")
    for name in (name for names in c10d.launched_for_next(step).values() for name in names):
        lines.append(f"the gather of {name} is launched for the next step")
    for node in step.calls():
        if c10d.is_collective(node):
            sizes = num_bytes(node.meta["val"])
            rest = ", ".join(map(str, node.args[1:]))
            name = f"{node.name} {c10d.TABLE[node.target].name} of {node.meta.get('param', 'no parameter')}"
            lines.append(f"{name} [{rest}] {_shapes(node.meta['val'])} {sizes} bytes")
    return "\n".join(lines)


def _shapes(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{val.dtype}{list(val.shape)}"
    return ", ".join(map(_shapes, val))


class Agreement:
    """What the ranks of one step do to agree; made on every rank, in the same order.

    Args:
        timeout_s: how long the first step waits for ranks that do not come.
        alike: groups of ranks that must be called alike, each rank in one of them at most.
    """

    def __init__(self, *, timeout_s: float, alike: Sequence[Sequence[int]] = ()) -> None:
        self.timeout_s = timeout_s
        self.alike = alike
        self.round = 0
        self.store = compat_distributed.default_store() if dist.is_available() and dist.is_initialized() else None
        self.number = next(_steps) if self.store is not None else 0  # a rank may have made steps of its own before
        self.rank = dist.get_rank() if self.store is not None else 0
        self.world_size = dist.get_world_size() if self.store is not None else 1
        self._digests: dict[str, int] = {}
        self._agreed: set[tuple[str, int]] = set()  # texts, each with the form of what was in common
        self._num_shared = 0
        self._voters: Any = None  # a group that reduces on the CPU, from the first agreement on

    def settle(self, text: str, *, changed: bool = False, common: InCommon | None = None) -> bool:
        """Return when all ranks are about to run programs with the same text.

        Args:
            text: of the programs.
            changed: this rank's parameters are not those that were gathered for this step.
            common: what ranks that are to be alike compare, all of it where programs or batches of this form are new,
                else what is cheap. Every rank that is in a group must give it.

        Returns:
            Whether any rank's have changed; at the first step, all ranks'.

        Raises:
            RankMismatchError: on every rank, naming the plan's keys that differ, or the first line that does; or ranks
                that failed or are missing; or what ranks of a group do not have in common.
        """
        if self.store is None or self.world_size == 1:
            return changed
        self.round += 1
        if text not in self._digests:
            self._digests[text] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        common = common if self.alike else None
        call = (text, 0 if common is None else common.form)
        if self._voters is None:
            self._settle_first(text, common)
            self._voters = _cpu_group()
            changed = True
        else:
            of_group = None if common is None else number_of(common.found(whole=call not in self._agreed))
            changed = self._vote(text, changed, common, of_group)
        self._agreed.add(call)
        return changed

    def from_first(self, make: Callable[[], str]) -> str:
        """The text that rank 0 makes, on every rank; all must call this.

        Args:
            make: called on rank 0 alone.

        Raises:
            RankMismatchError: where rank 0 could not make it; there, what `make` has raised.
        """
        if self.store is None or self.world_size == 1:
            return make()
        key = f"shared/{self._num_shared}"
        self._num_shared += 1
        if self.rank == 0:
            try:
                text = make()
            except Exception as error:
                self._put(key, f"failed: {error}".encode())
                raise
            self._put(key, b"made: " + zlib.compress(text.encode()))
            return text
        found = self._wait_for(key, self.timeout_s)
        if found.startswith(b"failed: "):
            raise RankMismatchError(_failure_message(0, found.decode().removeprefix("failed: ")))
        return zlib.decompress(found.removeprefix(b"made: ")).decode()

    def fail(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on, so that they need not wait for it."""
        if self.store is None or self.world_size == 1:
            return
        self.round += 1
        if self._voters is None:
            self._put(f"digest/{self.rank}", f"failed: {reason}".encode())
            if self.rank == 0:
                self._put("verdict", _failure_message(0, reason).encode())
            return
        self._put(f"reason/{self.rank}", reason.encode())
        self._cast(0)

    def _vote(self, text: str, changed: bool, common: InCommon | None, of_group: int | None) -> bool:
        failed, any_changed, is_same = self._cast(self._digests[text], changed, of_group)
        if failed:
            reason = self._wait_for(f"reason/{failed - 1}", self.timeout_s).decode()
            raise RankMismatchError(_failure_message(failed - 1, reason))
        if not is_same:
            self._report_difference(text, common)
        return any_changed

    def _cast(self, digest: int, changed: bool = False, of_group: int | None = None) -> tuple[int, bool, bool]:
        """One vote; digest 0 stands for failure.

        Returns:
            A failed rank + 1 or 0, whether any rank has voted `changed`, and whether all digests were equal, and all
            numbers of each group.
        """
        said = [digest, *(of_group if of_group is not None and self.rank in ranks else None for ranks in self.alike)]
        pairs = [number for one in said for number in ((_NOT_MINE, _NOT_MINE) if one is None else (one, -one))]
        votes = torch.tensor([0 if digest else self.rank + 1, int(changed), *pairs])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._voters)
        failed, any_changed, *pairs = votes.tolist()
        return failed, bool(any_changed), pairs[::2] == [-lowest for lowest in pairs[1::2]]

    def _settle_first(self, text: str, common: InCommon | None) -> None:
        self._put_common(common)
        self._put(f"digest/{self.rank}", str(self._digests[text]).encode())
        verdict = self._judge() if self.rank == 0 else self._wait_for("verdict", self.timeout_s + 5)
        if verdict == b"differ":
            self._report_difference(text, common)
        if verdict != b"same":
            raise RankMismatchError(verdict.decode())

    def _put_common(self, common: InCommon | None) -> None:
        if common is not None:
            self._put(f"common/{self.rank}", json.dumps(common.found(whole=True)).encode())

    def _differences_in_groups(self) -> list[str]:
        """What each group that must be alike is told, of those that are not."""
        found = {
            rank: json.loads(self._wait_for(f"common/{rank}", self.timeout_s)) for ranks in self.alike for rank in ranks
        }
        return list(filter(None, (difference_within(ranks, found) for ranks in self.alike)))

    def _report_difference(self, text: str, common: InCommon | None) -> NoReturn:
        self._put_common(common)
        self._put(f"text/{self.rank}", zlib.compress(text.encode()))
        if self.rank == 0:
            report = self._compare(text)
            self._wait_for_readers()
        else:
            report = self._wait_for("report", self.timeout_s + 5)
            self._put(f"read/{self.rank}", b"")
        raise RankMismatchError(report.decode())

    def _wait_for_readers(self) -> None:
        """Stay until all have read: this rank may hold the store, and end it with its own end."""
        with contextlib.suppress(RankMismatchError):
            for rank in range(1, self.world_size):
                self._wait_for(f"read/{rank}", 5.0)

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
            verdict = _failure_message(failed[0][0], failed[0][1].removeprefix("failed: ")).encode()
        elif missing:
            verdict = _missing_message(missing, self.timeout_s).encode()
        else:
            is_same = len(set(digests.values())) == 1 and not self._differences_in_groups()
            verdict = b"same" if is_same else b"differ"
        self._put("verdict", verdict)
        return verdict

    def _compare(self, mine: str) -> bytes:
        reports = self._differences_in_groups()
        for rank in range(1, self.world_size) if not reports else ():
            theirs = zlib.decompress(self._wait_for(f"text/{rank}", self.timeout_s)).decode()
            if theirs != mine:
                reports.append(first_difference(mine, theirs, rank))
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


def _cpu_group() -> Any:
    """A group of all ranks that reduces tensors on the CPU; all ranks must call this."""
    if "gloo" in str(dist.get_backend_config()):
        return dist.group.WORLD
    return dist.new_group(backend="gloo")


def _failure_message(rank: int, reason: str) -> str:
    return str(
        RankMismatchError.of(
            where=f"rank {rank}",
            expected="every rank to reach the step's first collective",
            got=f"a failure there ({reason})",
            fix=f"mend what rank {rank} says",
        )
    )


def _missing_message(ranks: list[int], timeout_s: float) -> str:
    return str(
        RankMismatchError.of(
            where=f"ranks {', '.join(map(str, ranks))}",
            expected=f"all ranks to compile the same step within {timeout_s:.0f} s",
            got="no word from them",
            fix="let every rank call the step the same number of times, or raise the plan's timeout_s",
        )
    )


def first_difference(mine: str, theirs: str, rank: int) -> str:
    """What ranks are told of two texts that differ: the first line, or of two plans the keys; "" of equal ones.

    Args:
        mine: of rank 0.
        theirs, rank: of another rank.
    """
    fix = "give every rank the same model, optimizer and plan"
    for number, (a, b) in enumerate(itertools.zip_longest(mine.splitlines(), theirs.splitlines()), start=1):
        if a == b:
            continue
        where, ours, others = f"line {number} of the program", repr(a), repr(b)
        if keys := _differing_keys(a or "", b or ""):
            where = ", ".join(f"Plan.{key}" for key in keys)
            ours, others = (", ".join(f"{key}={pair[i]}" for key, pair in keys.items()) for i in (0, 1))
            fix = "give every rank the same plan"
        expected = f"all ranks to agree; rank 0 has {ours}"
        return str(RankMismatchError.of(where, expected=expected, got=f"rank {rank} has {others}", fix=fix))
    return ""


def _differing_keys(mine: str, theirs: str) -> dict[str, tuple[str, str]]:
    """Key -> its two values, of two lines that end with a plan's fingerprint; none of other lines."""
    matches = _PLAN.fullmatch(mine), _PLAN.fullmatch(theirs)
    if matches[0] is None or matches[1] is None:
        return {}
    ours, others = json.loads(matches[0][1]), json.loads(matches[1][1])
    keys = (key for key in {**ours, **others} if key not in ours or key not in others or ours[key] != others[key])
    return {key: (_value(ours, key), _value(others, key)) for key in keys}


def _value(plan: Mapping[str, Any], key: str) -> str:
    return repr(plan[key]) if key in plan else "(no such key)"
