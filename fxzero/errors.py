"""Every error that fxzero raises on purpose, each with one line: where, expected, got, what to do.

docs/errors.md has an entry for each class. Raise them through `FxzeroError.of`, chained with `from` where
another exception was the cause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class FxzeroError(Exception):
    """Base of all errors that fxzero raises; never raised itself.

    Attributes `where`, `expected`, `got` and `fix` hold the parts of a message made by `of`, and are None for
    a bare message.
    """

    where: str | None = None
    expected: str | None = None
    got: str | None = None
    fix: str | None = None

    @classmethod
    def of(cls, where: str, *, expected: str, got: str, fix: str) -> Self:
        """The error whose message is the line 'where: expected X, got Y; what to do'.

        Args:
            where: the plan key, module, op, pass or node that is wrong, with the name a user knows it by.
            expected: what would have been right.
            got: the value that was there instead; values in `repr` form.
            fix: what the reader should do, as an instruction.
        """
        where, expected, got, fix = (" ".join(part.splitlines()) for part in (where, expected, got, fix))
        error = cls(f"{where}: expected {expected}, got {got}; {fix}")
        error.where, error.expected, error.got, error.fix = where, expected, got, fix
        return error

    def at(self, outer: str) -> Self:
        """The same error, its place inside `outer`, such as the file that a plan was read from."""
        error = type(self)(f"{outer}: {self}")
        error.where = outer if self.where is None else f"{outer}: {self.where}"
        error.expected, error.got, error.fix = self.expected, self.got, self.fix
        return error


class PlanError(FxzeroError):
    """Raised when a plan cannot be honoured: unknown key, wrong value, mesh at odds with the world size."""


class CaptureError(FxzeroError):
    """Raised when model, loss, optimizer or batch cannot be captured as one step; names module and op."""


class PipelineError(FxzeroError):
    """Raised when passes are put in an order in which one of them lacks a fact that it requires."""


class RewriteError(FxzeroError):
    """Raised by a pass that is given a graph which it cannot handle; the graph stays as it was."""


class VerifyError(FxzeroError):
    """Raised when a graph breaks a rule after a pass: a bug in fxzero, not in the user's program."""


class LoweringError(FxzeroError):
    """Raised when a region of the program cannot be compiled, or compiled ones cannot be kept."""


class GradientOverflowError(FxzeroError):
    """Raised when too many steps in a row were skipped because gradients overflow at every loss scale."""


class OffloadError(FxzeroError):
    """Raised when a tensor cannot be written to or read from where a plan keeps it: full disk, file gone."""


class HardwareError(FxzeroError):
    """Raised when the description of a machine lacks a figure or holds one that cannot be, or costs are another's."""


class RankMismatchError(FxzeroError):
    """Raised on every rank, before the first collective, when ranks hold different plans or programs."""
