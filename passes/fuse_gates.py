"""Gated activations, silu(g) u and gelu(g) u, by one op in forward and one in backward.

Backward of a gated MLP reads the gate, the other half and the activated gate; the op reads the first two, and nothing
that was made in between need be kept. The activation is torch's op, or the calls that a model writes it as (x times its
sigmoid, the tanh of a cubic): what they are is seen by running them ([Note: proof by values] in
`graph/small_values.py`), and so is what of backward is the gradient. Gate and other half may be parts of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph, kernel_ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import erase_dead
from fxzero.graph.gradient_calls import Calls, NotFused, Prover
from fxzero.graph.kernel_calls import KernelCalls, put_backward, put_forward
from fxzero.graph.small_values import can_run
from fxzero.graph.step_graph import device_of, is_getitem, is_view, tensor_val, yields_tensor
from fxzero.kernels.gated_activation import FORMS, gated_activation_backward_reference, gated_activation_reference
from fxzero.kernels.launch import FLOATS

aten = torch.ops.aten

ALL = ("gated_activation",)
_MOST_CALLS = 12  # of an activation
_TELLING = {aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default, aten.erf.default}


@graph_pass(
    requires=("captured",),
    provides=("gates-fused",),
    numerics="1e-6 relative a step in fp32: gelu and its slope in another order; in bf16 and fp16 a result is rounded "
    "once, where models round the activated gate before they multiply it",
)
def fuse_gates(step: StepGraph, *, names: tuple[str, ...] = ALL, device: str | None = None) -> int:
    """Make each gated activation by one call in forward and one in backward.

    Args:
        step: the graph, as captured.
        names: of ALL.
        device: a type of device; on any other the graph stays as it is. None: on all.

    Returns:
        The number of gated activations that are fused.
    """
    if not names or (device is not None and device_of(step) != device):
        return 0
    counted, prover = KernelCalls("gated_activation", "gates"), Prover(dict(step.positions()))
    for product in step.calls(aten.mul.Tensor):
        if product.meta["phase"] == "update" or not product.users:
            continue  # of no users is what backward made for a gate that is fused now
        try:
            calls, form = _gate(product, prover, counted)
        except NotFused:
            continue
        counted.found += 1
        try:
            _fuse(step, prover, calls, form)
            counted.fused += 1
        except NotFused as reason:
            counted.left(product, str(reason))
    erase_dead(step)
    step.remarks["fuse_gates"] = counted.told()
    return counted.fused


def _gate(product: fx.Node, prover: Prover, counted: KernelCalls) -> tuple[Calls, str]:
    """The calls of the gated activation that ends with a product, and its form.

    Raises:
        NotFused: if it is none.
    """
    tensors = [arg for arg in product.args if isinstance(arg, fx.Node) and yields_tensor(arg)]
    if len(tensors) != 2 or not _fits(product, tensors):
        raise NotFused
    for activated, other in (tensors, tensors[::-1]):
        if activated.meta["phase"] != product.meta["phase"]:
            continue  # in backward, the gradient of the other half has this form
        for gate, inner in _activations(activated, prover.position):
            calls = Calls((gate, other), inner, product)
            form = next((form for form in FORMS if _computes(prover, calls, form)), None)
            if form is not None:
                return calls, form
        if activated.target in _TELLING:
            counted.near(product, f"%{activated} is {activated.target}, which is no silu or gelu of one value")
    raise NotFused


def _fits(product: fx.Node, factors: list[fx.Node]) -> bool:
    """Whether the op yields such a product of such factors: all of one shape and dtype, and contiguous."""
    val = tensor_val(product)
    alike = all((tensor_val(node).shape, tensor_val(node).dtype) == (val.shape, val.dtype) for node in factors)
    return alike and val.dtype in FLOATS and val.is_contiguous() and val.dim() > 0


def _activations(node: fx.Node, position: dict[fx.Node, float]) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """(gate, calls) of what a value may be the activation of: single values from which pointwise calls make it."""
    inner: list[fx.Node] = []
    ahead = {node}
    while len(inner) < _MOST_CALLS:
        last = max(ahead, key=position.__getitem__)
        if not can_run(last) or is_view(last) or is_getitem(last) or not last.all_input_nodes:
            return
        ahead = (ahead - {last}) | {*last.all_input_nodes}
        inner.insert(0, last)
        if len(ahead) == 1 and any(call.target in _TELLING for call in inner):
            yield next(iter(ahead)), tuple(inner)


def _computes(prover: Prover, calls: Calls, form: str) -> bool:
    gate, other = calls.inputs

    def forward(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (gated_activation_reference(a, b, form),)

    a, b = tensor_val(gate), tensor_val(other)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and prover.computes(calls, forward, form)


def _fuse(step: StepGraph, prover: Prover, calls: Calls, form: str) -> None:
    """Put in the ops of a gated activation.

    Raises:
        NotFused: if backward cannot be replaced.
    """

    def backward(dy: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gated_activation_backward_reference(dy, a, b, form)

    gradients = prover.gradients(calls, backward, form)
    forward_op, backward_op = kernel_ops.OPS["gated_activation"]
    given: tuple[Any, ...] = (*calls.inputs, form)
    put_forward(step, prover.position, calls.output, forward_op, given)
    if gradients.of_output is not None:
        args = (gradients.of_output, *given)
        put_backward(step, prover.position, gradients.of_inputs, backward_op, args)
