"""One small call of every launcher, in each of the variants for which Triton compiles a kernel of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from fxzero.graph import row_ops
from fxzero.kernels import (
    adamw,
    bucket_copy,
    gated_activation,
    layer_norm,
    lion,
    quantize_blocks,
    rms_norm,
    rotary,
    sgd,
)
from fxzero.lower.store import Store
from fxzero.lower.triton import compile_region
from tests.lower.row_regions import Handmade
from tests.lower.row_samples import add_sample, num_samples

Calls = Iterator[Callable[[], object]]


def rms_norm_calls(device: torch.device) -> Calls:
    """Forward and backward, with and without a weight, of several columns and of one."""
    for columns, dtype in ((96, torch.bfloat16), (1, torch.float32)):
        x = torch.ones(5, columns, device=device, dtype=dtype)
        rstd = torch.ones(5, device=device)
        for weight in (None, torch.ones(columns, device=device))[columns == 1 :]:
            yield partial(rms_norm.rms_norm, x, weight, 1e-5)
            yield partial(rms_norm.rms_norm_backward, x, x, weight, rstd)


def layer_norm_calls(device: torch.device) -> Calls:
    """Forward and backward, with and without weight and bias, of several columns and of one."""
    for columns, dtype in ((96, torch.bfloat16), (1, torch.float32)):
        x = torch.ones(5, columns, device=device, dtype=dtype)
        each = torch.ones(columns, device=device)
        row = torch.ones(5, device=device)
        for weight, bias in ((None, None), (each, None), (each, each))[2 * (columns == 1) :]:
            yield partial(layer_norm.layer_norm, x, weight, bias, 1e-5)
            yield partial(layer_norm.layer_norm_backward, x, x, weight, row, row, bias is not None)


def gated_activation_calls(device: torch.device) -> Calls:
    """Forward and backward of each form."""
    for form in gated_activation.FORMS:
        a, b = torch.ones(5, 2 * 48, device=device, dtype=torch.bfloat16).chunk(2, dim=-1)
        yield partial(gated_activation.gated_activation, a, b, form)
        yield partial(gated_activation.gated_activation_backward, a, a, b, form)


def rotary_calls(device: torch.device) -> Calls:
    """Forward and backward of both forms."""
    x = torch.ones(2, 5, 3, 64, device=device, dtype=torch.bfloat16).transpose(1, 2)
    cos = torch.ones(5, 64, device=device)
    for interleaved in (False, True):
        yield partial(rotary.rotary, x, cos, cos, interleaved)
        yield partial(rotary.rotary_backward, x, cos, cos, interleaved)


def shards(device: torch.device, roles: int, *, last: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Lists of shards, those of the last role in another dtype."""
    return [
        [torch.ones(n, device=device, dtype=last if role == roles - 1 else torch.float32) for n in (100, 3000)]
        for role in range(roles)
    ]


def adamw_calls(device: torch.device) -> Calls:
    """With numbers and nothing else, and with tensors and everything."""
    numbers = {"lr": 0.1, "correction1": 0.5, "correction2": 0.5}
    hyper = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    yield partial(adamw.adamw_, *shards(device, 4), **numbers, **hyper)
    tensors = {name: torch.tensor(x, device=device) for name, x in numbers.items()}
    tensors |= {name: torch.ones((), device=device) for name in ("inverse_scale", "clip", "overflow")}
    *lists, greatest, copies = shards(device, 6, last=torch.bfloat16)
    more = {"max_exp_avg_sqs": greatest, "copies": copies, "maximize": True}
    yield partial(adamw.adamw_, *lists, **tensors, **hyper, **more)


def lion_calls(device: torch.device) -> Calls:
    """With a number and nothing else, and with tensors and copies."""
    hyper = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    yield partial(lion.lion_, *shards(device, 3), lr=0.1, **hyper)
    *lists, copies = shards(device, 4, last=torch.bfloat16)
    one = torch.ones((), device=device)
    yield partial(lion.lion_, *lists, lr=one, copies=copies, overflow=one, clip=one, inverse_scale=one, **hyper)


def sgd_calls(device: torch.device) -> Calls:
    """Without momentum, the first step with it, and a later one with tensors and copies."""
    yield partial(sgd.sgd_, *shards(device, 2), lr=0.1)
    yield partial(sgd.sgd_, *shards(device, 3), lr=0.1, momentum=0.9, first=True)
    *lists, copies = shards(device, 4, last=torch.bfloat16)
    one = torch.ones((), device=device)
    yield partial(sgd.sgd_, *lists, lr=one, momentum=0.9, nesterov=True, weight_decay=0.1, copies=copies, overflow=one)


def quantize_blocks_calls(device: torch.device) -> Calls:
    """Packed, read, and summed, in both forms."""
    x = torch.ones(6, 100, device=device, dtype=torch.bfloat16)
    for form in quantize_blocks.FORMS:
        message = torch.zeros(2 * (300 + 4 * 5), dtype=torch.uint8, device=device)
        yield partial(quantize_blocks.quantize_blockwise, x, form, 64, 2)
        yield partial(quantize_blocks.dequantize_blockwise, message, [6, 100], form, 64, 2, x.dtype)
        yield partial(quantize_blocks.dequantize_reduce, message, [3, 100], form, 64, 2, "avg", torch.float32)


def bucket_copy_calls(device: torch.device) -> Calls:
    """Into a buffer in bf16 and out of it, and to a place that is not aligned."""
    tensors = [torch.ones(n, device=device) for n in (4096, 3000)]
    yield partial(bucket_copy.bucket_pack, tensors, torch.bfloat16)
    yield partial(bucket_copy.bucket_pack, [tensors[0][:5], tensors[1]], torch.bfloat16)
    yield partial(bucket_copy.bucket_unpack_, torch.ones(7096, device=device, dtype=torch.bfloat16), tensors)


_CALLS_EACH = 40  # of a kernel


def region_calls(device: torch.device) -> Calls:
    """Generated kernels: all ops in all their forms, numbers of the host, strides, state, rows within dimensions."""
    for dtype in (torch.float32, torch.bfloat16):
        pointwise = [(name, index) for name in sorted(row_ops.POINTWISE) for index in range(num_samples(name))]
        for first in range(0, len(pointwise), _CALLS_EACH):
            yield _region(_samples(pointwise[first : first + _CALLS_EACH], dtype), device)
        of_rows = [(name, index) for name in sorted(row_ops.ROW_OPS) for index in range(num_samples(name))]
        for one in of_rows[dtype == torch.bfloat16 :: 2]:
            yield _region(_samples([one], dtype), device)
    region, aten = Handmade(), torch.ops.aten
    state, grad, cos = (region.input(torch.ones(size)) for size in ((2, 3, 40, 24), (2, 40, 3, 24), (40, 24)))
    moved = region.call(aten.mul.Tensor, region.call(aten.transpose.int, grad, 1, 2), region.input(0.5))
    new = region.call(aten.lerp.Scalar, state, region.call(aten.mul.Tensor, moved, cos), region.input(0.1))
    yield _region(region, device, written={state: new})


def _samples(chosen: list[tuple[str, int]], dtype: torch.dtype) -> Handmade:
    region = Handmade()
    for name, index in chosen:
        add_sample(region, name, index, dtype)
    return region


def _region(region: Handmade, device: torch.device, **form: dict) -> Callable[[], object]:
    """The call of a region's kernel on ones."""
    text = region.text(**form)
    call, _ = Store(Path(tempfile.mkdtemp()), lowering="triton").get(text, lambda: compile_region(text))
    given = [value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in region.ordered()]
    return lambda: call([value.to(device) if value.dim() else value for value in given])


LAUNCHES: dict[str, Callable[[torch.device], Calls]] = {
    "rms_norm": rms_norm_calls,
    "layer_norm": layer_norm_calls,
    "gated_activation": gated_activation_calls,
    "rotary": rotary_calls,
    "adamw": adamw_calls,
    "lion": lion_calls,
    "sgd": sgd_calls,
    "quantize_blocks": quantize_blocks_calls,
    "bucket_copy": bucket_copy_calls,
    "region": region_calls,
}
