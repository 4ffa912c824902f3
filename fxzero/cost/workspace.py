"""Memory that ops take beyond their outputs while they run: what is known of it and large.

Only for the CPU, where the allocator was watched op by op (torch 2.13, one thread). Convolutions by oneDNN work on
blocked copies of what they read and write; others unfold their input. Attention has a block of scores, two in backward.
Matrix products, softmax, layer norm and cross entropy take next to none on contiguous inputs; a gradient with other
strides is copied first by some.
Not modelled: cuBLAS and cuDNN workspace, memory that oneDNN and gloo's transport get elsewhere.

Shapes: N images, C channels, G groups; K elements of a kernel over space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import compression_ops, error_feedback_ops, kernel_ops
from fxzero.graph.step_graph import num_bytes

aten = torch.ops.aten

# of a kernel's op, with all that it may be given: bytes an element of its first argument, in fp32 and in 16 bits
_WATCHED = {
    op: watched
    for name, both in {
        "rms_norm": ((4, 10), (12, 20)),
        "layer_norm": ((8, 14), (16, 22)),
        "gated_activation": ((20, 26), (16, 26)),  # of the tanh form; the others take less
        "rotary": ((8, 15), (10, 16)),
    }.items()
    for op, watched in zip(kernel_ops.OPS[name], both, strict=True)
}
_TILE = 2**20  # elements that an op for messages works on at a time


def workspace_bytes(node: fx.Node, *, device: str) -> int:
    """The most bytes beyond its outputs that a call holds at once, until it returns.

    Args:
        node: a call.
        device: type of the device that it runs on.
    """
    rule = _RULES.get(node.target)
    return rule(*fx.map_arg(node.args, lambda n: n.meta.get("val"))) if rule is not None and device == "cpu" else 0


def transport_bytes(node: fx.Node, *, device: str, by_messages: bool) -> int:
    """What a collective holds beside its input and output from its launch to its wait, by gloo's own algorithms.

    gloo gathers into a flat buffer as large as the output, and scatters sums from copies of what it is given (seen with
    the allocator of tests/benchmarks, torch 2.13); sums and exchanges are straight from and to the tensors.

    Args:
        node: the launch.
        device: type of the device that it runs on; gloo carries collectives of CPU tensors.
        by_messages: point-to-point messages, or shared memory, carry it instead.
    """
    straight = (c10d.all_reduce, c10d.all_to_all, c10d.shift)
    if device != "cpu" or by_messages or node.target in straight:
        return 0
    if node.target in (c10d.all_gather, c10d.all_gather_coalesced):
        return num_bytes(node.meta["val"])
    return num_bytes([source.meta["val"] for source in c10d.sent(node)])


def _convolution(
    x: Any, weight: Any, _bias: Any, stride: Any, _pad: Any, _dilation: Any, transposed: Any, _out: Any, groups: Any
) -> int:
    if transposed:
        return 2 * math.prod(stride) * num_bytes(x) * weight.shape[1] * groups // x.shape[1]
    y_bytes = _output_bytes(x, weight, stride)
    if x.dtype is not torch.float32:
        return _unfolded_bytes(x, weight, stride, groups)
    if _is_plain_product(weight, stride):
        return 0
    if not x.is_contiguous():  # channels are innermost already: only the weight is copied
        return 2 * num_bytes(weight)
    return max(_blocked_bytes(x) + num_bytes(weight), y_bytes)


def _convolution_backward(gradient: Any, x: Any, weight: Any, _bias: Any, stride: Any, *rest: Any) -> int:
    _pad, _dilation, transposed, _out, groups, (needs_x, needs_weight, _) = rest
    if transposed:
        return num_bytes(gradient) + num_bytes(x)
    if x.dtype is not torch.float32:
        return _unfolded_bytes(x, weight, stride, groups) * needs_weight
    if _is_plain_product(weight, stride):
        return 0
    strided = math.prod(stride) > 1
    of_x = (2 * num_bytes(x) if strided else num_bytes(x) + num_bytes(weight)) - num_bytes(weight) * needs_weight
    return max(of_x * needs_x, (_blocked_bytes(x) + num_bytes(gradient)) * needs_weight)


def _is_plain_product(weight: Any, stride: Any) -> bool:
    return math.prod(weight.shape[2:]) == 1 and math.prod(stride) == 1


def _blocked_bytes(x: Any) -> int:
    """Bytes of x[N, C, ...] with its channels in blocks of 8; the few channels of images stay as they are."""
    channels = x.shape[1]
    return 0 if channels <= 4 else num_bytes(x) // channels * (-(-channels // 8) * 8)


def _output_bytes(x: Any, weight: Any, stride: Any) -> int:
    """Of a convolution that is padded to keep its extent, up to its stride."""
    return num_bytes(x) // x.shape[1] * weight.shape[0] // math.prod(stride)


def _unfolded_bytes(x: Any, weight: Any, stride: Any, groups: Any) -> int:
    """Each output position's K inputs, in a row."""
    return num_bytes(x) // groups * math.prod(weight.shape[2:]) // math.prod(stride)


def _attention(query: Any, key: Any, _value: Any, *_: Any) -> int:
    """Scores of a block of queries and keys in float32, what these yield, and each query's greatest score and sum."""
    queries, keys = _attention_block(query, key)
    return 4 * queries * (keys + query.shape[-1] + 2)


def _attention_backward(_gradient: Any, query: Any, key: Any, *_: Any) -> int:
    """Scores of a block, and their gradient."""
    queries, keys = _attention_block(query, key)
    return 2 * 4 * queries * keys


def _attention_block(query: Any, key: Any) -> tuple[int, int]:
    """Queries and keys whose scores are there at a time."""
    tokens, others = query.shape[-2], key.shape[-2]
    block = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return min(block, tokens), min(512, others)


def _batch_norm_backward(gradient: Any, x: Any, *_: Any) -> int:
    """One more tensor like its input, where the gradient has its strides."""
    return num_bytes(x) if gradient.stride() == x.stride() else 0


def _copies_of(*positions: int) -> Callable[..., int]:
    """The op makes these inputs contiguous before it works."""

    def rule(*args: Any) -> int:
        return sum(num_bytes(args[i]) for i in positions if not args[i].is_contiguous())

    return rule


def _copies_of_factors(*factors: Any) -> int:
    """A matrix product copies a factor of which neither rows nor columns lie together."""
    matrices = [x for x in factors if isinstance(x, torch.Tensor) and x.dim() >= 2]
    return sum(num_bytes(x) for x in matrices if 1 not in x.stride()[-2:])


def _quantize(x: Any, *_: Any) -> int:
    """A tile's blocks, their scaled values, and where those are finite; of the tile before, too."""
    return _tiled_bytes(x.numel(), first=9, further=4)


def _dequantize(packed: Any, _shape: Any, form: str, *_: Any) -> int:
    return _tiled_bytes(packed.numel(), first=5 if form == "int8" else 4, further=4)


def _tiled_bytes(elements: int, *, first: int, further: int) -> int:
    return min(elements, _TILE) * (first + further * (elements > _TILE))


def _by_reference(of_fp32: int, of_others: int) -> Callable[..., int]:
    """A kernel's op runs by its reference, in fp32 values: bytes an element of its first argument."""

    def rule(x: Any, *_: Any) -> int:
        return int(x.numel()) * (of_fp32 if x.dtype is torch.float32 else of_others)

    return rule


_RULES: dict[Any, Callable[..., int]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten._safe_softmax.default: lambda x, *_: int(x.numel()),  # which rows are masked whole, as booleans
    aten._softmax.default: _copies_of(0),
    aten._log_softmax.default: _copies_of(0),
    aten._softmax_backward_data.default: _copies_of(0, 1),
    aten._log_softmax_backward_data.default: _copies_of(0, 1),
    aten.native_layer_norm.default: _copies_of(0),
    aten.native_layer_norm_backward.default: _copies_of(0, 1),
    aten.embedding_dense_backward.default: _copies_of(0),
    aten.mm.default: _copies_of_factors,
    aten.bmm.default: _copies_of_factors,
    aten.addmm.default: lambda _, *factors: _copies_of_factors(*factors),
    aten.baddbmm.default: lambda _, *factors: _copies_of_factors(*factors),
    **{op: _by_reference(*watched) for op, watched in _WATCHED.items()},
    compression_ops.quantize_blockwise: _quantize,
    compression_ops.dequantize_blockwise: _dequantize,
    compression_ops.dequantize_reduce: _dequantize,
    error_feedback_ops.pack_top_k: lambda x, *_: num_bytes(x),
    error_feedback_ops.sum_top_k: lambda _, shape, parts, op, shards, *__: 4 * math.prod(shape) // shards,
    error_feedback_ops.power_basis: lambda x: 28 * int(x.numel()),
}
