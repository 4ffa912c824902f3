"""The command line: `fxzero dump`, `simulate`, `calibrate` and others, a module each; docs/cli.md shows them."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import fxzero
from fxzero.cli import calibrate, diff, dump, env, fit, memory, passes, simulate
from fxzero.cli.usage import UsageError
from fxzero.errors import FxzeroError

COMMANDS = (dump, passes, diff, memory, fit, simulate, calibrate, env)
FAILED = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Complains in one line, and prints descriptions as they are written."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists what there is")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows the program's name; default: that of this process.

    Returns:
        The exit code: 0, or 2 after an error, which takes one line on stderr.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(given)
        args.run(args)
        sys.stdout.flush()
    except SystemExit as stop:  # --help and --version end so
        return int(stop.code or 0)
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("fxzero: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (FxzeroError, OSError) as error:
        if "--traceback" in given:
            traceback.print_exception(error)
        else:
            print(f"fxzero: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fxzero", description="Look at the program that fxzero makes of a training step.")
    parser.add_argument("--version", action="version", version=f"fxzero {fxzero.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for module in COMMANDS:
        module.add_command(commands)
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser
