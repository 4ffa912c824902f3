"""fxzero passes: the rewrites that there are, or those that a plan asks for, in their order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from fxzero.cli.options import add_plan_options, names_a_plan, plan_of
from fxzero.graph.contract import Pass
from fxzero.recipe import ALL_PASSES, recipe

DESCRIPTION = """\
Print all passes; with options of a plan, the ones that it runs, in their order and with their options.

examples:
  fxzero passes
  fxzero passes --world 64 --zero 2 --disable recompute_pointwise
"""


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("passes", help="list the passes, or the recipe of a plan", description=DESCRIPTION)
    add_plan_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if the plan cannot be honoured.
    """
    if not names_a_plan(args):
        print(pass_table(ALL_PASSES))
        return
    plan = plan_of(args)
    pipeline = recipe(plan, backend=args.backend)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.axes.items())
    print(f"zero {plan.zero} | mesh {mesh} | {args.backend}\n")
    print(pass_table(pipeline.passes, with_options=True))


def pass_table(passes: Sequence[Pass], *, with_options: bool = False) -> str:
    """What each pass needs, makes true and does.

    Args:
        passes: in order.
        with_options: number them and show their options.
    """
    rows = []
    for number, item in enumerate(passes, start=1):
        options = "\n".join(f"{key}={value!r}" for key, value in sorted(item.options.items()))
        row = [item.name, ", ".join(sorted(item.requires)), ", ".join(sorted(item.provides)), item.numerics]
        rows.append([number, *row, options] if with_options else [*row, item.summary])
    headers = ["pass", "requires", "provides", "numerics"]
    if with_options:
        return tabulate(rows, headers=["", *headers, "options"], maxcolwidths=[None] * 4 + [30, None])
    return tabulate(rows, headers=[*headers, "summary"], maxcolwidths=[None] * 3 + [30, 60])
