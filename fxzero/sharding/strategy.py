"""What a call may do with the parts of its tensors that one rank of an axis holds."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxzero.graph.axis_placement import REPLICATED, Placement, divides
from fxzero.graph.edit import Editor, value_of


@dataclass(frozen=True)
class Tensor:
    """What a rule sees of a tensor: the whole, as one device would have it.

    Args:
        shape, strides: of the tensor.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, val: torch.Tensor) -> Tensor:
        """That of a fake tensor."""
        return cls(tuple(val.shape), tuple(val.stride()), val.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole."""
        return self.dtype.itemsize * math.prod(self.shape)


class OfStep:
    """A number that another step may have otherwise, such as a learning rate: no rule may rest on its value."""


class _FloatOfStep(float, OfStep):
    pass


class _IntOfStep(int, OfStep):
    pass


@dataclass(frozen=True)
class Call:
    """A call as a rule sees it.

    Args:
        target: the op.
        args, kwargs: as of the node, a `Tensor` where it has a node that yields one, and a number that is `OfStep`
            where it yields that.
        outputs: what it yields, one for each tensor; None for what it yields beside tensors.
        ranks: of the axis.
        blocks: numbers of blocks that shards may have along a dim that the op joins or cuts, or sees in another shape.
        head_blocks: attention's heads are so many blocks, of each of which a rank has a part: those that another axis
            takes apart later.
        attention: how attention is made, one of `attention.FORMS`; "auto": in any way.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor | None, ...]
    ranks: int
    blocks: tuple[int, ...] = (1,)
    head_blocks: int = 1
    attention: str = "auto"

    @classmethod
    def of(
        cls,
        node: fx.Node,
        ranks: int,
        *,
        blocks: tuple[int, ...] = (1,),
        head_blocks: int = 1,
        attention: str = "auto",
    ) -> Call:
        """The call of a node whose inputs and value are whole."""

        def seen(source: fx.Node) -> Any:
            val = source.meta["val"]
            if isinstance(val, (list, tuple)):
                return [Tensor.of(item) for item in val]
            if isinstance(val, torch.Tensor):
                return Tensor.of(val)
            return _FloatOfStep(val) if isinstance(val, float) else _IntOfStep(val)

        args = fx.map_arg(node.args, seen)
        kwargs = fx.map_arg(node.kwargs, seen)
        val = node.meta["val"]
        values = val if isinstance(val, (list, tuple)) else [val]
        outputs = tuple(Tensor.of(item) if isinstance(item, torch.Tensor) else None for item in values)
        return cls(node.target, tuple(args), dict(kwargs), outputs, ranks, blocks, head_blocks, attention)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that it takes, in the order of its arguments."""
        return tuple(_tensors((*self.args, *self.kwargs.values())))

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of this name in the op's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        names = [argument.name for argument in self.target._schema.arguments]
        index = names.index(name)
        return self.args[index] if index < len(self.args) else default


@dataclass(frozen=True)
class Local:
    """A call that is being rewritten to what one rank does.

    Args:
        editor: inserts before it.
        node: the call, with the arguments that it had.
        args, kwargs: its arguments with what this rank holds of them.
        call: as rules see it.
        axis: name of the mesh axis.
        coordinate: yields the input that holds this rank's index on the axis.
        ends: yields where the rows of experts end that are dim 0 of an input of the call, or of its value; whole.
    """

    editor: Editor
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call
    axis: str
    coordinate: Callable[[], fx.Node]
    ends: Callable[[fx.Node], fx.Node]

    @contextmanager
    def made_of(self, *args: Any, **kwargs: Any) -> Iterator[fx.Node]:
        """The call itself, on other arguments; what is inserted in the block stands behind it."""
        self.node.args, self.node.kwargs = args, kwargs
        self.node.meta["val"] = value_of(self.editor.step, self.node, self.editor.mode)
        with self.editor.after(self.node):
            yield self.node

    def all_reduce(self, value: fx.Node, op: str = "sum") -> fx.Node:
        """What all ranks' tensors come to."""
        return self.editor.all_reduce(value, self.axis, op=op, stem=f"{self.node.name}_{self.axis}")

    def yielded(self, found: fx.Node) -> tuple[fx.Node | None, ...]:
        """The nodes of what a call yields that yields as many values as this one."""
        if isinstance(found.meta["val"], torch.Tensor):
            return (found,)
        return tuple(
            None if tensor is None else self.editor.call(operator.getitem, found, index)
            for index, tensor in enumerate(self.call.outputs)
        )


# makes of a local call the nodes that yield what it yields on this rank, one for each of its outputs
Form = Callable[[Local], tuple[fx.Node | None, ...]]


def called_with(changes: Mapping[str, Any]) -> Form:
    """The form of an op that is told its part's sizes: the op itself, with other values for some arguments.

    Args:
        changes: name of an argument -> its value.
    """

    def form(local: Local) -> tuple[fx.Node | None, ...]:
        names = [argument.name for argument in local.call.target._schema.arguments]
        args = [changes.get(name, value) for name, value in zip(names, local.args, strict=False)]
        kwargs = {name: changes.get(name, value) for name, value in local.kwargs.items()}
        return local.yielded(local.editor.call(local.call.target, *args, **kwargs))

    return form


@dataclass(frozen=True)
class Message:
    """A collective that a strategy has inside.

    Args:
        algorithm: as `cost.communication` names it.
        num_bytes: of the whole tensor; of a shift, of what is passed on; of an all-to-all, of what a rank sends.
        is_beside: it is under way while the call computes.
    """

    algorithm: str
    num_bytes: int
    is_beside: bool = False


@dataclass(frozen=True)
class Strategy:
    """One way for the ranks of an axis to make a call together.

    Args:
        inputs: how each of the call's tensors must lie, in the order of `Call.tensors`.
        outputs: how what it yields lies then, in the order of `Call.outputs`; None for what is no tensor.
        form: how a rank makes its part; None: by the op itself, on what it holds, with sizes that are of the part.
        messages: collectives in that form.
        share: of the work of one device, what each rank does.
        in_blocks: whether the form is right for shards of several blocks, too; the op itself always is.
        calls: how many calls of the op that is. Messages that are under way beside them are so beside all but one.
        traffic: bytes that a rank reads and writes beside these calls.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement | None, ...]
    form: Form | None = field(default=None, compare=False)
    messages: tuple[Message, ...] = ()
    share: float = 1.0
    in_blocks: bool = False
    calls: int = 1
    traffic: float = 0.0

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"


def replicated(call: Call) -> Strategy:
    """Every rank does all of it."""
    outputs = tuple(None if output is None else REPLICATED for output in call.outputs)
    return Strategy((REPLICATED,) * len(call.tensors), outputs)


def with_blocks(call: Call, strategy: Strategy, blocks: int) -> Strategy | None:
    """The way with each shard in so many blocks; None where it says something of one block only.

    A way of equal parts over n ranks is one over n * blocks, too; a rank has some of these parts one after the other,
    and the op makes them together, since they are equal parts of what it is given.
    """
    lies = (*strategy.inputs, *strategy.outputs)
    if {placement.blocks for placement in lies if placement is not None and placement.is_shard} != {1}:
        return None
    if strategy.form is not None and not strategy.in_blocks:
        return None

    def split(placement: Placement | None) -> Any:
        is_shard = placement is not None and placement.is_shard
        return dataclasses.replace(placement, blocks=blocks) if is_shard else placement  # type: ignore[type-var]

    inputs, outputs = tuple(map(split, strategy.inputs)), tuple(map(split, strategy.outputs))
    found = dataclasses.replace(strategy, inputs=inputs, outputs=outputs)
    return found if fits(call, found) else None


def fits(call: Call, strategy: Strategy) -> bool:
    """Whether a strategy splits only dims that have equal parts for all ranks."""
    placed = [*zip(call.tensors, strategy.inputs, strict=True), *zip(call.outputs, strategy.outputs, strict=True)]
    return all(
        tensor is None or placement is None or divides(tensor.shape, placement, call.ranks)
        for tensor, placement in placed
    )


def _tensors(arg: Any) -> Iterator[Tensor]:
    if isinstance(arg, Tensor):
        yield arg
    elif isinstance(arg, (list, tuple)):
        for item in arg:
            yield from _tensors(item)
