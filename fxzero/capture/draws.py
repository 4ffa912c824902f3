"""Random numbers while tracing: a recomputed draw is the earlier one, and what only looks random is refused.

[Note: replayed draws]
`checkpoint()` recomputes a forward in backward, from the state that the random generator had in forward: dropout then
draws the same mask. A trace draws nothing, and a second random node would be a second mask. So each draw of a trace
moves the real generator a little and is kept under the state that it started from; a draw that starts from a state
seen before is a replay, and yields what was kept. (The values stay alive for it: exact, if not the smallest.)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from fxzero import compat
from fxzero.errors import CaptureError

aten = torch.ops.aten


class RandomDraws:
    """While tracing, random ops draw in the order of eager mode, and draw again only what eager mode would.

    The order: `bernoulli_` (dropout) fills a tensor as it lies in memory. Its functional form, `bernoulli.p`, makes a
    row-major result and draws in that order: another mask. So the fill of a transposed tensor is traced on its
    row-major view.

    Args:
        call: (op, args, kwargs) -> what it yields, traced.
    """

    def __init__(self, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.call = call
        self.known: dict[bytes, tuple[Any, Any]] = {}  # generator state -> the op that drew from it, and what
        self.heads = {device.type: compat.random_state(device) for device in compat.random_devices()}

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace an op that draws from the default generator.

        Raises:
            CaptureError: where it draws from a state that was neither left by the draw before it nor drawn from.
        """
        if func is aten.bernoulli_.float and not args[0].is_contiguous():
            strides = args[0].stride()
            self._draw(func, (args[0].permute(sorted(range(len(strides)), key=lambda d: -strides[d])), *args[1:]), {})
            return args[0]
        return self._draw(func, args, kwargs)

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = _device(args, kwargs)
        state = compat.random_state(device)
        compat.move_random_state(device)
        if state in self.known:
            return self._replay(func, args, *self.known[state])
        if state != self.heads.get(device.type, state):
            _refuse(func, "a generator whose state was set in the step")
        self.heads[device.type] = compat.random_state(device)
        out = self.call(func, args, kwargs)
        self.known[state] = (func, tuple(map(torch.clone, out)) if isinstance(out, tuple) else out.clone())
        return out

    def _replay(self, func: Any, args: tuple[Any, ...], drawn_by: Any, kept: Any) -> Any:
        if func is not drawn_by:
            _refuse(func, f"a generator in the state from which {drawn_by} drew")
        return args[0].copy_(kept) if func._schema.is_mutable else kept


def host_random_state() -> tuple[Any, ...]:
    """Where the generators of Python and NumPy stand; a trace would freeze what is drawn from them."""
    _, keys, *rest = np.random.get_state()
    return (random.getstate(), np.asarray(keys).tobytes(), *rest)


def _refuse(func: Any, got: str) -> NoReturn:
    raise CaptureError.of(
        where=f"random op {func}",
        expected="draws one after the other, or replayed as by checkpoint()",
        got=got,
        fix="seed before the step, not in the model or the loss",
    )


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
    return tensor.device if tensor is not None else torch.device(kwargs.get("device") or torch.get_default_device())
