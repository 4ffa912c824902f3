"""AdamW on lists of shards, in place, in one launch and one pass over memory.

    adamw_(params, grads, exp_avgs, exp_avg_sqs, ...)
        g = grad inverse_scale clip (negated to maximize)
        p = p (1 - lr weight_decay)
        m = m + (1 - beta1) (g - m)
        v = beta2 v + (1 - beta2) g^2
        u = max(u, v) with amsgrad, else v
        p = p - lr / correction1 m / (sqrt(u) / sqrt(correction2) + eps)

with correction1 = 1 - beta1^step and correction2 = 1 - beta2^step, which the caller has, counting from step 1. The
arithmetic is that of torch.optim.AdamW with foreach=False, op by op in fp32, but for what has no memory between two
ops: a gradient or a parameter in bf16 or fp16 is not rounded on the way. Where `overflow` holds anything but 0,
nothing is written; the caller then counts no step. `copies` are written with the new parameters, rounded.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2; Reddi et al., "On the
Convergence of Adam and Beyond" (2018), for amsgrad. One launch for many tensors: apex's multi_tensor_apply.

Shapes: any, contiguous; the lists of one call belong together, tensor by tensor. exp_avgs, exp_avg_sqs and
max_exp_avg_sqs are fp32; params, grads and copies fp32, bf16 or fp16, one dtype to a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxzero.kernels import multi_tensor
from fxzero.kernels.multi_tensor import Number, address_of, everywhere, place, scalar, unscaled

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch]

_LIBRARY = torch.library.Library("fxzero_kernels", "FRAGMENT")
_LIBRARY.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] copies, *, float lr, Tensor? lr_tensor,"
    " float correction1, Tensor? correction1_tensor, float correction2, Tensor? correction2_tensor,"
    f" float beta1, float beta2, float eps, float weight_decay, {multi_tensor.GRADIENT_SCHEMA}) -> ()"
)

Tensors = Sequence[torch.Tensor]


def adamw_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    copies: Tensors,
    **arguments: Any,
) -> None:
    """The update by plain torch ops, in fp32; in fp64 where a parameter is. Arguments as those of the op."""
    if multi_tensor.skipped(arguments["overflow"]):
        return
    lr, correction1, correction2 = (multi_tensor.chosen(arguments, x) for x in ("lr", "correction1", "correction2"))
    beta1, beta2 = arguments["beta1"], arguments["beta2"]
    for i, param in enumerate(params):
        grad = multi_tensor.gradient_of(grads[i], param, arguments)
        exp_avgs[i].lerp_(grad, 1 - beta1)
        exp_avg_sqs[i].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        square = exp_avg_sqs[i]
        if max_exp_avg_sqs:
            square = torch.maximum(max_exp_avg_sqs[i], square, out=max_exp_avg_sqs[i])
        denominator = square.sqrt() / correction2**0.5 + arguments["eps"]
        new = param.to(grad.dtype) * (1 - lr * arguments["weight_decay"])
        new = new - exp_avgs[i] / denominator * (lr / correction1)
        param.copy_(new)
        if copies:
            copies[i].copy_(new)


def adamw_chunk(
    param_at, grad_at, average_at, square_at, greatest_at, copy_at, inside,
    decay, step_size, root, complement1, beta2, complement2, eps, inverse_scale, clip,
    MAXIMIZE: tl.constexpr, AMSGRAD: tl.constexpr, COPY_ROW: tl.constexpr,
):  # fmt: skip
    """What is at these addresses, where `inside`, has been updated."""
    grad = unscaled(tl.load(grad_at, mask=inside, other=0.0), inverse_scale, clip, MAXIMIZE)
    average = tl.load(average_at, mask=inside, other=0.0)
    difference = grad - average
    near = average + complement1 * difference
    average = tl.where(complement1 < 0.5, near, grad - difference * (1.0 - complement1))  # as torch's lerp
    square = tl.load(square_at, mask=inside, other=0.0) * beta2
    square += complement2 * grad * grad
    tl.store(average_at, average, mask=inside)
    tl.store(square_at, square, mask=inside)
    if AMSGRAD:
        square = tl.maximum(tl.load(greatest_at, mask=inside, other=0.0), square, propagate_nan=tl.PropagateNan.ALL)
        tl.store(greatest_at, square, mask=inside)
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.broadcast_to(root, square.shape)) + eps
    param = tl.load(param_at, mask=inside, other=0.0).to(tl.float32) * decay
    param -= step_size * tl.div_rn(average, denominator)
    tl.store(param_at, param.to(param_at.dtype.element_ty), mask=inside)
    if COPY_ROW:
        tl.store(copy_at, param.to(copy_at.dtype.element_ty), mask=inside)


def adamw_kernel(
    places, chunks, param_type, grad_type, state_type, copy_type, overflow, count,
    lr, correction1, correction2, decay, step_size, root, weight_decay,
    complement1, beta2, complement2, eps, inverse_scale, clip,
    LR_TENSOR: tl.constexpr, CORRECTION1_TENSOR: tl.constexpr, CORRECTION2_TENSOR: tl.constexpr,
    SCALE_TENSOR: tl.constexpr, CLIP_TENSOR: tl.constexpr, OVERFLOW: tl.constexpr, MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr, COPY_ROW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program has one chunk. `*_type` have the dtypes; decay, step_size and root count where lr is a number."""
    tensor, first, size = place(places, chunks, overflow, OVERFLOW, BLOCK)
    offset = first + tl.arange(0, BLOCK)
    param_at = address_of(places, tensor, count, param_type, 1, ALIGNED) + offset
    grad_at = address_of(places, tensor, count, grad_type, 2, ALIGNED) + offset
    average_at = address_of(places, tensor, count, state_type, 3, ALIGNED) + offset
    square_at = address_of(places, tensor, count, state_type, 4, ALIGNED) + offset
    greatest_at = address_of(places, tensor, count, state_type, 5 if AMSGRAD else 0, ALIGNED) + offset
    copy_at = address_of(places, tensor, count, copy_type, COPY_ROW, ALIGNED) + offset
    if LR_TENSOR or CORRECTION1_TENSOR or CORRECTION2_TENSOR:
        rate = scalar(lr, LR_TENSOR)
        decay = 1.0 - rate * scalar(weight_decay, False)
        step_size = tl.div_rn(rate, scalar(correction1, CORRECTION1_TENSOR))
        root = tl.sqrt_rn(scalar(correction2, CORRECTION2_TENSOR))
    else:
        decay, step_size, root = scalar(decay, False), scalar(step_size, False), scalar(root, False)
    complement1, eps = scalar(complement1, False), scalar(eps, False)
    beta2, complement2 = scalar(beta2, False), scalar(complement2, False)
    inverse_scale, clip = scalar(inverse_scale, SCALE_TENSOR), scalar(clip, CLIP_TENSOR)
    if first + BLOCK <= size:  # [Note: whole chunks]
        adamw_chunk(
            param_at, grad_at, average_at, square_at, greatest_at, copy_at, everywhere(BLOCK), decay, step_size, root,
            complement1, beta2, complement2, eps, inverse_scale, clip, MAXIMIZE, AMSGRAD, COPY_ROW,
        )  # fmt: skip
    else:
        adamw_chunk(
            param_at, grad_at, average_at, square_at, greatest_at, copy_at, offset < size, decay, step_size, root,
            complement1, beta2, complement2, eps, inverse_scale, clip, MAXIMIZE, AMSGRAD, COPY_ROW,
        )  # fmt: skip


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: Number,
    correction1: Number,
    correction2: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_exp_avg_sqs: Tensors = (),
    copies: Tensors = (),
    inverse_scale: Number = 1.0,
    clip: Number = 1.0,
    overflow: torch.Tensor | None = None,
    maximize: bool = False,
) -> None:
    """Parameters and state are those after one step of AdamW.

    Args:
        params: what is updated, fp32 or rounded to bf16 or fp16 from fp32.
        grads: one for each parameter, like all lists.
        exp_avgs: m, fp32.
        exp_avg_sqs: v, fp32.
        lr: the learning rate; a number or a tensor of one element, as all that is a `Number`.
        correction1: 1 - beta1^step.
        correction2: 1 - beta2^step.
        beta1: of m.
        beta2: of v.
        eps: added to the root of v.
        weight_decay: decoupled: a factor of lr.
        max_exp_avg_sqs: u, fp32: amsgrad; empty: none.
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
    numbers = multi_tensor.split("lr", lr, device)
    numbers |= multi_tensor.split("correction1", correction1, device)
    numbers |= multi_tensor.split("correction2", correction2, device)
    gradient = multi_tensor.gradient_arguments(
        device, inverse_scale=inverse_scale, clip=clip, overflow=overflow, maximize=maximize
    )
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies)]
    adamw_op(*lists, **numbers, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, **gradient)


@torch.library.impl(_LIBRARY, "adamw_", "CompositeExplicitAutograd")
def _launch(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    copies: Tensors,
    **arguments: Any,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies)
    _fake(*lists, **arguments)
    if multi_tensor.is_done(adamw_reference, lists, arguments):
        return
    lr, correction1, correction2 = (multi_tensor.chosen(arguments, x) for x in ("lr", "correction1", "correction2"))
    beta1, beta2, weight_decay = arguments["beta1"], arguments["beta2"], arguments["weight_decay"]
    on_host = not any(isinstance(x, torch.Tensor) for x in (lr, correction1, correction2))
    derived = (1 - lr * weight_decay, lr / correction1, math.sqrt(correction2)) if on_host else (0.0, 0.0, 0.0)
    figures: tuple[Any, ...] = (lr, correction1, correction2, *derived, weight_decay)
    figures += (1 - beta1, beta2, 1 - beta2, arguments["eps"])
    multi_tensor.run(
        *(adamw_kernel, adamw_chunk, lists, figures, arguments),
        LR_TENSOR=isinstance(lr, torch.Tensor),
        CORRECTION1_TENSOR=isinstance(correction1, torch.Tensor),
        CORRECTION2_TENSOR=isinstance(correction2, torch.Tensor),
        AMSGRAD=bool(max_exp_avg_sqs),
        COPY_ROW=(5 + bool(max_exp_avg_sqs)) * bool(copies),
    )


@torch.library.register_fake("fxzero_kernels::adamw_", lib=_LIBRARY)
def _fake(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    copies: Tensors,
    **arguments: Any,
) -> None:
    roles = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    optional = {"max_exp_avg_sqs": max_exp_avg_sqs, "copies": copies}
    roles |= {name: tensors for name, tensors in optional.items() if tensors}
    multi_tensor.check_numbers("adamw_", params, arguments)
    multi_tensor.check("adamw_", params, fp32=("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), **roles)


adamw_op = torch.ops.fxzero_kernels.adamw_.default
