"""The mesh of a plan: ranks by axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxzero.errors import PlanError
from fxzero.plan_values import integer, nearest, show

AXES = ("dp", "dp_replicate", "ep", "tp", "sp")
RESERVED_AXES = ("pp",)


def mesh_of(where: str, value: Any) -> Mesh | None:
    """A mesh of what a plan was given: axis -> size, or None.

    Raises:
        PlanError: naming `where`.
    """
    if value is None or isinstance(value, Mesh):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(axis, str) for axis in value):
        fix = "write {'dp': 4}, or leave it out for all ranks on dp"
        raise PlanError.of(where, expected="axis names with their sizes", got=show(value), fix=fix)
    return Mesh(**value)


class Mesh(Mapping[str, int]):
    """Axes of ranks with their sizes, outermost first: immutable, hashable, equal only in the same order.

    Raises:
        PlanError: no axis, an unknown or reserved one, or a size that is no positive integer.
    """

    __slots__ = ("_sizes",)

    def __init__(self, /, **axes: int) -> None:
        if not axes:
            raise PlanError.of("Plan.mesh", expected="at least one axis", got="none", fix="write {'dp': 4}")
        size_of = integer(1, fix="write how many ranks the axis has, or leave the axis out")
        for axis, size in axes.items():
            if axis not in AXES + RESERVED_AXES:
                fix = nearest(axis, AXES)
                raise PlanError.of("Plan.mesh", expected="a mesh axis", got=show(axis), fix=fix)
            where = f"Plan.mesh[{axis!r}]"
            if size_of(where, size) != 1 and axis in RESERVED_AXES:
                fix = f"axis {axis!r} is reserved, not built yet: leave it out"
                raise PlanError.of(where, expected="size 1", got=show(size), fix=fix)
        self._sizes = {axis: int(size) for axis, size in axes.items()}

    def __getitem__(self, axis: str) -> int:
        return self._sizes[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and tuple(self.items()) == tuple(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{axis}={size}' for axis, size in self.items())})"
