"""fxzero fit: whether a training step fits into the memory of a device, and how much more or less would."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from fxzero.capture.batch_dims import BATCH
from fxzero.cli.dump import check_out, write
from fxzero.cli.options import add_target_options, plan_of
from fxzero.cli.rewriting import progress_of
from fxzero.cli.target import keywords_of
from fxzero.cli.usage import UsageError, choose
from fxzero.cli.what_if import WhatIf, changes, largest
from fxzero.cost.memory_at_depth import Predicted
from fxzero.decide import Decision
from fxzero.errors import PlanError
from fxzero.plan import Plan
from fxzero.plan_values import number_of_bytes
from fxzero.simulate.memory_picture import areas_of_course, check_can_draw, draw_memory

DEPTH_KEYWORDS = ("layers", "num_layers", "n_layers", "n_layer", "num_hidden_layers", "depth", "blocks", "num_blocks")

OFFLOADED = ("offload_optimizer", "offload_parameters", "offload_activations")

DESCRIPTION = """\
Say whether the step fits into --device-memory on each of --world ranks, what stands at its predicted peak, and how
large a microbatch and how deep a model would still fit; where it does not fit, which keys of the plan would help.

example:
  fxzero fit examples/llama_meta.py:llama_70b --world 64 --device-memory 80GB --precision bf16 --recompute blocks
"""


@dataclass(frozen=True)
class Answer:
    """What `fxzero fit` found.

    Args:
        asked: memory of the step as asked for.
        limit: bytes of the device.
        setting: depth and sizes of the batch.
        largest: what was varied -> (largest number that fits, or 0; bytes there; bytes of the next one).
        tried: where the step does not fit: (changed keys and sizes, bytes), smallest first.
        notes: what could not be answered, and why.
        seconds: how long it took.
        decision: what recompute="auto" comes to.
    """

    asked: Predicted
    limit: int
    setting: dict[str, int]
    largest: dict[str, tuple[int, int | None, int]]
    tried: list[tuple[dict[str, Any], int]]
    notes: list[str]
    seconds: float
    decision: Decision | None

    @property
    def fits(self) -> bool:
        """Whether the step as asked for fits."""
        return self.asked.peak_bytes <= self.limit


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("fit", help="does a step fit into a device's memory", description=DESCRIPTION)
    add_target_options(parser)
    parser.add_argument("--device-memory", metavar="BYTES", required=True, help="of each rank: 80GB, '79 GiB'")
    about = "a keyword of FUNCTION, such as layers=40 (may be repeated)"
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=about)
    about = f"the keyword that says how many blocks the model has; default: the first of {', '.join(DEPTH_KEYWORDS)}"
    parser.add_argument("--depth", metavar="KEY", help=about)
    about = "draw memory over the program, at its whole depth (.svg and .pdf too)"
    parser.add_argument("--png", metavar="FILE", help=about)
    parser.add_argument("--json", action="store_true", help="the answer as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if target, keywords, plan or step are not as they must be; that a step does not fit is none.
    """
    start = time.perf_counter()
    limit = number_of_bytes("--device-memory", args.device_memory)
    plan = _plan(args, limit)
    if plan.recompute == "auto":
        assert plan.memory_budget is not None, "the plan has checked it"
        limit = min(limit, plan.memory_budget)
    for path in filter(None, (args.out, args.png)):
        check_out(path)
    if args.png is not None:
        check_can_draw(args.png)
    known = keywords_of(args.target)
    keywords = _keywords(args.set, known)
    depth_key = _depth_key(args.depth, known)
    depth = _depth(depth_key, keywords, known)
    what_if = WhatIf(args.target, keywords, plan, args.backend, progress_of(args), depth_key, depth)
    answer = _answer(what_if, limit)
    if args.png is not None:
        title = f"{args.target}: {_words(answer.setting)}\n{_words(changes(plan, Plan().resolve(1)))}"
        with what_if.progress.stage("draw", f"draw {args.png}"):
            draw_memory(areas_of_course(what_if.course()), args.png, title=title, budget_bytes=limit)
    answer = replace(answer, notes=list(dict.fromkeys(what_if.notes)), seconds=time.perf_counter() - start)
    write(json.dumps(_as_json(answer, plan), indent=1) + "\n" if args.json else _as_text(answer, plan), args.out)


def _plan(args: argparse.Namespace, limit: int) -> Plan:
    """The plan; one that chooses what to recompute by a budget of memory gets the device's."""
    if getattr(args, "recompute", None) == "auto" and getattr(args, "memory_budget", None) is None:
        args.memory_budget = limit
    plan = plan_of(args)
    for key in OFFLOADED:
        if getattr(plan, key) == "auto":
            where = f"--{key.replace('_', '-')}"
            fix = "leave it out: where the step does not fit, what would help is tried"
            raise UsageError.of(where, expected="'none', 'host' or 'nvme' for fit", got="'auto'", fix=fix)
    return plan


def _keywords(given: list[str], known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key in keywords:
            raise UsageError.of("--set", expected="each KEY=VALUE once", got=repr(text), fix="write --set layers=40")
        _check_keyword("--set", key, known)
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            keywords[key] = value
    return keywords


def _check_keyword(option: str, key: str, known: Mapping[str, inspect.Parameter]) -> None:
    if key not in known:
        fix = choose(key, list(known)) if known else "leave it out, or let the function take keywords"
        raise UsageError.of(option, expected="a keyword of the function", got=repr(key), fix=fix)


def _depth_key(given: str | None, known: Mapping[str, inspect.Parameter]) -> str | None:
    if given is not None:
        _check_keyword("--depth", given, known)
        return given
    return next((key for key in DEPTH_KEYWORDS if key in known), None)


def _depth(key: str | None, keywords: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> int | None:
    if key is None:
        return None
    depth = keywords.get(key, known[key].default)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        got = "no default" if depth is inspect.Parameter.empty else repr(depth)
        expected = f"a number of blocks as the function's {key}"
        raise UsageError.of(
            "--depth", expected=expected, got=got, fix=f"add --set {key}=32, or name another by --depth"
        )
    return depth


def _answer(what_if: WhatIf, limit: int) -> Answer:
    decision: Decision | None = None
    if what_if.plan.recompute == "auto":
        asked, decision = what_if.decide()
    else:
        asked = what_if.predict()
    sizes = what_if.sizes
    depth = {what_if.depth_key: what_if.depth} if what_if.depth_key and what_if.depth else {}
    found: dict[str, tuple[int, int | None, int]] = {}
    notes = what_if.notes

    def batch_peak(batch: int) -> int:
        return what_if.predict(sizes={BATCH: batch} if batch != sizes[BATCH] else {}).peak_bytes

    def depth_peak(depth: int) -> int:
        return what_if.predict(depth=depth).peak_bytes

    if BATCH in sizes:
        found[BATCH] = _largest(batch_peak, limit, start=sizes[BATCH])
    else:
        notes.append("the batch has no tensors with dims: nothing to vary")
    for key, value in depth.items():
        found[key] = _largest(depth_peak, limit, start=value)
    if not depth:
        notes.append("the function has no keyword for depth: the largest depth is not known")
    tried = [] if asked.peak_bytes <= limit else sorted(_tried(what_if, sizes), key=lambda item: item[1])
    return Answer(asked, limit, {**depth, **sizes}, found, tried, [], 0.0, decision)


def _largest(peak: Any, limit: int, *, start: int) -> tuple[int, int | None, int]:
    number = largest(peak, limit, start=start)
    return number, peak(number) if number else None, peak(number + 1)


def _tried(what_if: WhatIf, sizes: Mapping[str, int]) -> Iterator[tuple[dict[str, Any], int]]:
    """Plans, and a batch of one row, that take less."""
    plan = what_if.plan
    less: list[dict[str, Any]] = [{}]
    if plan.zero < 3:
        less.append({"zero": 3})
    if plan.recompute == "none":
        less += [{**keys, "recompute": "blocks"} for keys in less]
    strongest = less[-1]
    on_host: dict[str, Any] = {}
    for added in (OFFLOADED[:1], OFFLOADED[1:]):
        more = {key: "host" for key in added if getattr(plan, key) == "none"}
        on_host |= more
        less += [{**keys, **on_host} for keys in ({}, strongest) if more]
    less = [keys for index, keys in enumerate(less) if keys not in less[:index]]
    smaller = [{}, {BATCH: 1}] if sizes.get(BATCH, 1) > 1 else [{}]
    for keys in less:
        for size in smaller:
            if not keys and not size:
                continue
            try:
                other = plan.replace(**keys)
                yield {**changes(other, plan), **size}, what_if.predict(plan=other, sizes=size).peak_bytes
            except PlanError as error:  # a model without blocks
                what_if.notes.append(f"{', '.join(f'{k}={v}' for k, v in keys.items())} was not tried: {error}")


def _size(num_bytes: float) -> str:
    for unit, num in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(num_bytes) >= num:
            return f"{num_bytes / num:,.2f} {unit}"
    return f"{num_bytes} B"


def _words(items: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in items.items())


def _as_text(answer: Answer, plan: Plan) -> str:
    asked, limit = answer.asked, answer.limit
    verdict = "fits" if answer.fits else "does not fit"
    share = 100 * asked.peak_bytes / limit if limit else float("inf")
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.axes.items())
    lines = [
        f"{verdict}: predicted peak {_size(asked.peak_bytes)} of {_size(limit)} ({share:.0f} %), each rank of {mesh}",
        f"with {_words(answer.setting) or 'the batch as it is'}; {_words(changes(plan, Plan().resolve(1)))}",
        f"peak at {asked.place}; {_size(asked.state_bytes)} are there all the time",
    ]
    lines += [f"and up to {_size(size)} in tier {tier}" for tier, size in asked.elsewhere.items()]
    lines += [
        f"a step swaps {_size(size)} {'out to' if way == 'out' else 'in from'} tier {tier}"
        for (tier, way), size in asked.swapped.items()
    ]
    lines += str(answer.decision).splitlines() if answer.decision is not None else []
    kinds = sorted(asked.kinds.items(), key=lambda item: -item[1])
    tables = [tabulate([[k, _size(v)] for k, v in kinds], headers=["at the peak", "size"], disable_numparse=True)]
    rows = []
    for key, (number, at, above) in answer.largest.items():
        rows.append([key, number or "none", _size(at) if at is not None else "", f"{_size(above)} at {number + 1}"])
    headers = ["keyword or size", "largest that fits", "peak", "peak one further"]
    tables.append(tabulate(rows, headers=headers, disable_numparse=True) if rows else "")
    if answer.tried:
        tables.append("\n".join(_advice(answer)))
    tables += ["\n".join(answer.notes)] if answer.notes else []
    return "\n\n".join(["\n".join(lines), *(table for table in tables if table), f"in {answer.seconds:.0f} s"]) + "\n"


def _advice(answer: Answer) -> Iterator[str]:
    fitting = [(keys, size) for keys, size in answer.tried if size <= answer.limit]
    if fitting:
        fewest = min(fitting, key=lambda item: (BATCH in item[0], len(item[0].keys() & set(OFFLOADED)), len(item[0])))
        yield f"it fits with {_words(fewest[0])}: {_size(fewest[1])}"
    keys, size = answer.tried[0]
    yield f"the smallest peak of what was tried is {_size(size)}, with {_words(keys)}"


def _as_json(answer: Answer, plan: Plan) -> dict[str, Any]:
    asked = answer.asked
    return {
        "fits": answer.fits,
        "device_memory_bytes": answer.limit,
        "peak_bytes": asked.peak_bytes,
        "state_bytes": asked.state_bytes,
        "peak_at": asked.place,
        "peak_bytes_by_kind": asked.kinds,
        "host_bytes": asked.elsewhere.get("host", 0),
        "nvme_bytes": asked.elsewhere.get("nvme", 0),
        "swapped_bytes": {" ".join(key): size for key, size in asked.swapped.items()},
        "setting": answer.setting,
        "decision": None if answer.decision is None else str(answer.decision),
        "largest": {
            key: {"value": number, "peak_bytes": at, "next_peak_bytes": above}
            for key, (number, at, above) in answer.largest.items()
        },
        "tried": [{"changes": keys, "peak_bytes": size, "fits": size <= answer.limit} for keys, size in answer.tried],
        "plan": plan.to_dict(),
        "notes": answer.notes,
        "seconds": answer.seconds,
    }
