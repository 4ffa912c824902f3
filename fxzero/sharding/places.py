"""Where a call stands among equal blocks of a model: one name for the same place of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fxzero.graph import StepGraph

_FEWEST_MATRICES = 2  # of a block: in one there is a pair that splits columns, then rows


class Places:
    """Paths of modules and parameters with a star for the number of a block that others may equal.

    [Note: blocks that are told apart]
    Calls at the same place of equal blocks are made in one way, so that the problem does not grow with depth. What has
    one matrix is no block here: of two `nn.Linear` in an `nn.Sequential` one may be split by columns and the other by
    rows, which is what such a pair is for. So numbers stay where fewer than two matrices lie below.

    Args:
        step: any.
    """

    def __init__(self, step: StepGraph) -> None:
        matrices = [node.meta["entry"].name for node in step.inputs("parameter") if node.meta["val"].dim() > 1]
        self._below = Counter(path for name in matrices for path in _above(name))
        self._known: dict[str, str] = {}

    def starred(self, path: str) -> str:
        """layers.*.mlp.0 for layers.3.mlp.0, if layers.3 is a block.

        Args:
            path: of a module or a parameter.
        """
        if path not in self._known:
            parts = path.split(".")
            prefixes = [*_above(path), path]
            self._known[path] = ".".join(
                "*" if part.isdigit() and self._below[prefix] >= _FEWEST_MATRICES else part
                for part, prefix in zip(parts, prefixes, strict=True)
            )
        return self._known[path]


def _above(path: str) -> Iterator[str]:
    """layers, layers.3 and layers.3.mlp for layers.3.mlp.0."""
    parts = path.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))
