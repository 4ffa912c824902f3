"""What calls have in common that take the same time: the key of recorded costs, and of estimates made once.

    aten.mm.default(f32[1024, 256], f32[256, 768]{1,256})
    aten.add_.Tensor(f32[256], f32[256])                    in place
    send_recv all_gather of 1048576 bytes over 2
    wait for send_recv reduce_scatter avg of 1048576 bytes over 2

Integers, flags and words count, since they may say what is computed; other numbers do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.cost.communication import message_bytes
from fxzero.graph import collectives as c10d
from fxzero.graph import swap_ops
from fxzero.graph.step_graph import first_argument, num_bytes
from fxzero.graph.type_text import contiguous_strides, dtype_names


def signature(node: fx.Node, mesh: Mapping[str, int], *, form: Any = None) -> str:
    """The signature of a call.

    Args:
        node: the call.
        mesh: of its graph.
        form: the op that runs in place of the node's own, if it does.
    """
    if c10d.is_wait(node) or swap_ops.is_wait(node):
        launch = c10d.launched_by(node) if c10d.is_wait(node) else first_argument(node)
        if c10d.is_ahead(launch):
            return f"wait for a gather of {num_bytes(launch.meta['val'])} bytes, launched before"
        return f"wait for {signature(launch, mesh)}"
    if c10d.is_collective(node):
        words = [carrier] if (carrier := c10d.carrier_of(node)) else []
        words.append(c10d.TABLE[node.target].name)
        words += [node.args[1]] if node.args[1] in ("sum", "avg", "max", "min", "product") else []  # type: ignore[list-item]
        return f"{' '.join(words)} of {message_bytes(node)} bytes over {mesh[c10d.axis_of(node)]}"
    if swap_ops.is_launch(node):
        out = node.target is swap_ops.swap_out
        tier = swap_ops.tier_of(node if out else node.args[0])  # type: ignore[arg-type]
        return f"swap_{'out to' if out else 'in from'} {tier} of {num_bytes(node.meta['val'])} bytes"
    target: Any = form or node.target
    name = str(target) if compat.is_op(target) else getattr(target, "__name__", "call")
    args = [_text(arg) for arg in node.args]
    args += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    where = " on the host" if swap_ops.is_off_device(node) else ""
    return f"{name}({', '.join(args)}){where}"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return _of_val(value.meta.get("val"))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, (bool, int, str)) or value is None:
        return repr(value)
    if isinstance(value, float):
        return "number"
    return str(value)


def _of_val(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        shape = tuple(val.shape)
        text = f"{dtype_names().get(val.dtype, str(val.dtype))}{list(shape)}"
        strides = tuple(val.stride())
        return text if strides == contiguous_strides(shape) else f"{text}{{{','.join(map(str, strides))}}}"
    if isinstance(val, (list, tuple)):
        return f"[{', '.join(map(_of_val, val))}]"
    return "number"


def launch_key(signature_text: str) -> str:
    """Under which the seconds are kept for which launching such a call holds the compute lane."""
    return f"launch {signature_text}"
