"""What a region that was compiled with symbols for sizes takes for granted about them, as text, and asked again.

The compiler decides by the sizes that it is shown, and notes what it asked ("batch*sequence <= 4096"). The texts are
kept beside what was compiled. One that cannot be asked again is one that does not hold.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from fxzero import compat

# how functions in conditions are computed on whole numbers
_FUNCTIONS: dict[str, Any] = {
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": max,
    "Min": min,
}


def conditions_on(env: Any, symbols: Mapping[Any, str]) -> list[str]:
    """What was asked of symbols, in words of Python.

    Args:
        env: the symbol environment.
        symbols: symbol -> name.
    """
    named = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in symbols.items()}
    asked = [guard.expr for guard in env.guards]
    for symbol in symbols:
        least, most = compat.value_range(env, symbol)
        asked += [sympy.Ge(symbol, least)] + ([sympy.Le(symbol, most)] if most.is_Integer else [])
    found = (expr.xreplace(named) for expr in asked if expr.free_symbols)
    return list(dict.fromkeys(str(expr) for expr in found if expr is not sympy.true))


def hold(conditions: Iterable[str], sizes: Mapping[str, int]) -> bool:
    """Whether all conditions are true of these sizes."""
    return all(_holds(condition, sizes) for condition in conditions)


def _holds(condition: str, sizes: Mapping[str, int]) -> bool:
    if "~" in condition:  # of Python's truth values that is a number, and always true
        return False
    try:
        return bool(eval(condition, {"__builtins__": {}, **_FUNCTIONS}, dict(sizes)))
    except (NameError, TypeError, SyntaxError, ArithmeticError):
        return False
