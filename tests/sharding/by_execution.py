"""One call, made by the ranks of an axis in one of its ways: what they have together, and what one device has."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fxzero import compat_distributed
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import Placement
from fxzero.graph.shift_op import launch_shift
from fxzero.graph.step_graph import Result, StateEntry, yields_tensor
from fxzero.passes.split_tensors import rewrite
from fxzero.sharding.strategy import Strategy
from tests.sharding.recorded_calls import RecordedCall

aten = torch.ops.aten

AXIS = "tp"
TOLERANCE = 1e-5  # of the greatest element
COARSE_TOLERANCE = 1e-2  # where bfloat16 takes part
UNSET = (aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default)  # they yield any numbers


def fault_of(call: RecordedCall, strategy: Strategy, ranks: int) -> str | None:
    """What is wrong with a way of a call; None where the ranks have together what one device has."""
    try:
        return _differs(call, strategy, ranks)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _differs(call: RecordedCall, strategy: Strategy, ranks: int) -> str | None:
    generator = torch.Generator().manual_seed(2)
    whole = [
        # maxima and norms still to be made are of what is not negative ([Note: placements])
        tensor.abs() if placement.is_partial and placement.reduction != "sum" else tensor
        for tensor, placement in zip(call.tensors, strategy.inputs, strict=True)
    ]
    expected = _on_one_device(call, whole)
    parts = [parts_of(t, p, ranks, generator) for t, p in zip(whole, strategy.inputs, strict=True)]
    found = run_ranks(split(call, strategy, ranks), parts, ranks)
    if call.node.target in UNSET:
        return None  # the shapes were checked when the call was rewritten
    coarse = torch.bfloat16 in {tensor.dtype for tensor in (*whole, *expected.values())}
    for index, value in expected.items():
        placement = strategy.outputs[index]
        assert placement is not None
        tolerance = COARSE_TOLERANCE if coarse else TOLERANCE
        difference = compare(found[f"yielded{index}"], value, placement, tolerance=tolerance)
        if difference is not None:
            return f"output {index}: {difference}"
    return None


def _on_one_device(call: RecordedCall, tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    taken = iter(tensors)
    args, kwargs = fx.map_arg(
        (call.node.args, call.node.kwargs), lambda n: next(taken) if yields_tensor(n) else call.values[n]
    )
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond
    with torch.no_grad():
        found = call.node.target(*args, **kwargs)  # type: ignore[operator]
    values = found if isinstance(found, (list, tuple)) else [found]
    return {index: value for index, value in enumerate(values) if isinstance(value, torch.Tensor)}


def split(call: RecordedCall, strategy: Strategy, ranks: int) -> StepGraph:
    """A step of this call alone, rewritten as the pass does it: inputs lie as the way says, and so does what it yields.

    What is yielded is the next value of state that lies in the same way, so that nothing is converted.
    """
    node, graph = call.node, fx.Graph()
    step = StepGraph(graph, mesh={AXIS: ranks})
    ways: dict[fx.Node, Strategy] = {}
    lies = iter(strategy.inputs)

    def given(val: Any, name: str, placement: Placement | None) -> fx.Node:
        made = graph.placeholder(name)
        kind = "hyperparameter" if placement is None else "buffer"
        made.meta = {"entry": StateEntry(kind, name), "val": val, "phase": "forward", "module": ""}
        if placement is not None:
            ways[made] = Strategy((), (placement,))
        return made

    def taken(source: fx.Node) -> fx.Node:
        name = f"taken{len(graph.nodes)}"
        if yields_tensor(source):
            return given(source.meta["val"], name, next(lies))
        return given(call.values[source], name, None)

    args, kwargs = fx.map_arg((node.args, node.kwargs), taken)
    val = node.meta["val"]
    several = isinstance(val, (list, tuple))
    yielded = {i: v for i, v in enumerate(val if several else [val]) if isinstance(v, torch.Tensor)}
    for index, value in yielded.items():
        given(value, f"yielded{index}", strategy.outputs[index])
    made = graph.call_function(node.target, args, kwargs)
    made.meta = {"val": val, "phase": "forward", "module": ""}
    ways[made] = strategy
    results = []
    for index, value in yielded.items():
        results.append(graph.call_function(operator.getitem, (made, index)) if several else made)
        results[-1].meta = {"val": value, "phase": "forward", "module": ""}
    output = graph.output(tuple(results))
    output.meta = {"results": tuple(Result("buffer", f"yielded{index}") for index in yielded)}
    rewrite(step, axis=AXIS, ways=ways)
    return step


def run_ranks(step: StepGraph, parts: Sequence[Sequence[torch.Tensor]], ranks: int) -> dict[str, list[torch.Tensor]]:
    """Name of a result -> what each rank has of it.

    Args:
        step: for one rank.
        parts: of each tensor that it takes, what each rank has; numbers stand in the graph.
        ranks: how many.
    """
    if not dist.is_initialized():
        compat_distributed.fake_process_group(ranks)
    group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    torch.default_generator.manual_seed(0)
    given = iter(parts)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), compat_distributed.local_tensor_mode(ranks):
        for node in step.graph.nodes:
            if node.op == "placeholder":
                values[node] = _input(node, given, ranks)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if c10d.is_collective(node):
                    args = tuple(group if isinstance(arg, str) and arg == AXIS else arg for arg in args)
                values[node] = launched(node.target)(*args, **kwargs)
    found = {name: compat_distributed.local_values(values[node]) for (_, name), node in step.results.items()}
    return {name: [by_rank[rank] for rank in range(ranks)] for name, by_rank in found.items()}


def launched(target: Any) -> Any:
    """What a program calls for an op: of a shift, what works on several ranks' tensors at once, too."""
    return launch_shift if target is c10d.shift else target


def _input(node: fx.Node, given: Iterator[Sequence[torch.Tensor]], ranks: int) -> Any:
    entry = node.meta["entry"]
    if entry.kind == "coordinate":
        return compat_distributed.local_int({rank: rank for rank in range(ranks)})
    if entry.kind == "hyperparameter":
        return node.meta["val"]
    return None if entry.name.startswith("yielded") else compat_distributed.local_tensor(dict(enumerate(next(given))))


def parts_of(whole: torch.Tensor, placement: Placement, ranks: int, generator: torch.Generator) -> list[torch.Tensor]:
    """What each rank has of a tensor that lies in this way; parts to be reduced are drawn.

    Args:
        whole: the tensor; what is still to be made a maximum or norm is not negative.
        placement: how it lies.
        ranks: of the axis.
        generator: for parts.
    """
    if placement.is_shard:
        blocks = [block.chunk(ranks, placement.dim) for block in whole.chunk(placement.blocks, placement.dim)]
        return [torch.cat([block[rank] for block in blocks], placement.dim) for rank in range(ranks)]
    if not placement.is_partial:
        return [whole.clone() for _ in range(ranks)]
    draw = functools.partial(torch.rand, whole.shape, generator=generator)
    scale = greatest(whole) or 1.0
    if placement.reduction == "norm2":
        shares = torch.stack([draw() + 0.1 for _ in range(ranks)])
        return [(whole * share).to(whole.dtype) for share in shares / shares.pow(2).sum(0).sqrt()]
    if placement.reduction == "max":
        owner = (draw() * ranks).long()
        return [torch.where(owner == rank, whole, (whole * draw()).to(whole.dtype)) for rank in range(ranks)]
    others = [((draw() - 0.5) * min(scale, 100.0)).to(whole.dtype) for _ in range(ranks - 1)]
    return [*others, whole - functools.reduce(torch.add, others)]


def compare(
    parts: Sequence[torch.Tensor], whole: torch.Tensor, placement: Placement, *, tolerance: float = TOLERANCE
) -> str | None:
    """How what ranks have together differs from a tensor of one device; None where it does not.

    Args:
        parts: of the ranks.
        whole: the tensor of one device.
        placement: how the parts lie.
        tolerance: of the greatest element; integers and truth values are compared exactly.
    """
    if placement.is_shard or placement.is_partial:
        scale = max(map(greatest, (*parts, whole)))
        return _difference(joined(parts, placement), whole, tolerance * scale)
    differences = (_difference(part, whole, tolerance * greatest(whole)) for part in parts)
    return next((difference for difference in differences if difference is not None), None)


def joined(parts: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor:
    """The tensor that ranks have together, in parts of a dim or still to be reduced."""
    if placement.is_shard:
        blocks = zip(*(part.chunk(placement.blocks, placement.dim) for part in parts), strict=True)
        return torch.cat([part for block in blocks for part in block], placement.dim)
    stacked = torch.stack(list(parts))
    if placement.reduction == "norm2":
        return stacked.pow(2).sum(0).sqrt()
    return stacked.sum(0, dtype=parts[0].dtype) if placement.reduction == "sum" else stacked.amax(0)


def _difference(found: torch.Tensor, whole: torch.Tensor, bound: float) -> str | None:
    if (found.dtype, found.shape) != (whole.dtype, whole.shape):
        return f"{found.dtype} {tuple(found.shape)}, expected {whole.dtype} {tuple(whole.shape)}"
    if not whole.is_floating_point():
        return None if torch.equal(found, whole) else f"{int((found != whole).sum())} other elements"
    if torch.allclose(found, whole, rtol=0, atol=bound, equal_nan=True):
        return None
    return f"off by {greatest(found - whole):.2g}, expected at most {bound:.2g}"


def greatest(tensor: torch.Tensor) -> float:
    """The greatest absolute value of the finite elements; 0 where there are none."""
    if not tensor.numel():
        return 0.0
    finite = torch.nan_to_num(tensor.double().abs(), nan=0.0, posinf=0.0)
    return float(finite.max())


def named(call: RecordedCall, strategy: Strategy, ranks: int) -> str:
    """What a person reads of a way of a call."""
    shapes = ", ".join(str(list(tensor.shape)) for tensor in call.tensors)
    return f"{call.node.target} of {shapes} over {ranks}: {strategy}"
