"""Functions in Triton's language that generated kernels call: what takes more than one line, or whole rows.

[Note: whole rows]
A row is a tile [rows, columns] whose width is a power of two; `present` [1, columns] says which columns there are. What
is behind them is anything, a NaN too, so each function that goes over a row selects before it sums or compares.
Statistics come back as [rows, 1].

All arithmetic is fp32. As torch does, a greatest or least element is NaN where there is one among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton.language as tl  # [Note: Triton at the first launch] in launch.py


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


def tanh(x):
    """The hyperbolic tangent: its series near 0, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    size = tl.abs(x)
    square = x * x
    near = square * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488)))
    far = 1.0 - tl.div_rn(2.0, tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.25, x + x * near, tl.where(x < 0.0, -far, far))


def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


def silu_backward(dy, x):
    """dy times the derivative of silu."""
    share = sigmoid(x)
    return dy * (share * (1.0 + x * (1.0 - share)))


def gelu(x):
    """x times the normal distribution at x."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


def gelu_backward(dy, x):
    """dy times the derivative of gelu."""
    share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return dy * (share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))


def gelu_tanh(x):
    """gelu by the hyperbolic tangent, which is a sigmoid of twice the argument."""
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def gelu_tanh_backward(dy, x):
    """dy times the derivative of gelu_tanh."""
    share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return dy * (share + x * slope)


def maximum(a, b):
    """The greater one; NaN where one is."""
    return tl.where((a > b) | (a != a), a, b)


def minimum(a, b):
    """The lesser one; NaN where one is."""
    return tl.where((a < b) | (a != a), a, b)


def lerp(start, end, weight):
    """start + weight (end - start), from the nearer end, as torch does."""
    difference = end - start
    return tl.where(tl.abs(weight) < 0.5, start + weight * difference, end - difference * (1.0 - weight))


def row_sum(x, present):
    """The sum of each row."""
    return tl.sum(tl.where(present, x, 0.0), axis=1, keep_dims=True)


def row_max(x, present):
    """The greatest of each row."""
    greatest = tl.max(tl.where(present, x, float("-inf")), axis=1, keep_dims=True)
    wrong = tl.max((present & (x != x)).to(tl.int32), axis=1, keep_dims=True)
    return tl.where(wrong > 0, float("nan"), greatest)


def row_min(x, present):
    """The least of each row."""
    return -row_max(-x, present)


def row_var(x, present, mean, count):
    """The sum of squares about the mean of each row, divided by `count`."""
    return row_sum((x - mean) * (x - mean), present) / count


def softmax(x, present):
    """exp(x) over its sum in each row."""
    power = tl.exp(x - row_max(x, present))
    return tl.div_rn(power, tl.broadcast_to(row_sum(power, present), power.shape))


def softmax_backward(dy, y, present):
    """The gradient of what softmax made y of."""
    return y * (dy - row_sum(dy * y, present))


def log_softmax(x, present):
    """The logarithm of softmax."""
    shifted = x - row_max(x, present)
    return shifted - tl.log(row_sum(tl.exp(shifted), present))


def log_softmax_backward(dy, y, present):
    """The gradient of what log_softmax made y of."""
    return dy - tl.exp(y) * row_sum(dy, present)


def norm_backward(g, normal, rstd, present, columns):
    """rstd (g - mean(g) - normal mean(g normal)): the gradient of what layer_norm made `normal` of."""
    return rstd * (g - row_sum(g, present) / columns - normal * (row_sum(g * normal, present) / columns))


def rms_norm_backward(g, normal, rstd, present, columns):
    """rstd (g - normal mean(g normal)): the gradient of what rms_norm made `normal` of."""
    return rstd * (g - normal * (row_sum(g * normal, present) / columns))


# each behind those that it calls
FUNCTIONS = (
    *(sigmoid, tanh, silu, silu_backward, gelu, gelu_backward, gelu_tanh, gelu_tanh_backward),
    *(maximum, minimum, lerp, row_sum, row_max, row_min, row_var),
    *(softmax, softmax_backward, log_softmax, log_softmax_backward, norm_backward, rms_norm_backward),
)
