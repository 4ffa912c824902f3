"""Classes of ops that go through memory, or through a matrix unit, at one rate.

pointwise        add, mul, casts: bound by memory
in_place         of these, what writes over its first input: takes no memory, and most of what updates run
transcendental   gelu, exp, sqrt: on a CPU bound by arithmetic
selection        where, comparisons, masks
random           dropout masks, random numbers
reduction        sums, means and norms over one pass
normalization    layer norm and kin, and their backwards: several passes
softmax          softmax, log_softmax and their backwards: several passes, with exponentials
index            embedding, gather, scatter, index_put
strided          copies that change the layout: transposes, concatenations
fill             outputs that read nothing
matmul, batched_matmul, convolution, attention, attention_backward      products, by torch's own flop formulas
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxzero import compat
from fxzero.graph.step_graph import num_bytes

aten = torch.ops.aten

MEMORY_CLASSES = (
    "pointwise",
    "in_place",
    "transcendental",
    "selection",
    "random",
    "reduction",
    "normalization",
    "softmax",
    "index",
    "strided",
    "fill",
)
MATRIX_CLASSES = ("matmul", "batched_matmul", "convolution", "attention", "attention_backward")

# ops that torch has no flop formula for -> the one whose formula is theirs, with the same leading arguments
SAME_FLOPS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_efficient_attention_backward,
}

# the first word in the name of an op that is here decides its class
_BY_WORD = {
    "transcendental": "gelu silu sigmoid tanh exp exp2 expm1 log log2 log1p sqrt rsqrt sin cos erf erfinv pow mish "
    "softplus elu celu selu logit atan2 sigmoid_backward hardswish log_sigmoid_forward log_sigmoid_backward "
    "gated_activation",
    "selection": "where masked_fill eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or tril "
    "triu threshold_backward masked_select nonzero",
    "random": "bernoulli rand randn rand_like randn_like native_dropout uniform normal normal_functional dropout",
    "reduction": "sum mean amax amin max min norm linalg_vector_norm any all prod var std var_mean argmax cumsum "
    "nonfinite logsumexp",
    "normalization": "native_layer_norm native_group_norm native_batch_norm batch_norm rms_norm "
    "_fused_rms_norm layer_norm",
    "softmax": "_softmax _log_softmax softmax log_softmax _softmax_backward_data _log_softmax_backward_data",
    "index": "embedding embedding_dense_backward index index_select index_put _index_put gather scatter scatter_add "
    "index_add nll_loss_forward nll_loss_backward slice_scatter select_scatter select_backward slice_backward "
    "_unsafe_index _unsafe_index_put upsample_nearest2d max_pool2d_with_indices constant_pad_nd local_shard",
    "strided": "cat stack contiguous roll flip repeat split_with_sizes_copy as_strided_copy permute_copy",
    "fill": "full full_like zeros zeros_like ones ones_like empty empty_like arange scalar_tensor new_zeros new_full "
    "new_ones new_empty eye on_device",
}
_CLASSES = {word: name for name, words in _BY_WORD.items() for word in words.split()}


def op_class(node: fx.Node) -> str:
    """The class of a call of an op, one of MEMORY_CLASSES or MATRIX_CLASSES."""
    target: Any = node.target
    if not compat.is_op(target):
        return "pointwise"
    packet = target.overloadpacket
    if SAME_FLOPS.get(packet, packet) in flop_registry:
        return _matrix_class(packet)
    if torch.Tag.pointwise in target.tags and _changes_layout(node):
        return "strided"
    word = word_of(target)
    for name in (word, word.removesuffix("_backward"), word.removesuffix("_for_cpu")):
        if name in _CLASSES:
            return _CLASSES[name]
    if word.endswith(("norm_backward", "loss_backward")):
        return "normalization"
    return "strided" if _changes_layout(node) else "pointwise"


def word_of(target: Any) -> str:
    """The name of an op without namespace and overload, of an in-place form without its underscore."""
    name = str(target.overloadpacket).rpartition(".")[2]
    return name.removesuffix("_") or name


def _matrix_class(packet: Any) -> str:
    name = str(packet)
    if "attention" in name:
        return "attention_backward" if "backward" in name else "attention"
    if "conv" in name:
        return "convolution"
    return "batched_matmul" if "bmm" in name else "matmul"


def _changes_layout(node: fx.Node) -> bool:
    """Whether the output lies in memory otherwise than a large input: not read in the order in which it is written."""
    out = node.meta.get("val")
    if not isinstance(out, torch.Tensor) or out.dim() < 2 or not num_bytes(out):
        return False
    for source in node.all_input_nodes:
        val = source.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.shape != out.shape or 2 * num_bytes(val) < num_bytes(out):
            continue
        if _innermost(val) != _innermost(out):
            return True
    return False


def _innermost(val: torch.Tensor) -> int | None:
    """The dim of more than one element whose neighbours lie next to each other; None where there is none."""
    return next((dim for dim in range(val.dim()) if val.shape[dim] != 1 and val.stride(dim) == 1), None)
