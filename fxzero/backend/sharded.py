"""What `fxzero.shard` has made of a model: how its parameters rest, and who must agree before they are sent.

[Note: sharded parameters in a loop of one's own]
A module owns DTensors, as under FSDP2; what its forward reads as an attribute is the whole tensor, gathered by the op
`fxzero::unshard`, and its gradient comes back through `fxzero::reduce_gradient` as this rank's rows of the mean. Where
nothing is compiled the two ops do just that. The backend takes them out of what it compiles: there the graph is that of
one device again, and the passes of the plan decide where ranks gather and reduce.
Source: parameters read through a property that gathers, in SimpleFSDP (Zhang et al., 2024).
"""

from __future__ import annotations

import itertools
import math
import weakref

import torch

from fxzero.errors import FxzeroError, PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.ops import shard_rows
from fxzero.graph.step_graph import rests_as_rows
from fxzero.plan import Plan
from fxzero.runtime import gloo
from fxzero.runtime.agreement import Agreement
from fxzero.runtime.topology import Topology

WHOLE = -1  # in place of a number of rows: the tensor rests whole on every rank

_numbers = itertools.count()
_BY_NAME: weakref.WeakValueDictionary[str, Sharded] = weakref.WeakValueDictionary()  # as groups, for ops to find


class Sharded:
    """How the parameters of one model rest on this rank.

    Args:
        topology: this rank's place; its plan is what `shard` was given, with its mesh resolved.
        agreement: of the ranks that train the model.

    Attributes:
        name: what the ops call it.
    """

    def __init__(self, topology: Topology, agreement: Agreement) -> None:
        self.topology = topology
        self.agreement = agreement
        self.name = f"shard {next(_numbers)}"
        _BY_NAME[self.name] = self

    @property
    def plan(self) -> Plan:
        """What `shard` was given, with its mesh resolved."""
        return self.topology.plan

    def rows_of(self, shape: torch.Size) -> int:
        """Rows that every rank holds of a parameter, the last ones padding; WHOLE where it is not split."""
        ranks = self.plan.axes["dp"]
        if ranks == 1 or not rests_as_rows(shape, self.plan.persist_below):
            return WHOLE
        return shard_rows(shape[0], ranks)

    def agree(self, text: str) -> None:
        """Return when all ranks are about to run the program of this text.

        Raises:
            RankMismatchError: on every rank, naming the first line that differs; or ranks that failed or are missing.
        """
        self.agreement.settle(text)

    def gather(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """The whole tensor, from the rows of all ranks of dp.

        Args:
            rows: this rank's, with padding or without.
            count: rows of the whole tensor.
        """
        ranks, group = self.plan.axes["dp"], self.topology.groups["dp"]
        on_gloo = gloo.carries(group, rows.device.type)
        launch = gloo.launcher_of(c10d.all_gather) if on_gloo else c10d.all_gather
        padded = padded_rows(rows, shard_rows(count, ranks))
        return c10d.wait(launch(padded, ranks, group.group_name))[:count]  # type: ignore[no-any-return]

    def reduce(self, full: torch.Tensor, rows: int) -> torch.Tensor:
        """The mean of a gradient over all ranks: the first of this rank's rows of it, or all where it rests whole.

        Args:
            full: this rank's gradient of the whole tensor.
            rows: how many of this rank's rows; WHOLE for a parameter that rests whole.
        """
        axes, groups = self.plan.axes, self.topology.groups
        reduced = full.contiguous()
        over = [axis for axis in ("dp", "dp_replicate") if axes.get(axis, 1) > 1]
        if rows != WHOLE:
            each = shard_rows(full.shape[0], axes["dp"])
            padded = padded_rows(reduced, each * axes["dp"])
            reduced = c10d.wait(c10d.reduce_scatter(padded, "avg", axes["dp"], groups["dp"].group_name))
            over.remove("dp")
        for axis in over:
            reduced = c10d.wait(c10d.all_reduce(reduced, "avg", groups[axis].group_name))
        return reduced.clone() if reduced is full else reduced if rows == WHOLE else reduced[:rows]


def tell(agreement: Agreement, error: Exception) -> None:
    """Tell the other ranks that this one cannot go on, so that they need not wait for it."""
    agreement.fail(str(error) if isinstance(error, FxzeroError) else repr(error))


def sharded_by(name: str) -> Sharded:
    """What an op calls `name`.

    Raises:
        PlanError: if its model is gone.
    """
    found = _BY_NAME.get(name)
    if found is None:
        fix = "keep the model that fxzero.shard has returned, and call that"
        raise PlanError.of(name, expected="a model in use", got="one that is gone", fix=fix)
    return found


def padded_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Contiguous rows followed by as many others as make `count`; what these hold means nothing.

    Where memory reaches far enough behind the rows nothing is copied: `shard` has left room for that.

    Args:
        rows: at most `count` of them, in dim 0.
        count: rows of the result.
    """
    rows = rows.contiguous()
    if rows.shape[0] == count:
        return rows.view_as(rows)
    shape = (count, *rows.shape[1:])
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if room >= math.prod(shape):
        return rows.as_strided(shape, torch.empty(shape, device="meta").stride(), rows.storage_offset())
    memory = rows.new_zeros(shape)
    memory[: rows.shape[0]].copy_(rows)
    return memory
