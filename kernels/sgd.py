"""SGD with momentum on lists of shards, in place, in one launch and one pass over memory.

    sgd_(params, grads, momenta, ...)
        g = grad inverse_scale clip (negated to maximize)
        g = g + weight_decay p
        m = g in the first step, later momentum m + (1 - dampening) g
        p = p - lr (g + momentum m) with nesterov, else p - lr m

Without momentum there is no m, and p = p - lr g. The arithmetic is that of torch.optim.SGD with foreach=False, op by op
in fp32, with no rounding of gradients or parameters in bf16 or fp16 on the way. Where `overflow` holds anything but 0,
nothing is written; the next step is then still the first one, if this was. `copies` are written with the new
parameters, rounded.

Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), with torch's m.

Shapes: any, contiguous; the lists of one call belong together, tensor by tensor. momenta are fp32; params, grads and
copies fp32, bf16 or fp16, one dtype to a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import multi_tensor
from fxzero.kernels.multi_tensor import Number, address_of, everywhere, place, scalar, unscaled

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] copies, *,"
    " float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov, bool first,"
    f" {multi_tensor.GRADIENT_SCHEMA}) -> ()"
)

Tensors = Sequence[torch.Tensor]


def sgd_reference(params: Tensors, grads: Tensors, momenta: Tensors, copies: Tensors, **arguments: Any) -> None:
    """The update by plain torch ops, in fp32; in fp64 where a parameter is. Arguments as those of the op."""
    if multi_tensor.skipped(arguments["overflow"]):
        return
    lr, momentum = multi_tensor.chosen(arguments, "lr"), arguments["momentum"]
    for i, param in enumerate(params):
        grad = multi_tensor.gradient_of(grads[i], param, arguments)
        wide = param.to(grad.dtype)
        if arguments["weight_decay"]:
            grad = grad + wide * arguments["weight_decay"]
        if momenta and arguments["first"]:
            momenta[i].copy_(grad)
        elif momenta:
            momenta[i].mul_(momentum).add_(grad, alpha=1 - arguments["dampening"])
        if momenta:
            grad = grad + momenta[i] * momentum if arguments["nesterov"] else momenta[i]
        new = wide - grad * lr
        param.copy_(new)
        if copies:
            copies[i].copy_(new)


def sgd_chunk(
    param_at, grad_at, momentum_at, copy_at, inside, rate, momentum, complement, weight_decay, inverse_scale, clip,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    COPY_ROW: tl.constexpr,
):  # fmt: skip
    """What is at these addresses, where `inside`, has been updated."""
    param = tl.load(param_at, mask=inside, other=0.0).to(tl.float32)
    grad = unscaled(tl.load(grad_at, mask=inside, other=0.0), inverse_scale, clip, MAXIMIZE)
    if DECAYS:
        grad += param * weight_decay
    if MOMENTUM:
        if FIRST:
            average = grad
        else:
            average = tl.load(momentum_at, mask=inside, other=0.0) * momentum + grad * complement
        tl.store(momentum_at, average, mask=inside)
        if NESTEROV:
            grad += average * momentum
        else:
            grad = average
    param -= grad * rate
    tl.store(param_at, param.to(param_at.dtype.element_ty), mask=inside)
    if COPY_ROW:
        tl.store(copy_at, param.to(copy_at.dtype.element_ty), mask=inside)


def sgd_kernel(
    places, chunks, param_type, grad_type, state_type, copy_type, overflow, count,
    lr, momentum, complement, weight_decay, inverse_scale, clip,
    LR_TENSOR: tl.constexpr, SCALE_TENSOR: tl.constexpr, CLIP_TENSOR: tl.constexpr, OVERFLOW: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    COPY_ROW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program has one chunk. `*_type` are tensors of the dtypes."""
    tensor, first, size = place(places, chunks, overflow, OVERFLOW, BLOCK)
    offset = first + tl.arange(0, BLOCK)
    param_at = address_of(places, tensor, count, param_type, 1, ALIGNED) + offset
    grad_at = address_of(places, tensor, count, grad_type, 2, ALIGNED) + offset
    momentum_at = address_of(places, tensor, count, state_type, 3 if MOMENTUM else 0, ALIGNED) + offset
    copy_at = address_of(places, tensor, count, copy_type, COPY_ROW, ALIGNED) + offset
    rate, weight_decay = scalar(lr, LR_TENSOR), scalar(weight_decay, False)
    momentum, complement = scalar(momentum, False), scalar(complement, False)
    inverse_scale, clip = scalar(inverse_scale, SCALE_TENSOR), scalar(clip, CLIP_TENSOR)
    if first + BLOCK <= size:  # [Note: whole chunks]
        sgd_chunk(
            param_at, grad_at, momentum_at, copy_at, everywhere(BLOCK), rate, momentum, complement, weight_decay,
            inverse_scale, clip, MAXIMIZE, DECAYS, MOMENTUM, FIRST, NESTEROV, COPY_ROW,
        )  # fmt: skip
    else:
        sgd_chunk(
            param_at, grad_at, momentum_at, copy_at, offset < size, rate, momentum, complement, weight_decay,
            inverse_scale, clip, MAXIMIZE, DECAYS, MOMENTUM, FIRST, NESTEROV, COPY_ROW,
        )  # fmt: skip


def sgd_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors = (),
    *,
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    copies: Tensors = (),
    inverse_scale: Number = 1.0,
    clip: Number = 1.0,
    overflow: torch.Tensor | None = None,
    maximize: bool = False,
) -> None:
    """Parameters and state are those after one step of SGD.

    Args:
        params: what is updated, fp32 or rounded to bf16 or fp16 from fp32.
        grads: one for each parameter, like all lists.
        momenta: m, fp32; empty: no momentum, and `momentum` and `nesterov` say nothing.
        lr: the learning rate; a number or a tensor of one element, as all that is a `Number`.
        momentum: how much of m is kept.
        dampening: how much of the gradient is left out of m, after the first step.
        weight_decay: added to the gradient, times the parameter.
        nesterov: the step goes along the gradient plus `momentum` times m.
        first: m holds nothing yet.
        copies: what gets the new parameters rounded to its dtype; empty: none.
        inverse_scale: 1 / the loss scale.
        clip: a factor of all gradients, after unscaling.
        overflow: a tensor of one element; where it is not 0, nothing is written.
        maximize: the sign of gradients is changed.

    Raises:
        ValueError: lists do not belong together; names a tensor and its shape.
    """
    if not params:
        return
    device = params[0].device
    options = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    options |= {"nesterov": nesterov, "first": first}
    gradient = multi_tensor.gradient_arguments(
        device, inverse_scale=inverse_scale, clip=clip, overflow=overflow, maximize=maximize
    )
    lists = [list(tensors) for tensors in (params, grads, momenta, copies)]
    sgd_op(*lists, **multi_tensor.split("lr", lr, device), **options, **gradient)


@torch.library.impl(_LIBRARY, "sgd_", "CompositeExplicitAutograd")
def _launch(params: Tensors, grads: Tensors, momenta: Tensors, copies: Tensors, **arguments: Any) -> None:
    lists = (params, grads, momenta, copies)
    _fake(*lists, **arguments)
    if multi_tensor.is_done(sgd_reference, lists, arguments):
        return
    lr = multi_tensor.chosen(arguments, "lr")
    figures = (lr, arguments["momentum"], 1 - arguments["dampening"], arguments["weight_decay"])
    multi_tensor.run(
        *(sgd_kernel, sgd_chunk, lists, figures, arguments),
        LR_TENSOR=isinstance(lr, torch.Tensor),
        DECAYS=arguments["weight_decay"] != 0,
        MOMENTUM=bool(momenta),
        FIRST=arguments["first"],
        NESTEROV=arguments["nesterov"],
        COPY_ROW=(3 + bool(momenta)) * bool(copies),
    )


@torch.library.register_fake("fxzero_kernels::sgd_", lib=_LIBRARY)
def _fake(params: Tensors, grads: Tensors, momenta: Tensors, copies: Tensors, **arguments: Any) -> None:
    optional = {name: x for name, x in (("momenta", momenta), ("copies", copies)) if x}
    multi_tensor.check_numbers("sgd_", params, arguments)
    multi_tensor.check("sgd_", params, fp32=("momenta",), grads=grads, **optional)


sgd_op = torch.ops.fxzero_kernels.sgd_.default
