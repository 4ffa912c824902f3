"""The repeated blocks of a model: the modules of its lists, such as layers.0, layers.1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NUMBERED = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")  # a path up to its first number: layers.3


def with_stars(path: str) -> str:
    """A path with a star for each number in it, the same for all blocks of a list: layers.*.mlp."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def repeated_blocks(paths: Iterable[str]) -> dict[str, str]:
    """Path of a module -> the module of a list that it lies in, where that list has more than one."""
    numbered = {path: match[0] for path in paths if (match := _NUMBERED.match(path))}
    lists = Counter(list_of(block) for block in set(numbered.values()))
    return {path: block for path, block in numbered.items() if lists[list_of(block)] > 1}


def list_of(block: str) -> str:
    """The list that a repeated block stands in: layers, for layers.3."""
    return block.rpartition(".")[0]
