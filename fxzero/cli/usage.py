"""What the command line refuses, and how it says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from fxzero.errors import FxzeroError


class UsageError(FxzeroError):
    """Raised when a command is asked for something that is not there: a file, a function, a pass, a combination."""


def choose(name: str, names: Sequence[str]) -> str:
    """What to write instead of a name that is none of `names`: the nearest one, and the list."""
    close = difflib.get_close_matches(name.strip().lower().replace("-", "_"), names, n=1)
    listed = f"choose from: {', '.join(names)}"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def check_pass(option: str, name: str, *, known: Sequence[str], all_names: Iterable[str]) -> None:
    """Raise UsageError unless a pass is part of the recipe.

    Args:
        option: the option that names it.
        name: as given.
        known: what this plan's recipe runs, in order, with "capture" where that makes sense.
        all_names: the passes of all recipes.
    """
    if name in known:
        return
    listed = f"choose from: {', '.join(known)}"
    fix = f"change the plan, or {listed}" if name in all_names else choose(name, known)
    raise UsageError.of(option, expected="a pass of this plan's recipe", got=repr(name), fix=fix)
