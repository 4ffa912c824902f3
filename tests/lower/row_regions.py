"""Regions written by hand, and what they compute in fp64, for tests of generated kernels.

[Note: tolerance of a region]
A kernel rounds each value to fp32, and to the dtype in which it leaves; a cast inside rounds to its dtype. How far that
moves an output depends on the region. So the region is computed in fp64 several times more with each value off by a
random part of a few roundings, and an output may be off by a few times what was seen to happen, plus its last rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.graph.regions import Region
from fxzero.graph.row_ops import FLOATS, op_name, reduced
from fxzero.graph.step_graph import is_getitem, is_view
from fxzero.kernels.rms_norm import rms_norm_backward_reference
from fxzero.lower.region_text import region_text
from tests.kernels.closeness import EPS32

Value = torch.Tensor | float

TRIALS = 6
ROUNDINGS = 4


class Handmade:
    """A region in the making: inputs first, then calls.

    Attributes:
        graph: of fx, whose nodes have fake values.
        values: of the inputs.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = compat.new_fake_mode()
        self.values: dict[fx.Node, Value] = {}
        self.calls: list[fx.Node] = []

    def input(self, value: Value) -> fx.Node:
        """What comes in: a tensor, or a number of the host."""
        node = self.graph.placeholder(f"in{len(self.values)}")
        node.meta["val"] = compat.fake_like(self.mode, value) if isinstance(value, torch.Tensor) else value
        self.values[node] = value
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The next call."""
        node = self.graph.call_function(op, args, kwargs)
        with self.mode:
            plain, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = op(*plain, **named)
        self.calls.append(node)
        return node

    def text(self, *outputs: fx.Node, written: dict[fx.Node, fx.Node] | None = None) -> str:
        """The region's text.

        Args:
            outputs: calls whose values are returned, beside those that nothing reads.
            written: input -> the call whose value stands in its memory afterwards.
        """
        unread = [node for node in self.calls if not node.users and isinstance(node.meta["val"], torch.Tensor)]
        for node in self.graph.find_nodes(op="output"):
            self.graph.erase_node(node)
        self.graph.output(tuple(dict.fromkeys([*outputs, *unread, *(written or {}).values()])))
        form = region_text(Region(0, tuple(self.calls)), SimpleNamespace(forms={}))  # type: ignore[arg-type]
        names = {node: f"c{index}" for index, node in enumerate(self.calls)}
        names |= {node: f"i{index}" for index, node in enumerate(form.inputs)}
        self.inputs, self.returned = form.inputs, tuple(n for n in form.outputs if n not in (written or {}).values())
        document = json.loads(form.text)
        document["outputs"] = [names[node] for node in self.returned]
        document["written"] = {names[source]: names[node] for source, node in (written or {}).items()}
        return json.dumps(document, separators=(",", ":"))

    def ordered(self) -> list[Value]:
        """The values of the inputs as the text that was last made names them."""
        return [self.values[node] for node in self.inputs]


def reference(region: Handmade, *, generator: torch.Generator | None = None) -> dict[fx.Node, Any]:
    """The values of a region in fp64, casts to bf16 and fp16 aside; with a generator, each off by a few roundings."""
    env: dict[fx.Node, Any] = {n: v.double() if _is_float(v) else v for n, v in region.values.items()}
    for node in region.calls:
        found = {source: _moved_within(node, env[source], generator) for source in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
        args = tuple(_wide(arg) for arg in args)
        kwargs = {key: _wide(value) for key, value in kwargs.items()}
        out = _WITHOUT_CPU.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
        env[node] = _moved(node, _as_declared(node, out), generator)
    return env


def _rms_norm_backward(dy: Any, x: Any, _shape: Any, rstd: Any, weight: Any, _mask: Any) -> tuple[torch.Tensor, ...]:
    return rms_norm_backward_reference(dy, x, weight, rstd.squeeze(-1))


_WITHOUT_CPU = {torch.ops.aten._fused_rms_norm_backward.default: _rms_norm_backward}


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _wide(value: Any) -> Any:
    return torch.float64 if value in FLOATS else value


def _as_declared(node: fx.Node, out: Any) -> Any:
    """The value rounded to the dtype of a cast, and of the kind (floating or not) that it has in the region."""
    declared = node.meta["val"]
    if not isinstance(out, torch.Tensor):
        return out
    if not declared.dtype.is_floating_point:
        return out.to(declared.dtype)
    is_cast = not is_getitem(node) and op_name(node.target) == "aten::_to_copy.default"
    return (out.to(declared.dtype) if is_cast and declared.dtype != torch.float32 else out).double()


def _moved_within(node: fx.Node, value: Any, generator: torch.Generator | None) -> Any:
    """What a call reads: off by a rounding too, since its own terms may cancel. What is discrete reads exactly."""
    declared = node.meta["val"]
    exact = is_view(node) or is_getitem(node) or op_name(node.target).startswith(("aten::sign", "aten::_to_copy"))
    exact = exact or (isinstance(declared, torch.Tensor) and not declared.dtype.is_floating_point)
    if generator is None or exact or not _is_float(value):
        return value
    return _off(value, EPS32, generator)


def _off(value: torch.Tensor, part: float, generator: torch.Generator) -> torch.Tensor:
    return value * (1 + part * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1))


def _moved(node: fx.Node, out: Any, generator: torch.Generator | None) -> Any:
    if generator is None or (not _is_float(out) and not isinstance(out, tuple)):
        return out
    if isinstance(out, tuple):
        return tuple(_moved(node, one, generator) for one in out)
    if is_view(node) or is_getitem(node):
        return out
    source = reduced(node)
    columns = source.meta["val"].shape[-1] if source is not None else 1
    part = (ROUNDINGS + math.log2(columns) + columns / 64) * EPS32
    declared = node.meta["val"]
    if op_name(node.target) == "aten::_to_copy.default" and declared.dtype != torch.float32:
        part = torch.finfo(declared.dtype).eps
    return _off(out, part, generator)


def check_region(
    region: Handmade,
    function_of: Callable[[str], Callable[[list[Any]], tuple[Any, ...]]],
    *outputs: fx.Node,
    written: dict[fx.Node, fx.Node] | None = None,
) -> None:
    """What is made of a region's text computes what the region says ([Note: tolerance of a region]).

    Args:
        region: with its calls.
        function_of: makes the function of a text.
        outputs, written: as of `Handmade.text`.
    """
    text = region.text(*outputs, written=written)
    want = reference(region)
    generators = (torch.Generator().manual_seed(seed) for seed in range(TRIALS))
    trials = [reference(region, generator=generator) for generator in generators]
    inputs = [_fresh(region.values[node]) for node in region.inputs]
    given = dict(zip(region.inputs, inputs, strict=True))
    untouched = {node: _fresh(value) for node, value in given.items() if node not in (written or {})}
    values = [value if isinstance(value, torch.Tensor) else _number(value) for value in inputs]
    got = function_of(text)(values)
    assert not values, "the list of inputs is not empty"
    results = [
        *zip(region.returned, got, strict=True),
        *((node, given[source]) for source, node in (written or {}).items()),
    ]
    for node, value in results:
        _check(node, value, want[node], [trial[node] for trial in trials])
    for node, before in untouched.items():
        assert not isinstance(before, torch.Tensor) or _same(given[node], before), f"{node} was written over"


def _fresh(value: Value) -> Value:
    """A copy with the same strides, in memory of its own that holds nothing else."""
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    whole = torch.empty(size, dtype=value.dtype).copy_(value.as_strided((size,), (1,), 0))
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _same(a: Any, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _check(node: fx.Node, got: torch.Tensor, want: torch.Tensor, trials: Sequence[torch.Tensor]) -> None:
    declared = node.meta["val"]
    name = f"{node} = {node.target}"
    assert (got.dtype, got.shape) == (declared.dtype, declared.shape), f"{name}: {got.dtype} {list(got.shape)}"
    sized = [pair for pair in zip(declared.shape, declared.stride(), got.stride(), strict=True) if pair[0] > 1]
    assert not declared.numel() or all(mine == theirs for _, mine, theirs in sized), f"{name}: strides {got.stride()}"
    if not declared.dtype.is_floating_point:
        assert torch.equal(got, want), f"{name}: {int((got != want).sum())} of {want.numel()} differ"
        return
    info = torch.finfo(got.dtype)
    spread = torch.stack([(trial - want).abs() for trial in trials]).amax(0).nan_to_num()
    bound = (
        info.eps * want.abs()
        + 4 * spread
        + ROUNDINGS * EPS32 * want.abs()
        + ROUNDINGS * info.eps * info.smallest_normal
    )
    wrong = ~((got.double() - want).abs() <= bound) & ~((got.double() == want) | (got.isnan() & want.isnan()))
    if info.max < torch.finfo(torch.float32).max:
        wrong &= ~(got.isinf() & (want.abs() > 0.99 * info.max))
    if wrong.any():
        off = ((got.double() - want).abs() / bound)[wrong].max().item()
        raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, the worst by {off:.3g} bounds")
