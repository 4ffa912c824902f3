"""What was decided for a step, and how a person reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxzero.graph.blocks import list_of
from fxzero.graph.text import size_text
from fxzero.recipe import NOTHING_DECIDED, Decided

RECOMPUTED = "recomputed"
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Group:
    """Tensors of one kind, over all copies of their block.

    Args:
        where: path of the modules that they belong to, "*" for the number of the block.
        what: "activations", "optimizer state" or "parameters".
        how: "recomputed", "offloaded to host", "offloaded to host, updated there" or "offloaded to nvme".
        blocks, copies: of how many blocks they are, and how many there are.
        saved_bytes: that the device does not keep: of activations, from forward to backward; of state, between steps.
        seconds: of having them again.
    """

    where: str
    what: str
    how: str
    blocks: int
    copies: int
    saved_bytes: int
    seconds: float

    def __str__(self) -> str:
        blocks = f" in {self.blocks} of {self.copies} blocks" if self.copies > 1 else ""
        size = f"{size_text(self.saved_bytes)}" if self.saved_bytes > 0 else "for others, with none of their own freed"
        return f"{self.where} {self.what}: {self.how}{blocks}, {size} for {_time(self.seconds)}"


@dataclass(frozen=True)
class Decision:
    """What is kept, computed again or moved off the device, and why.

    Args:
        decided: what passes are told.
        budget_bytes: what the plan says; None: no bound, the fastest was looked for.
        peak_bytes: predicted, with this decision.
        kept_peak_bytes: predicted with nothing decided.
        host_bytes: the most that it puts into host memory, predicted.
        seconds: predicted, of what is done for the decision in each step, if nothing hides it.
        step_seconds: predicted, of all compute of a step with nothing decided.
        hardware: what the predictions of time are for.
        groups: what was decided, most bytes first.
    """

    decided: Decided = NOTHING_DECIDED
    budget_bytes: int | None = None
    peak_bytes: int = 0
    kept_peak_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    hardware: str = ""
    groups: tuple[Group, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The captured step's forward nodes that backward has again (masks among them: kept as booleans)."""
        return self.decided.recomputed

    def __str__(self) -> str:
        budget = "no budget" if self.budget_bytes is None else f"budget {size_text(self.budget_bytes)}"
        head = (
            f"{budget}: predicted peak {size_text(self.peak_bytes)}, "
            f"{size_text(self.kept_peak_bytes)} with everything kept"
        )
        if not self.groups:
            return f"{head}; so everything is"
        head += f", {size_text(self.host_bytes)} on the host" if self.host_bytes else ""
        cost = f"{_time(self.seconds)} beside a step's {_time(self.step_seconds)} on {self.hardware} (predicted)"
        return "\n".join([f"{head}; {cost}", *(f"  {group}" for group in self.groups)])


def in_order(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Groups as people are told them: most bytes first."""
    return tuple(sorted(groups, key=lambda group: (-group.saved_bytes, group.where, group.what, group.how)))


def where_of(module: str, block: str) -> str:
    """How a person names all copies of a module: down to the children of its block, "layers.*.mlp".

    Args:
        module: its path.
        block: path of the repeated block that it lies in; "" outside of these.
    """
    if not block:
        return module.partition(".")[0] or "the model"
    child = module[len(block) + 1 :].partition(".")[0] if module.startswith(block) else ""
    return ".".join(part for part in (list_of(block), "*", child) if part)


def _time(seconds: float) -> str:
    sign, seconds = "-" * (seconds < 0), abs(seconds)
    if seconds < 1e-4:
        return f"{sign}{seconds * 1e6:.0f} us"
    return f"{sign}{seconds * 1e3:.1f} ms" if seconds < 1 else f"{sign}{seconds:.2f} s"
