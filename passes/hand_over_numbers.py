"""Numbers of the host that change from step to step come to the device as 0-dim tensors, at the begin of the step.

What a CUDA graph launches takes the same Python numbers at each replay ([Note: numbers by address] in
`graph/host_side.py`). So each number that a call on the device takes is handed over once, by `on_device`, and the call
becomes one that takes tensors. All that the host computes stands first.

[Note: forms that round alike]
`x + v * y` is one call with a number v, and rounds once on the CPU: `addcmul(x, y, v)` does too. `x + v * a * b` and
`x + v * a / b` round v * a first there, as `addcmul(x, a * v, b)` does. In 16 bits torch computes a call in fp32 and
rounds its result; with tensors it would round v as well, so the call is made in fp32 and cast back. So the CPU rounds
alike in fp32 and fp64. A GPU's kernels multiply by v after a * b and fuse that with the sum: there, products with v
have one rounding more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.errors import PlanError
from fxzero.graph import StepGraph, ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, erase_dead, reorder
from fxzero.graph.host_side import numbers_that_change
from fxzero.graph.step_graph import device_of, yields_scalar, yields_tensor
from fxzero.graph.synchronisation import synchronisations

aten = torch.ops.aten

_FIX = "set cuda_graph=False"


@graph_pass(
    requires=("captured",),
    provides=("numbers-handed-over",),
    numerics="bitwise on the CPU in fp32; on a GPU within 1e-6 relative a step, by a rounding of each product with one",
)
def hand_over_numbers(step: StepGraph) -> int:
    """Let the device read every number that changes from step to step at an address.

    Args:
        step: the graph, in its final order.

    Returns:
        How many numbers are handed over.

    Raises:
        PlanError: naming a call that reads a value on the host, reads a tensor of the host, or takes a number that it
            cannot take as a tensor.
    """
    _check_host_reads_nothing(step)
    numbers = numbers_that_change(step)
    _check_tensors_are_on_device(step, numbers)
    calls = step.calls()
    giver = _Giver(step, numbers)
    for node in calls:
        if node not in numbers and any(source in numbers for source in node.all_input_nodes):
            _take_tensors(node, giver)
    _store_on_device(step, giver)
    erase_dead(step)
    first = numbers_that_change(step) | {*giver.made}
    now = step.calls()
    reorder(step, [*(node for node in now if node in first), *(node for node in now if node not in first)])
    return len(step.calls(ops.on_device))


class _Giver:
    """Hands numbers over, each once.

    Attributes:
        made: the calls that do so.
    """

    def __init__(self, step: StepGraph, numbers: set[fx.Node]) -> None:
        self.step, self.numbers = step, numbers
        self.made: list[fx.Node] = []
        self._device = torch.device(device_of(step))
        self._behind = next((node for node in reversed(step.graph.nodes) if node in numbers), step.output)
        self._given: dict[tuple[fx.Node, torch.dtype | None], fx.Node] = {}

    def tensor(self, number: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        """A number, or a 0-dim tensor of the host, on the device.

        Args:
            number: one of `numbers`.
            dtype: wanted; None: float64 or int64 of a number, its own of a tensor.
        """
        if (number, dtype) not in self._given:
            self._given[(number, dtype)] = self._made(number, dtype)
        return self._given[(number, dtype)]

    def _made(self, number: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        if yields_tensor(number):
            dtype = dtype or number.meta["val"].dtype
        if dtype is not None:
            given = self.tensor(self._read(number))
            return given if given.meta["val"].dtype == dtype else self._call(aten._to_copy.default, given, dtype=dtype)
        return self._call(ops.on_device, number, name=f"{number.name}_on_device", device=self._device)

    def _read(self, number: fx.Node) -> fx.Node:
        """The number that a 0-dim tensor of the host holds."""
        if yields_scalar(number):
            return number
        known = (user for user in number.users if user.target is aten._local_scalar_dense.default)
        read = next(known, None)
        if read is None:
            read = self._call(aten._local_scalar_dense.default, number, name=f"{number.name}_read")
            read.meta["val"] = 0.5 if number.meta["val"].dtype.is_floating_point else 1  # stands for any
        return read

    def _call(self, target: Any, source: fx.Node, *, name: str | None = None, **kwargs: Any) -> fx.Node:
        editor = Editor(self.step, phase=source.meta["phase"])
        editor.meta |= {key: source.meta[key] for key in ("param",) if key in source.meta}
        with editor.after(self._behind):
            node = editor.call(target, source, name=name, **kwargs)
        self._behind = node
        self.made.append(node)
        return node


def _take_tensors(node: fx.Node, giver: _Giver) -> None:
    """Put in the place of a call one that takes tensors where it takes numbers that change."""
    for source in [n for n in node.all_input_nodes if n in giver.numbers and yields_tensor(n)]:
        node.replace_input_with(source, giver.tensor(source))
    taken = [n for n in node.all_input_nodes if n in giver.numbers]
    if not taken or node.target is ops.on_device:
        return
    form = _form_of(node, taken)
    if form is None:
        raise _refused(
            node,
            expected="an op that takes numbers which change from step to step as tensors",
            got=f"{node.target} of %{', %'.join(n.name for n in taken)}",
            fix=f"{_FIX}, or use an optimizer that keeps them in tensors (capturable=True)",
        )
    editor = Editor(giver.step, phase=node.meta["phase"], module=node.meta["module"])
    editor.meta = {key: value for key, value in node.meta.items() if key not in ("val", "grad_of")}
    with editor.before(node):
        new = form(editor, node, giver)
        if new.meta["val"].dtype != node.meta["val"].dtype:
            new = editor.call(aten._to_copy.default, new, dtype=node.meta["val"].dtype)
    if "grad_of" in node.meta:
        new.meta["grad_of"] = node.meta["grad_of"]
    node.replace_all_uses_with(new)
    giver.step.graph.erase_node(node)


def _store_on_device(step: StepGraph, giver: _Giver) -> None:
    """State that rests on the device gets its next value there, though the host may compute it."""
    entries = {node.meta["entry"].key: node for node in step.placeholders}
    results = step.results
    for key, node in results.items():
        if yields_tensor(node) and node in giver.numbers and entries.get(key, node) not in giver.numbers:
            results[key] = giver.tensor(node)
    step.set_results(results)


# ---- forms of calls that take tensors

Form = Callable[[Editor, fx.Node, _Giver], fx.Node]


def _wide(editor: Editor, value: Any) -> Any:
    """A tensor as it is computed with: what has 16 bits in fp32."""
    if isinstance(value, fx.Node) and value.meta["val"].dtype in (torch.bfloat16, torch.float16):
        return editor.call(aten._to_copy.default, value, dtype=torch.float32)
    return value


def _beside(x: Any, giver: _Giver, number: Any) -> fx.Node:
    """A number for a call on a tensor, whose dtype counts: among tensors of no dims the widest would."""
    val = x.meta["val"]
    alike = not val.dim() and val.is_floating_point()
    return giver.tensor(number, val.dtype if alike else None)


def _product(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    """addcmul and addcdiv: x + value * a * b."""
    x, a, b = (_wide(editor, value) for value in node.args)
    scaled = editor.call(aten.mul.Tensor, a, _beside(a, giver, node.kwargs["value"]))
    return editor.call(node.target, x, scaled, b)  # type: ignore[arg-type]


def _add_scaled(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    """x + alpha * y and x - alpha * y, in one rounding."""
    x, y = (_wide(editor, value) for value in node.args)
    sign = -1 if node.target is aten.sub.Tensor else 1
    return editor.call(aten.addcmul.default, x, y, _beside(y, giver, node.kwargs["alpha"]), value=sign)


def _lerp(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    start, end = (_wide(editor, value) for value in node.args[:2])
    weight = giver.tensor(node.args[2], start.meta["val"].dtype)  # type: ignore[arg-type]
    return editor.call(aten.lerp.Tensor, start, end, weight)


def _masked_fill(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    x, mask, number = node.args
    value = giver.tensor(number, node.meta["val"].dtype)  # type: ignore[arg-type]
    return editor.call(aten.masked_fill.Tensor, x, mask, value)


def _clamp(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    """First from below, then from above, as one call does."""
    x: Any = node.args[0]
    for place, number in enumerate(node.args[1:]):
        given = giver.tensor(number, node.meta["val"].dtype) if isinstance(number, fx.Node) else number
        if number is not None:
            op = aten.clamp.Tensor if isinstance(number, fx.Node) else aten.clamp.default
            x = editor.call(op, x, *((given,) if place == 0 else (None, given)))
    return x  # type: ignore[no-any-return]


def _made_of_number(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    return giver.tensor(node.args[0], node.meta["val"].dtype)  # type: ignore[arg-type]


def _last(editor: Editor, node: fx.Node, giver: _Giver) -> fx.Node:
    """An op whose last argument becomes a tensor."""
    x, number = node.args
    x = _wide(editor, x)
    return editor.call(_LAST[node.target], x, _beside(x, giver, number))


# op -> the same with its last argument a tensor
_LAST = {
    **{op: op for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)},
    **{getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in "add sub mul div eq ne lt le gt ge".split()},
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
}
# op whose last argument is a number -> its form
_BY_LAST: dict[Any, Form] = {
    **dict.fromkeys(_LAST, _last),
    aten.lerp.Scalar: _lerp,
    aten.masked_fill.Scalar: _masked_fill,
}
# (op, keyword that is a number) -> its form
_BY_KEYWORD: dict[tuple[Any, str], Form] = {
    (aten.addcmul.default, "value"): _product,
    (aten.addcdiv.default, "value"): _product,
    (aten.add.Tensor, "alpha"): _add_scaled,
    (aten.sub.Tensor, "alpha"): _add_scaled,
}


def _form_of(node: fx.Node, taken: list[fx.Node]) -> Form | None:
    """What makes a call take tensors; None where nothing does."""
    if node.target is aten.clamp.default and not node.kwargs:
        return _clamp
    positions = [index for index, value in enumerate(node.args) if value in taken]
    keywords = [key for key, value in node.kwargs.items() if value in taken]
    if len(positions) + len(keywords) != 1:
        return None
    if keywords:
        return _BY_KEYWORD.get((node.target, keywords[0])) if len(node.kwargs) == 1 else None
    if node.target is aten.scalar_tensor.default:
        return _made_of_number
    is_last = not node.kwargs and positions[0] == len(node.args) - 1
    return _BY_LAST.get(node.target) if is_last else None


# ---- what a CUDA graph cannot hold


def _check_host_reads_nothing(step: StepGraph) -> None:
    waits = synchronisations(step)
    for node in step.calls():
        if node.name in waits:
            raise _refused(
                node,
                expected="no place at which the host waits for the device",
                got=f"one that {waits[node.name]}",
                fix=f"compute it on the device (an optimizer with capturable=True, torch.where), or {_FIX}",
            )


def _check_tensors_are_on_device(step: StepGraph, numbers: set[fx.Node]) -> None:
    """Nothing on the device reads a tensor of the host, but scalars that never change."""
    device = device_of(step)
    constant = {node for node in step.placeholders if node.meta["entry"].kind == "constant"}
    for node in step.calls():
        tensors = [source for source in node.all_input_nodes if yields_tensor(source)]
        away = [n for n in tensors if n not in numbers and n.meta["val"].device.type != device]
        if all(source in constant for source in tensors):
            constant.add(node)
        bad = next((n for n in away if n not in constant or n.meta["val"].dim()), None)
        if bad is not None and node not in numbers:
            raise _refused(
                node,
                expected=f"tensors on {device}",
                got=f"%{bad.name} on {bad.meta['val'].device.type}",
                fix=f"give the batch on {device}, make constants buffers of the model, or {_FIX}",
            )


def _refused(node: fx.Node, *, expected: str, got: str, fix: str) -> PlanError:
    place = node.meta.get("param") or node.meta["module"] or "the model"
    op = node.target.name() if compat.is_op(node.target) else getattr(node.target, "__name__", node.target)  # type: ignore[union-attr]
    where = f"Plan.cuda_graph, %{node.name} ({op}) in {node.meta['phase']} of {place}"
    return PlanError.of(where, expected=expected, got=got, fix=fix)
