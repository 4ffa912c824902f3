"""In which dtypes a step computes: casts of parameters and inputs, or torch.autocast, put in while tracing.

The model must see the dtype that it will compute in: its own branches on dtypes, torch's type promotion and the
formulas of autograd depend on it. So the casts are part of the traced single-device step, which means the same as the
loop `for each parameter: compute with parameter.to(dtype)`; passes then move them before the gathers.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import annotate

from fxzero import compat
from fxzero.errors import CaptureError
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import yields_tensor

aten = torch.ops.aten

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The dtypes of forward and backward; parameters, their gradients' reduction and the update keep their own.

    Args:
        compute: parameters and the model's floating inputs are cast to it; None: they are not.
        autocast: dtype of `torch.autocast` around the forward and the loss; None: no autocast.
        keep: patterns (as for file names) of modules whose parameters are not cast.
    """

    compute: torch.dtype | None = None
    autocast: torch.dtype | None = None
    keep: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, keep: tuple[str, ...] = ()) -> Precision:
        """From a plan's words: "fp32", "bf16", "autocast:bf16"."""
        mode, _, name = text.rpartition(":")
        return cls(None if mode else _DTYPES.get(name), _DTYPES.get(name) if mode else None, keep)

    def cast(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters as the model is to see them; gradients flow through the casts."""
        return {name: self._cast_parameter(name, value) for name, value in parameters.items()}

    def _cast_parameter(self, name: str, value: torch.Tensor) -> torch.Tensor:
        module = name.rpartition(".")[0]
        kept = any(fnmatch.fnmatchcase(module, pattern) for pattern in self.keep)
        if self.compute is None or kept or not value.dtype.is_floating_point:
            return value
        with annotate({"module": module}):
            return value.to(self.compute)

    @contextlib.contextmanager
    def around(self, model: nn.Module, device_type: str) -> Iterator[None]:
        """The context of forward and loss: autocast, or a model whose floating inputs are cast."""
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device_type, dtype=self.autocast))
            if self.compute is not None:
                handle = model.register_forward_pre_hook(self._cast_inputs, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _cast_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def cast(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
            return value.to(self.compute) if floating else value

        return compat.tree_map(cast, (args, kwargs))


# ops whose kernels want one dtype for all of these arguments, which their fake kernels do not check
_ALIKE: dict[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (0, 1, 2),
    aten.baddbmm.default: (0, 1, 2),
    aten.convolution.default: (0, 1, 2),
    aten._native_batch_norm_legit_functional.default: (1, 2, 3, 4),
}
CAST_MORE = (
    "cast what the model makes or keeps itself, buffers for instance, with .to(x.dtype); "
    "or use precision='autocast:bf16', or keep_fp32 for that module"
)


def check_dtypes(step: StepGraph) -> None:
    """Raise CaptureError, naming module and op, where a kernel would refuse the dtypes that meet."""
    for node in step.phase("forward"):
        arguments = [node.args[i] for i in _ALIKE.get(node.target, ()) if i < len(node.args)]
        dtypes = [a.meta["val"].dtype for a in arguments if isinstance(a, fx.Node)]
        if len(set(dtypes)) > 1:
            raise CaptureError.of(
                where=f"module {node.meta['module']!r}, op {node.target}",
                expected="tensors of one dtype",
                got=", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
                fix=CAST_MORE,
            )


def place_casts(step: StepGraph) -> None:
    """Put each cast of a parameter right before its first reader, and that of its gradient right behind the gradient.

    The trace makes the former all at the start of forward; so autograd runs the latter all at the end of backward, when
    every gradient would be alive in low precision and none of them reduced.
    """
    position = step.positions()
    for node in step.phase("forward"):
        if node.target is aten._to_copy.default and yields_tensor(node):
            source = node.args[0]
            if source.op == "placeholder" and source.meta["entry"].kind == "parameter" and node.users:  # type: ignore[union-attr]
                min(node.users, key=position.__getitem__).prepend(node)
    for gradient in step.gradients().values():
        if gradient.target is aten._to_copy.default and gradient.args[0].op == "call_function":  # type: ignore[union-attr]
            gradient.args[0].append(gradient)  # type: ignore[union-attr]
