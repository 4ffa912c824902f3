"""What the value of a plan's key may be: each check returns the value in canonical form or raises PlanError."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from fxzero.errors import PlanError

# (where, value) -> the value in canonical form; raises PlanError.
Check = Callable[[str, Any], Any]

UPDATE_KERNELS = ("adamw", "sgd", "lion")  # that patterns of a graph are replaced by
NORM_KERNELS = ("rms_norm", "layer_norm")
KERNELS = (*UPDATE_KERNELS, *NORM_KERNELS, "gated_activation", "rotary")
MAX_INT = 2**63 - 1  # what TOML promises to carry
_MAX_TIMEOUT_S = 86_400
_BYTE_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")
_BYTES_FIX = "write a whole number, or one with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB): '4 MiB'"


def show(value: object) -> str:
    """The value as an error shows it: its repr, cut where too long, with its type where that says more."""
    text = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:97]}..."
    return text if type(value).__module__ == "builtins" else f"{text} ({type(value).__name__})"


def nearest(name: str, names: Sequence[str]) -> str:
    """What to write instead of a name that is none of `names`."""
    close = difflib.get_close_matches(name.strip().lower().replace("-", "_"), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(names)}"


def boolean(where: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise PlanError.of(where, expected="True or False", got=show(value), fix="write True or False")
    return value


def integer(low: int, high: int = MAX_INT, *, fix: str) -> Check:
    """A check for integers from low to high."""
    span = f"from {low} to {high}" if high != MAX_INT else f"of at least {low}"

    def check(where: str, value: Any) -> int:
        # bool is an int to Python, but `zero = true` is a mistake that must not turn into stage 1.
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise PlanError.of(where, expected=f"an integer {span}", got=show(value), fix=fix)
        return int(value)

    return check


def number_of_bytes(where: str, value: Any, *, whole: bool = True) -> int:
    """Bytes, as a whole number or with a unit: "4 MiB"; without `whole`, a part of a byte is left out."""
    if not isinstance(value, str):
        return int(integer(0, fix=_BYTES_FIX)(where, value))
    match = _BYTES.fullmatch(value)
    if match is None or match[2] not in _BYTE_UNITS:
        raise PlanError.of(where, expected="a number of bytes", got=show(value), fix=_BYTES_FIX)
    # Exact arithmetic: 0.3 MB is 300000 bytes, which a float product misses.
    num_bytes = Fraction(match[1]) * _BYTE_UNITS[match[2]]
    if (whole and num_bytes.denominator != 1) or num_bytes > MAX_INT:
        got = f"{value!r} = {float(num_bytes):.10g} bytes"
        raise PlanError.of(where, expected="a whole number of bytes below 2**63", got=got, fix=_BYTES_FIX)
    return math.floor(num_bytes)


def bytes_or_auto(where: str, value: Any) -> int | str | None:
    """Bytes, as a whole number or with a unit, "auto", or None."""
    return value if value is None or value == "auto" else number_of_bytes(where, value)


def yes_no_or_auto(where: str, value: Any) -> bool | str | None:
    """True, False, "auto", or None."""
    if value is None or value == "auto" or isinstance(value, bool):
        return value
    fix = "write true, false or 'auto', or leave the key out"
    raise PlanError.of(where, expected="True, False, 'auto' or None", got=show(value), fix=fix)


def always_or_auto(where: str, value: Any) -> bool | str:
    """True, False or "auto"."""
    if value == "auto" or isinstance(value, bool):
        return value
    raise PlanError.of(
        where,
        expected="True, False or 'auto'",
        got=show(value),
        fix="write true, false or 'auto', or leave the key out",
    )


def budget(where: str, value: Any) -> int | None:
    """Bytes above 0, as a whole number or with a unit, or None."""
    if value is None:
        return None
    num_bytes = number_of_bytes(where, value, whole=False)
    if not num_bytes:
        fix = "write how much memory there is, such as '20 GiB', or leave the key out"
        raise PlanError.of(where, expected="more than 0 bytes, or None", got=show(value), fix=fix)
    return int(num_bytes)


def name_or_path(where: str, value: Any) -> str:
    """A name, or the path of a file, as text."""
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        fix = "write 'auto', a name such as 'h100', or the path of a description"
        raise PlanError.of(where, expected="the name or path of a machine's description", got=show(value), fix=fix)
    return str(value)


def seconds(where: str, value: Any) -> float:
    """A duration of at most a day."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MAX_TIMEOUT_S:
        expected = f"seconds, more than 0 and at most {_MAX_TIMEOUT_S}"
        raise PlanError.of(where, expected=expected, got=show(value), fix="write a number such as 60.0")
    return float(value)


def part_or_auto(where: str, value: Any) -> str | float:
    """A number from 0 to 1, or "auto"."""
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        fix = "write a number such as 0.5"
        raise PlanError.of(where, expected="a part, from 0 to 1, or 'auto'", got=show(value), fix=fix)
    return float(value)


def path(where: str, value: Any) -> str | None:
    """The path of a file or a directory; whether it is there is seen when it is used."""
    if (value is not None and not isinstance(value, (str, os.PathLike))) or value == "":
        raise PlanError.of(where, expected="a path", got=show(value), fix="write it as text, or leave the key out")
    return None if value is None else os.fspath(value)


def one_of(*built: str, reserved: tuple[str, ...] = ()) -> Check:
    """A check for names; those that are reserved say so."""

    def check(where: str, value: Any) -> str:
        name = value if isinstance(value, str) else ""
        if name in built:
            return built[built.index(name)]
        fix = f"reserved, not built yet: use {built[0]!r}" if name in reserved else nearest(name, built)
        raise PlanError.of(where, expected=" or ".join(map(repr, built)), got=show(value), fix=fix)

    return check


def pass_names(where: str, value: Any) -> tuple[str, ...]:
    """Names of passes, sorted, once each."""
    listed: list[Any] = list(value) if isinstance(value, (tuple, list, set, frozenset)) else [None]
    if not all(isinstance(name, str) and name.isascii() and name.isidentifier() for name in listed):
        fix = "write a list of names as `fxzero passes` prints them, such as ['bucket_all_gathers']"
        raise PlanError.of(where, expected="a list of pass names", got=show(value), fix=fix)
    return tuple(sorted(set(listed)))


def finite(*, fix: str, expected: str = "a finite number above 0") -> Check:
    """A check for finite numbers above 0."""

    def check(where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise PlanError.of(where, expected=expected, got=show(value), fix=fix)
        return float(value)

    return check


def bound(where: str, value: Any) -> float | None:
    """A finite number above 0, or None."""
    fix = "write a number such as 1.0, or leave the key out"
    return None if value is None else finite(fix=fix, expected="a finite number above 0, or None")(where, value)


def scale(where: str, value: Any) -> str | float | None:
    """What the loss is scaled by: "dynamic", a finite number above 0, or None."""
    if value is None or value == "dynamic":
        return value
    expected = "'dynamic', a finite number above 0, or None"
    return float(finite(fix="write 'dynamic', or a number such as 1024.0", expected=expected)(where, value))


def norm_order(where: str, value: Any) -> float:
    """The order of a p-norm; files write infinity as "inf"."""
    number = math.inf if value == "inf" else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        fix = "write 1, 2, 'inf' or another order of a p-norm"
        raise PlanError.of(where, expected="a number above 0, or 'inf'", got=show(value), fix=fix)
    return float(number)


def recomputed(where: str, value: Any) -> str | float | tuple[str, ...]:
    """What is computed again: "none", "blocks", "auto", a fraction of the blocks, or patterns of module paths."""
    if isinstance(value, (list, tuple)) and value:
        return patterns(where, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    if value not in ("none", "blocks", "auto"):
        fix = "write 'auto', 'blocks', a fraction of the blocks such as 0.5, or patterns such as ['layers.[0-3]']"
        expected = "'none', 'blocks', 'auto', a number above 0 and at most 1, or a list of patterns"
        raise PlanError.of(where, expected=expected, got=show(value), fix=fix)
    return str(value)


def rows_or_auto(where: str, value: Any) -> str | int | None:
    """A number of rows above 0, "auto", or None (False says the same)."""
    if value is None or value is False:
        return None
    if value == "auto":
        return "auto"
    return int(integer(1, fix="write a number of rows, 'auto', or leave the key out")(where, value))


def number_or_auto(high: int, *, fix: str) -> Check:
    """A check for integers from 1 to high, or "auto"."""

    def check(where: str, value: Any) -> int | str:
        if value == "auto":
            return "auto"
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise PlanError.of(where, expected=f"an integer from 1 to {high}, or 'auto'", got=show(value), fix=fix)
        return int(value)

    return check


def kernel_names(where: str, value: Any) -> bool | tuple[str, ...]:
    """True, False, or names of kernels, sorted, once each."""
    if isinstance(value, bool):
        return value
    listed = list(value) if isinstance(value, (tuple, list)) else [value]
    check = one_of(*KERNELS)
    return tuple(sorted({check(where, name) for name in listed}))


def patterns(where: str, value: Any) -> tuple[str, ...]:
    """Patterns of module paths, sorted, once each."""
    listed: list[Any] = list(value) if isinstance(value, (tuple, list)) else [None]
    if not all(isinstance(pattern, str) and pattern.isprintable() for pattern in listed):
        fix = "write a list of patterns as for file names, such as ['*.norm', 'head']"
        raise PlanError.of(where, expected="a list of patterns of module paths", got=show(value), fix=fix)
    return tuple(sorted(set(listed)))


def room_or_all(where: str, value: Any) -> str | float:
    """A finite number of at least 1, or "all"."""
    if value == "all":
        return "all"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < math.inf:
        fix = "write a number such as 1.5 (times the rows of an even load), or 'all'"
        raise PlanError.of(where, expected="a finite number of at least 1, or 'all'", got=show(value), fix=fix)
    return float(value)


def fraction(where: str, value: Any) -> float:
    """A part of a whole: a number above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        fix = "write a fraction such as 0.01"
        raise PlanError.of(where, expected="a number above 0 and at most 1", got=show(value), fix=fix)
    return float(value)


def check_goes_with(plan: Any, key: str, others: Mapping[str, tuple[Any, str]]) -> None:
    """Check that other keys of a plan are as one that is set needs them.

    Args:
        plan: with that key set.
        key: its name.
        others: name of another key -> (the value that it must have, why).

    Raises:
        PlanError: naming the first that has another value.
    """
    for name, (value, why) in others.items():
        got = getattr(plan, name)
        if got != value:
            expected, fix = f"{name}={value!r} with it: {why}", f"leave out {key} or {name}"
            raise PlanError.of(f"Plan.{key}", expected=expected, got=repr(got), fix=fix)
