"""Texts of regions become functions, one after the other; ranks of a host and further processes share the work."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from fxzero.errors import LoweringError
from fxzero.lower.inductor import Compiled
from fxzero.lower.store import Function, Store
from fxzero.lower.workers import num_processes, working_on


@dataclass(frozen=True)
class Maker:
    """What makes functions of texts.

    Args:
        store: where they are kept.
        compile: a text -> what its function is loaded from.
        place: (index of this rank among those of its host, their number); they begin at different regions, so that they
            share the work.
        alone: no further processes help.
    """

    store: Store
    compile: Callable[..., Compiled]
    place: tuple[int, int] = (0, 1)
    alone: bool = False

    def functions(self, texts: Sequence[str], sizes: Mapping[str, int] | None = None) -> Made:
        """The functions of some texts, those that are on disk and those that are not.

        Args:
            texts: distinct ones.
            sizes: what they leave open, as it is at present.
        """
        index, ranks = self.place
        first = len(texts) * index // ranks
        large_first = sorted(texts, key=lambda text: (-text.count('"op"'), text))
        in_turn = [*large_first[first:], *large_first[:first]]
        missing = [text for text in in_turn if not self.store.holds(text)]
        keys = {} if sizes is None else {"sizes": sizes}
        found: dict[str, Function] = {}
        errors: dict[str, LoweringError] = {}
        num_compiled = 0
        with working_on(missing, self.store, processes=1 if self.alone else num_processes(ranks), sizes=sizes):
            for text in _progress(in_turn, show=bool(missing) and index == 0):
                try:
                    found[text], made = self.store.get(text, functools.partial(self.compile, text, **keys))
                    num_compiled += made
                except LoweringError as error:
                    errors[text] = error
        return Made(found, errors, num_compiled)


@dataclass(frozen=True)
class Made:
    """Functions by text.

    Args:
        functions: text -> what runs it.
        errors: text -> why there is none.
        num_compiled: so many of them this process has compiled.
    """

    functions: Mapping[str, Function]
    errors: Mapping[str, LoweringError]
    num_compiled: int


def _progress(texts: list[str], *, show: bool) -> Any:
    """The texts, with a bar for a person who waits."""
    return tqdm(
        texts, desc="fxzero: compiling regions", unit="region", leave=False, disable=not (show and sys.stderr.isatty())
    )
