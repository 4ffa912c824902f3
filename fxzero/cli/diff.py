"""fxzero diff: what a pass, or a run of passes, changes in the program of a training step."""

from __future__ import annotations

import argparse
import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxzero.cli.dump import check_out, write
from fxzero.cli.options import add_target_options, plan_of
from fxzero.cli.rewriting import CAPTURE, capture_target, decided_passes, progress_of, run_passes
from fxzero.cli.usage import UsageError, check_pass
from fxzero.graph import StepGraph
from fxzero.graph.text import op_name, to_text
from fxzero.recipe import ALL_PASSES, recipe

DESCRIPTION = """\
Print how many of each op a pass adds and removes, then the lines of the text that it changes (lines of which only the
alignment changes are left out). --before and --after name the pass; both together name the first and the last of a run
of passes.

example:
  fxzero diff examples/llama_meta.py:llama_tiny --world 4 --zero 3 --after shard_parameters
"""


@dataclass(frozen=True)
class _Side:
    """One graph as it is compared."""

    text: str
    counts: Counter[str]

    @classmethod
    def of(cls, step: StepGraph, *, with_text: bool) -> _Side:
        counts = Counter(op_name(node.target) for node in step.calls())
        return cls(to_text(step) if with_text else "", counts)


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("diff", help="print what a pass changes", description=DESCRIPTION)
    add_target_options(parser)
    parser.add_argument("--before", metavar="PASS", help="from the graph before this pass")
    parser.add_argument("--after", metavar="PASS", help="to the graph after this pass")
    parser.add_argument("--stat", action="store_true", help="only the numbers of ops")
    parser.add_argument("--context", type=int, default=3, metavar="N", help="unchanged lines around changes; default 3")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if target, plan or step are not as they must be.
    """
    plan = plan_of(args)
    names = [CAPTURE, *(p.name for p in recipe(plan, backend=args.backend).passes)]
    left, right = _span(args, names)
    check_out(args.out)
    sides: dict[str, _Side] = {}

    def keep(name: str, step: StepGraph) -> None:
        if name in (names[left], names[right]):
            sides[name] = _Side.of(step, with_text=not args.stat)

    progress = progress_of(args)
    step = capture_target(args.target, plan, progress)
    pipeline, _ = decided_passes(step, plan, progress, backend=args.backend, until=names[right])
    run_passes(step, pipeline, progress, until=names[right], check=not args.no_verify, snapshot=keep)
    before, after = sides[names[left]], sides[names[right]]
    parts = [op_table(before.counts, after.counts)]
    if not args.stat:
        lines = changed_lines(before.text, after.text, context=args.context)
        head = [f"--- before {names[left + 1]}", f"+++ after {names[right]}"]
        with progress.stage("write", "compare"):
            parts.append("\n".join([*head, *lines]))
    write("\n\n".join(parts) + "\n", args.out)


def _span(args: argparse.Namespace, names: list[str]) -> tuple[int, int]:
    """Positions in `names` of the graphs to compare."""
    known = names[1:]
    given = {"--before": args.before, "--after": args.after}
    for option, name in given.items():
        if name is not None:
            check_pass(option, name, known=known, all_names=[p.name for p in ALL_PASSES])
    named = [name for name in given.values() if name is not None]
    if not named:
        fix = f"choose from: {', '.join(known)}"
        raise UsageError.of("fxzero diff", expected="--before PASS or --after PASS", got="neither", fix=fix)
    left, right = names.index(named[0]) - 1, names.index(named[-1])
    if left >= right:
        got = f"{args.before!r} after {args.after!r}"
        fix = f"the order is: {', '.join(known)}"
        raise UsageError.of("--before, --after", expected="the first and the last of a run of passes", got=got, fix=fix)
    return left, right


def op_table(before: Counter[str], after: Counter[str]) -> str:
    """Ops of which there are more or fewer, the greatest change first."""
    changed = [op for op in {*before, *after} if before[op] != after[op]]
    changed.sort(key=lambda op: (-abs(after[op] - before[op]), op))
    rows = [[op, before[op], after[op], f"{after[op] - before[op]:+d}"] for op in changed]
    rows.append(["all", before.total(), after.total(), f"{after.total() - before.total():+d}"])
    return tabulate(rows, headers=["op", "before", "after", "change"], colalign=("left", "right", "right", "right"))


def changed_lines(before: str, after: str, *, context: int) -> Iterator[str]:
    """A unified diff, without its head, of lines compared without their alignment."""
    old, new = before.splitlines(), after.splitlines()
    # Columns are as wide as what stands in them: one long name would otherwise change every line.
    squeezed = [[re.sub(r"(?<=\S) {2,}", "  ", line) for line in side] for side in (old, new)]
    matcher = difflib.SequenceMatcher(None, squeezed[0], squeezed[1], autojunk=False)
    for group in matcher.get_grouped_opcodes(max(context, 0)):
        (_, i_1, _, j_1, _), (_, _, i_2, _, j_2) = group[0], group[-1]
        yield f"@@ -{i_1 + 1},{i_2 - i_1} +{j_1 + 1},{j_2 - j_1} @@"
        for tag, a, b, c, d in group:
            if tag == "equal":
                yield from (f" {line}" for line in new[c:d])
                continue
            yield from (f"-{line}" for line in old[a:b])
            yield from (f"+{line}" for line in new[c:d])
