"""Lion on lists of shards, in place, in one launch and one pass over memory.

    lion_(params, grads, exp_avgs, ...)
        g = grad inverse_scale clip (negated to maximize)
        p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

in fp32, with no rounding of gradients or parameters in bf16 or fp16 on the way. sign(0) is 0, and sign(NaN) too, as
torch.sign has it. Where `overflow` holds anything but 0, nothing is written. `copies` are written with the new
parameters, rounded.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), program 1.

Shapes: any, contiguous; the lists of one call belong together, tensor by tensor. exp_avgs are fp32; params, grads and
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
    "lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] copies, *,"
    f" float lr, Tensor? lr_tensor, float beta1, float beta2, float weight_decay, {multi_tensor.GRADIENT_SCHEMA}) -> ()"
)

Tensors = Sequence[torch.Tensor]


def lion_reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, copies: Tensors, **arguments: Any) -> None:
    """The update by plain torch ops, in fp32; in fp64 where a parameter is. Arguments as those of the op."""
    if multi_tensor.skipped(arguments["overflow"]):
        return
    lr, beta1, beta2 = multi_tensor.chosen(arguments, "lr"), arguments["beta1"], arguments["beta2"]
    for i, param in enumerate(params):
        grad = multi_tensor.gradient_of(grads[i], param, arguments)
        direction = torch.sign(exp_avgs[i] * beta1 + grad * (1 - beta1))
        new = param.to(grad.dtype) * (1 - lr * arguments["weight_decay"]) - direction * lr
        exp_avgs[i].mul_(beta2).add_(grad, alpha=1 - beta2)
        param.copy_(new)
        if copies:
            copies[i].copy_(new)


def lion_chunk(
    param_at, grad_at, average_at, copy_at, inside,
    rate, decay, beta1, complement1, beta2, complement2, inverse_scale, clip,
    MAXIMIZE: tl.constexpr, COPY_ROW: tl.constexpr,
):  # fmt: skip
    """What is at these addresses, where `inside`, has been updated."""
    grad = unscaled(tl.load(grad_at, mask=inside, other=0.0), inverse_scale, clip, MAXIMIZE)
    average = tl.load(average_at, mask=inside, other=0.0)
    mixed = average * beta1 + grad * complement1
    direction = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, 0.0))
    param = tl.load(param_at, mask=inside, other=0.0).to(tl.float32) * decay - rate * direction
    tl.store(average_at, average * beta2 + grad * complement2, mask=inside)
    tl.store(param_at, param.to(param_at.dtype.element_ty), mask=inside)
    if COPY_ROW:
        tl.store(copy_at, param.to(copy_at.dtype.element_ty), mask=inside)


def lion_kernel(
    places, chunks, param_type, grad_type, state_type, copy_type, overflow, count,
    lr, decay, weight_decay, beta1, complement1, beta2, complement2, inverse_scale, clip,
    LR_TENSOR: tl.constexpr, SCALE_TENSOR: tl.constexpr, CLIP_TENSOR: tl.constexpr, OVERFLOW: tl.constexpr,
    MAXIMIZE: tl.constexpr, COPY_ROW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program has one chunk. `*_type` are tensors of the dtypes; decay counts where lr is a number."""
    tensor, first, size = place(places, chunks, overflow, OVERFLOW, BLOCK)
    offset = first + tl.arange(0, BLOCK)
    param_at = address_of(places, tensor, count, param_type, 1, ALIGNED) + offset
    grad_at = address_of(places, tensor, count, grad_type, 2, ALIGNED) + offset
    average_at = address_of(places, tensor, count, state_type, 3, ALIGNED) + offset
    copy_at = address_of(places, tensor, count, copy_type, COPY_ROW, ALIGNED) + offset
    rate = scalar(lr, LR_TENSOR)
    if LR_TENSOR:
        decay = 1.0 - rate * scalar(weight_decay, False)
    else:
        decay = scalar(decay, False)
    beta1, complement1 = scalar(beta1, False), scalar(complement1, False)
    beta2, complement2 = scalar(beta2, False), scalar(complement2, False)
    inverse_scale, clip = scalar(inverse_scale, SCALE_TENSOR), scalar(clip, CLIP_TENSOR)
    if first + BLOCK <= size:  # [Note: whole chunks]
        lion_chunk(
            param_at, grad_at, average_at, copy_at, everywhere(BLOCK),
            rate, decay, beta1, complement1, beta2, complement2, inverse_scale, clip, MAXIMIZE, COPY_ROW,
        )  # fmt: skip
    else:
        lion_chunk(
            param_at, grad_at, average_at, copy_at, offset < size,
            rate, decay, beta1, complement1, beta2, complement2, inverse_scale, clip, MAXIMIZE, COPY_ROW,
        )  # fmt: skip


def lion_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    *,
    lr: Number,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copies: Tensors = (),
    inverse_scale: Number = 1.0,
    clip: Number = 1.0,
    overflow: torch.Tensor | None = None,
    maximize: bool = False,
) -> None:
    """Parameters and state are those after one step of Lion.

    Args:
        params: what is updated, fp32 or rounded to bf16 or fp16 from fp32.
        grads: one for each parameter, like all lists.
        exp_avgs: m, fp32.
        lr: the learning rate; a number or a tensor of one element, as all that is a `Number`.
        beta1: of the average whose sign is taken.
        beta2: of m.
        weight_decay: decoupled: a factor of lr.
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
    gradient = multi_tensor.gradient_arguments(
        device, inverse_scale=inverse_scale, clip=clip, overflow=overflow, maximize=maximize
    )
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, copies)]
    rate = multi_tensor.split("lr", lr, device)
    lion_op(*lists, **rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, **gradient)


@torch.library.impl(_LIBRARY, "lion_", "CompositeExplicitAutograd")
def _launch(params: Tensors, grads: Tensors, exp_avgs: Tensors, copies: Tensors, **arguments: Any) -> None:
    lists = (params, grads, exp_avgs, copies)
    _fake(*lists, **arguments)
    if multi_tensor.is_done(lion_reference, lists, arguments):
        return
    lr, weight_decay = multi_tensor.chosen(arguments, "lr"), arguments["weight_decay"]
    beta1, beta2 = arguments["beta1"], arguments["beta2"]
    decay = 0.0 if isinstance(lr, torch.Tensor) else 1 - lr * weight_decay
    figures = (lr, decay, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2)
    flags = {"LR_TENSOR": isinstance(lr, torch.Tensor), "COPY_ROW": 4 * bool(copies)}
    multi_tensor.run(lion_kernel, lion_chunk, lists, figures, arguments, **flags)


@torch.library.register_fake("fxzero_kernels::lion_", lib=_LIBRARY)
def _fake(params: Tensors, grads: Tensors, exp_avgs: Tensors, copies: Tensors, **arguments: Any) -> None:
    optional = {"copies": copies} if copies else {}
    multi_tensor.check_numbers("lion_", params, arguments)
    multi_tensor.check("lion_", params, fp32=("exp_avgs",), grads=grads, exp_avgs=exp_avgs, **optional)


lion_op = torch.ops.fxzero_kernels.lion_.default
