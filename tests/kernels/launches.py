"""One small call of every launcher, in each of the variants for which Triton compiles a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fxzero.kernels import gated_activation, layer_norm, rms_norm, rotary

Calls = Iterator[Callable[[], object]]


def rms_norm_calls(device: torch.device) -> Calls:
    """Forward and backward, with and without a weight, of several columns and of one."""
    for columns, dtype in ((96, torch.bfloat16), (1, torch.float32)):
        x = torch.ones(5, columns, device=device, dtype=dtype)
        rstd = torch.ones(5, device=device)
        for weight in (None, torch.ones(columns, device=device)):
            yield partial(rms_norm.rms_norm, x, weight, 1e-5)
            yield partial(rms_norm.rms_norm_backward, x, x, weight, rstd)


def layer_norm_calls(device: torch.device) -> Calls:
    """Forward and backward, with and without weight and bias, of several columns and of one."""
    for columns, dtype in ((96, torch.bfloat16), (1, torch.float32)):
        x = torch.ones(5, columns, device=device, dtype=dtype)
        each = torch.ones(columns, device=device)
        row = torch.ones(5, device=device)
        for weight, bias in ((None, None), (each, None), (each, each)):
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


LAUNCHES: dict[str, Callable[[torch.device], Calls]] = {
    "rms_norm": rms_norm_calls,
    "layer_norm": layer_norm_calls,
    "gated_activation": gated_activation_calls,
    "rotary": rotary_calls,
}
