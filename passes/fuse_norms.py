"""RMS norms and layer norms by one op each, forward and backward.

[Note: fused norms]
A model writes an RMS norm as half a dozen calls, in fp32 whatever the dtype of its input, and backward is a dozen more
that read three values in between. One op in forward and one in backward read and write no more than input, output,
weight and one number a row, and keep the input and that number. Forward is found by structure: the root of a mean of
squares, what it multiplies, then casts and a product with a weight of the columns (1 + w is such a weight, and its
gradient that of w). What backward is, and that both are what the op computes, is seen by running them ([Note:
gradients by value], [Note: proof by values]). A layer norm is an op of torch's, of the same arguments, and so is an RMS
norm of torch.nn on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph, kernel_ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import erase_dead
from fxzero.graph.gradient_calls import Calls, Gradients, NotFused, Prover
from fxzero.graph.kernel_calls import KernelCalls, put_backward, put_forward
from fxzero.graph.step_graph import device_of, tensor_val, yields_tensor
from fxzero.kernels.launch import FLOATS, MAX_COLUMNS
from fxzero.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference

aten = torch.ops.aten

ALL = ("rms_norm", "layer_norm")
# of torch's own, forward and backward
_OWN: dict[str, tuple[Any, Any]] = {
    "rms_norm": (aten._fused_rms_norm.default, aten._fused_rms_norm_backward.default),
    "layer_norm": (aten.native_layer_norm.default, aten.native_layer_norm_backward.default),
}


@dataclass(frozen=True)
class _RMSNorm:
    """An RMS norm.

    Args:
        calls: of x, and of the weight where there is one.
        eps: added to the mean of squares.
    """

    calls: Calls
    eps: float


@graph_pass(
    requires=("captured",),
    provides=("norms-fused",),
    numerics="1e-6 relative a step in fp32: sums over columns and rows in another order; in bf16 and fp16 a result is "
    "rounded once, where models round the normalized input before they multiply it by the weight",
)
def fuse_norms(step: StepGraph, *, names: tuple[str, ...] = ALL, device: str | None = None) -> int:
    """Make each RMS norm and layer norm by one call in forward and one in backward.

    Args:
        step: the graph, as captured.
        names: of ALL, which norms.
        device: a type of device; on any other the graph stays as it is. None: on all.

    Returns:
        The number of norms that are fused.
    """
    if device is not None and device_of(step) != device:
        return 0
    told = [_FUSE[name](step) for name in ALL if name in names]
    erase_dead(step)
    step.remarks["fuse_norms"] = "; ".join(calls.told() for calls in told)
    return sum(calls.fused for calls in told)


def _fuse_rms_norms(step: StepGraph) -> KernelCalls:
    counted, prover = KernelCalls("rms_norm", "norms"), Prover(dict(step.positions()))
    _fuse_own(step, counted, prover.position)
    for root in [node for node in step.calls() if node.meta["phase"] != "update" and _is_root(node)]:
        forms = list(_rms_norms(root, prover.position))
        if isinstance(forms[0], NotFused):
            counted.near(root, str(forms[0]))
            continue
        counted.found += 1
        counted.fused += _fuse_first(step, prover, counted, root, forms)
    return counted


def _fuse_first(step: StepGraph, prover: Prover, counted: KernelCalls, root: fx.Node, forms: list[Any]) -> bool:
    """Replace the first form that can be, the longest ones being first; returns whether there is one."""
    reason = ""
    for norm in forms:
        try:
            gradients = _proven(prover, norm)
        except NotFused as why:
            reason = reason or str(why)
            continue
        _replace(step, prover.position, norm, gradients)
        return True
    counted.left(root, reason)
    return False


def _is_root(node: fx.Node) -> bool:
    """Whether a call may be the root of a mean of squares, or one over it."""
    return node.target in (aten.rsqrt.default, aten.sqrt.default) or (
        node.target is aten.pow.Tensor_Scalar and node.args[1] in (-0.5, 0.5)
    )


def _rms_norms(root: fx.Node, position: dict[fx.Node, float]) -> Iterator[_RMSNorm | NotFused]:
    """What of an RMS norm one op can be: with the weight or without, with casts or without; else why there is none."""
    try:
        above, eps, x = _mean_of_squares(root)
        scaled = _scaled(root, x, position)
    except NotFused as reason:
        yield reason
        return
    inner = {*above, root, *scaled}
    ends = list(_ends(scaled[-1]))
    sources = [x]
    if _widens(x):
        inner.add(x)
        sources.insert(0, x.all_input_nodes[0])
    yield from _forms(sources, inner, ends, eps, position)


def _forms(
    sources: list[fx.Node],
    inner: set[fx.Node],
    ends: list[tuple[fx.Node, fx.Node | None, set[fx.Node]]],
    eps: float,
    position: dict[fx.Node, float],
) -> Iterator[_RMSNorm | NotFused]:
    reason = NotFused(f"its dtype, shape or strides are none that the op has: {tensor_val(ends[-1][0]).dtype}")
    none = True
    for source in sources:
        for end, weight, between in reversed(ends):
            if not _takes(source, end):
                continue
            calls = sorted({*inner, *between} - {source, end}, key=position.__getitem__)
            inputs = (source,) if weight is None else (source, weight)
            none = False
            yield _RMSNorm(Calls(inputs, tuple(calls), end), eps)
    if none:
        yield reason


def _mean_of_squares(root: fx.Node) -> tuple[set[fx.Node], float, fx.Node]:
    """The calls above a root, eps, and what is squared.

    Raises:
        NotFused: with the first op that is another one.
    """
    added = _source(root, 0)
    calls = {root, added}
    if added.target not in (aten.add.Tensor, aten.add.Scalar) or not isinstance(added.args[1], float):
        raise NotFused(f"%{added} is {_named(added)}, not a mean and a number")
    mean = _source(added, 0)
    if mean.target is not aten.mean.dim or not _over_columns(mean):
        raise NotFused(f"%{mean} is {_named(mean)}, not a mean of the last dimension, which is kept")
    square = _source(mean, 0)
    of_two = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    of_itself = square.target is aten.mul.Tensor and square.args[0] is square.args[1]
    if not of_two and not of_itself:
        raise NotFused(f"%{square} is {_named(square)}, not a square")
    return {*calls, mean, square}, float(added.args[1]), _source(square, 0)


def _scaled(root: fx.Node, x: fx.Node, position: dict[fx.Node, float]) -> list[fx.Node]:
    """What a root multiplies or divides x by, and the call that does.

    Raises:
        NotFused: if none does.
    """
    divides = root.target is aten.sqrt.default or root.args[-1] == 0.5
    found: list[list[fx.Node]] = []
    for user in root.users:
        if divides and user.target is aten.reciprocal.default:
            found += [[user, call] for call in user.users if _multiplies(call, user, x)]
        elif _divides(user, root, x) if divides else _multiplies(user, root, x):
            found.append([user])
    if not found:
        raise NotFused(f"%{root} scales nothing that it is the root of")
    return min(found, key=lambda calls: position[calls[-1]])  # what divides does so in backward, too


def _multiplies(call: fx.Node, factor: fx.Node, x: fx.Node) -> bool:
    others = [arg for arg in call.args if arg is not factor]
    return call.target is aten.mul.Tensor and len(others) == 1 and _narrow(others[0]) is _narrow(x)


def _divides(call: fx.Node, root: fx.Node, x: fx.Node) -> bool:
    return call.target is aten.div.Tensor and call.args[1] is root and _narrow(call.args[0]) is _narrow(x)


def _ends(scaled: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None, set[fx.Node]]]:
    """Where a norm may end: (call, weight, calls between), the shortest one first."""
    node, weight, between = scaled, None, {scaled}
    while True:
        yield node, weight, set(between)
        further = [(user, factor) for user in node.users for factor in _goes_on(user, node, weight)]
        if len(further) != 1:
            return
        node, factor = further[0]
        weight = weight or factor
        between.add(node)


def _goes_on(user: fx.Node, node: fx.Node, weight: fx.Node | None) -> list[fx.Node | None]:
    """[weight] where a call multiplies a norm by one, [None] where it casts it, [] else."""
    if user.target is aten._to_copy.default and tensor_val(user).is_floating_point():
        return [None]
    if user.target is not aten.mul.Tensor or weight is not None:
        return []
    other = user.args[1] if user.args[0] is node else user.args[0]
    is_weight = isinstance(other, fx.Node) and yields_tensor(other) and tensor_val(other).dim() == 1
    return [other] if is_weight and tensor_val(other).shape == tensor_val(node).shape[-1:] else []  # type: ignore


def _takes(x: fx.Node, y: fx.Node) -> bool:
    """Whether the op takes x and yields y: its dtype, all of it in a row."""
    given, made = tensor_val(x), tensor_val(y)
    dense = made.is_contiguous() and given.shape == made.shape and given.dtype == made.dtype
    return dense and given.dtype in FLOATS and 1 <= given.shape[-1] <= MAX_COLUMNS


def _proven(prover: Prover, norm: _RMSNorm) -> Gradients:
    """The gradients of a norm.

    Raises:
        NotFused: if the op computes something else, or backward cannot be replaced.
    """
    eps, weighted = norm.eps, len(norm.calls.inputs) > 1

    def forward(x: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return rms_norm_reference(x, weight, eps)

    def backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        found = rms_norm_backward_reference(dy, x, weight, rms_norm_reference(x, weight, eps)[1])
        return found if weighted else found[:1]

    form = ("rms_norm", eps, weighted)
    if not prover.computes(norm.calls, forward, form):
        raise NotFused("its calls yield other numbers than the op")
    return prover.gradients(norm.calls, backward, form)


def _replace(step: StepGraph, position: dict[fx.Node, float], norm: _RMSNorm, gradients: Gradients) -> None:
    x, weight = (*norm.calls.inputs, None)[:2]
    forward, backward = kernel_ops.OPS["rms_norm"]
    _, rstd = put_forward(step, position, norm.calls.output, forward, (x, weight, norm.eps), results=2)
    if gradients.of_output is not None:
        put_backward(step, position, gradients.of_inputs, backward, (gradients.of_output, x, weight, rstd))


def _fuse_layer_norms(step: StepGraph) -> KernelCalls:
    counted = KernelCalls("layer_norm", "norms")
    _fuse_own(step, counted, dict(step.positions()))
    return counted


def _fuse_own(step: StepGraph, counted: KernelCalls, position: dict[fx.Node, float]) -> None:
    """Each norm that is one op of torch's is the kernel's, where it goes over the last dimension."""
    own, own_backward = _OWN[counted.kernel]
    for node in step.calls(own):
        counted.found += 1
        try:
            _check_own(node, own_backward)
        except NotFused as reason:
            counted.left(node, str(reason))
            continue
        _replace_own(step, position, node, counted.kernel)
        counted.fused += 1


def _check_own(node: fx.Node, backward: Any) -> None:
    """A kernel can be what a norm of torch's is, and all that reads its mean and root is its backward.

    Raises:
        NotFused: if not.
    """
    x, shape, *given, eps = node.args
    if len(shape) != 1 or not isinstance(eps, float) or not _takes(x, _parts(node)[0]):  # type: ignore[arg-type]
        raise NotFused(f"it goes over {len(shape)} dimensions, or a row, dtype or eps that the op does not take")  # type: ignore[arg-type]
    tensors = [tensor_val(source) for source in given if isinstance(source, fx.Node)]
    if any(val.dtype not in FLOATS for val in tensors):
        raise NotFused("its weight or bias is no tensor of floats that the op takes")
    for part in (part for place, part in _parts(node).items() if place):
        for user in part.users:
            if user.target is not backward or user.args[1] is not x:
                raise NotFused(f"its mean or root, %{part}, is also read by %{user}")


def _parts(node: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in node.users}  # type: ignore[misc]


def _replace_own(step: StepGraph, position: dict[fx.Node, float], node: fx.Node, kernel: str) -> None:
    x, _, *given, eps = node.args
    forward, backward = kernel_ops.OPS[kernel]
    parts = _parts(node)
    count = len(given) + 1  # y, and what is kept: a root, beside a mean where there is a bias
    backwards = {user: None for place, part in parts.items() if place for user in part.users}
    _, *kept = put_forward(step, position, parts[0], forward, (x, *given, eps), results=count)
    for old in backwards:
        found = _parts(old)
        replaced = tuple((found[place],) if place in found else () for place in range(count))
        biased = [bias is not None for bias in given[1:]]
        put_backward(step, position, replaced, backward, (old.args[0], x, given[0], *kept, *biased), results=count)


_FUSE = {"rms_norm": _fuse_rms_norms, "layer_norm": _fuse_layer_norms}


def _source(node: fx.Node, place: int) -> fx.Node:
    source = node.args[place] if node.op == "call_function" and len(node.args) > place else None
    if not isinstance(source, fx.Node) or not yields_tensor(source):
        raise NotFused(f"%{node} is {_named(node)}")
    return source


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else "an input"


def _over_columns(mean: fx.Node) -> bool:
    dims = mean.args[1]
    return dims in ([-1], [tensor_val(_source(mean, 0)).dim() - 1]) and mean.args[2:3] == (True,)


def _narrow(node: Any) -> Any:
    """What a value is cast from, if it is cast to a wider dtype."""
    return node.all_input_nodes[0] if isinstance(node, fx.Node) and _widens(node) else node


def _widens(node: fx.Node) -> bool:
    if node.target is not aten._to_copy.default:
        return False
    source, made = tensor_val(node.all_input_nodes[0]), tensor_val(node)
    return source.is_floating_point() and source.dtype.itemsize < made.dtype.itemsize
