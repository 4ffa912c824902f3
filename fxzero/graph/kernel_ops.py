"""The ops of hand-written kernels that a graph may hold (docs/kernels.md), by the names that a plan has for them.

They are defined in `fxzero.kernels`, which knows nothing of graphs; importing this registers them, without Triton. Each
runs by its kernel on a GPU, on the CPU by its reference in plain torch ops, or under Triton's interpreter.
"""

from __future__ import annotations

from fxzero.kernels.gated_activation import gated_activation, gated_activation_backward
from fxzero.kernels.layer_norm import layer_norm, layer_norm_backward
from fxzero.kernels.rms_norm import rms_norm, rms_norm_backward
from fxzero.kernels.rotary import rotary, rotary_backward

# name in a plan -> its op in forward, and the one in backward
OPS = {
    "rms_norm": (rms_norm, rms_norm_backward),
    "layer_norm": (layer_norm, layer_norm_backward),
    "gated_activation": (gated_activation, gated_activation_backward),
    "rotary": (rotary, rotary_backward),
}
# the names of these in the text of a graph
NAMES = tuple(op.name() for pair in OPS.values() for op in pair)
