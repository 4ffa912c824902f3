"""Updates of parameters by the op that makes them in one pass over memory, several of them in one call.

[Note: fused updates]
An update is a dozen pointwise calls a parameter. Where they are those of torch.optim.AdamW (or Adam), of SGD with
momentum or of Lion, whatever the optimizer is called, one call of `graph/update_ops.py` takes their place: on the CPU
one of torch's, on a GPU a kernel of ours. Updates that stand one behind the other, with the same numbers, share a call;
none moves, so that an update waits for no gradient but those that had arrived before it anyway. A kernel also
multiplies a gradient by what unscales and clips it, where nothing else reads the product, and writes the copy of a new
parameter in fewer bytes that the step makes. What else comes before the update proper (the L2 term of Adam, the sign
of maximize) stays as it is. A value in between that anything else reads leaves the update as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph, update_ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, erase_dead
from fxzero.graph.patterns import Call, Match, first_difference, match
from fxzero.graph.step_graph import device_of, yields_tensor
from fxzero.graph.swap_ops import is_off_device
from fxzero.passes.shard_optimizer_state import is_rows_of

aten = torch.ops.aten

BY_TORCH = ("adamw", "sgd")  # that torch has an op for on the CPU
ALL = (*BY_TORCH, "lion")
_MOST_FACTORS = ("clip", "inverse_scale")  # of a gradient, the last one first


def _adamw(decayed: Any, *, amsgrad: bool) -> Call:
    """One step of AdamW, as torch.optim.AdamW with foreach=False is captured."""
    step = Call(aten._local_scalar_dense.default, "step")
    average = Call(aten.lerp.Scalar, "exp_avg", "grad", Call(operator.sub, 1.0, "beta1"), name="new_exp_avg")
    square = Call(
        *(aten.addcmul.default, Call(aten.mul.Tensor, "exp_avg_sq", "beta2"), "grad", "grad"),
        value=Call(operator.sub, 1.0, "beta2"),
        name="new_exp_avg_sq",
    )
    if amsgrad:
        square = Call(aten.maximum.default, "max_exp_avg_sq", square, name="new_max_exp_avg_sq")
    root = Call(operator.pow, Call(operator.sub, 1.0, Call(operator.pow, "beta2", step)), 0.5)
    denominator = Call(aten.add.Tensor, Call(aten.div.Tensor, Call(aten.sqrt.default, square), root), "eps")
    rate = Call(operator.truediv, "lr", Call(operator.sub, 1.0, Call(operator.pow, "beta1", step)))
    return Call(aten.addcdiv.default, decayed, average, denominator, value=Call(operator.neg, rate), name="new_param")


def _sgd(grad: Any, *, nesterov: bool) -> Call:
    """One step of SGD with momentum, as torch.optim.SGD with foreach=False is captured."""
    momentum = Call(aten.add.Tensor, Call(aten.mul.Tensor, "buffer", "momentum"), grad, name="new_buffer")
    by = Call(aten.add.Tensor, grad, momentum, alpha="momentum") if nesterov else momentum
    return Call(aten.add.Tensor, "param", by, alpha=Call(operator.neg, "lr"), name="new_param")


@dataclass(frozen=True)
class _Form:
    """One way in which an update is written.

    Args:
        update: the calls that end with the new parameter.
        left_out: the numbers that it leaves out.
        beside: further calls, that end with a state's next value which the parameter does not follow from.
    """

    update: Call
    left_out: dict[str, Any]
    beside: Call | None = None


def _lion(decayed: Any, direction: Call) -> Call:
    """The new parameter of Lion, as it is captured in place or out of place."""
    sign = Call(aten.sign.default, direction)
    return Call(aten.add.Tensor, decayed, sign, alpha=Call(operator.neg, "lr"), name="new_param")


def _averages(beta: str, **name: str) -> tuple[Call, ...]:
    """The ways of averaging a gradient into exp_avg, whose part is `beta`."""
    kept, part = Call(aten.mul.Tensor, "exp_avg", beta), Call(operator.sub, 1.0, beta)
    return (
        Call(aten.add.Tensor, kept, "grad", alpha=part, **name),
        Call(aten.add.Tensor, kept, Call(aten.mul.Tensor, "grad", part), **name),
        Call(aten.lerp.Scalar, "exp_avg", "grad", part, **name),
    )


_DECAYED = Call(
    *(aten.mul.Tensor, "param", Call(operator.sub, 1.0, Call(operator.mul, "lr", "weight_decay"))),
)
_WITH_L2 = Call(aten.add.Tensor, "grad", "param", alpha="weight_decay")
_DECAYS: tuple[tuple[Any, dict[str, Any]], ...] = ((_DECAYED, {}), ("param", {"weight_decay": 0.0}))
_FORMS: dict[str, tuple[_Form, ...]] = {
    "adamw": tuple(
        _Form(_adamw(decayed, amsgrad=amsgrad), left_out) for decayed, left_out in _DECAYS for amsgrad in (False, True)
    ),
    "sgd": tuple(
        _Form(_sgd(grad, nesterov=nesterov), {"nesterov": nesterov, "dampening": 0.0, **left_out})
        for grad, left_out in ((_WITH_L2, {}), ("grad", {"weight_decay": 0.0}))
        for nesterov in (True, False)
    ),
    "lion": tuple(
        _Form(_lion(decayed, direction), left_out, average)
        for decayed, left_out in _DECAYS
        for direction in _averages("beta1")
        for average in _averages("beta2", name="new_exp_avg")
    ),
}
_TORCH_OPS = {"adamw": update_ops.adamw, "sgd": update_ops.sgd}
_KERNEL_OPS = {
    "adamw": update_ops.adamw_by_kernel,
    "sgd": update_ops.sgd_by_kernel,
    "lion": update_ops.lion_by_kernel,
}
# the lists of an op; a value that a pattern has not leaves its list empty
_LISTS = {
    "adamw": ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    "sgd": ("param", "grad", "buffer"),
    "lion": ("param", "grad", "exp_avg"),
}
_NUMBERS = {
    "adamw": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "lion": ("lr", "beta1", "beta2", "weight_decay"),
}


@dataclass(frozen=True)
class _Update:
    """The update of one parameter.

    Args:
        kernel: one of ALL.
        op: what makes it.
        last: its last call.
        calls: all of them that yield tensors, but for what counts steps.
        found: name in the pattern -> what stands there.
    """

    kernel: str
    op: Any
    last: fx.Node
    calls: frozenset[fx.Node]
    found: dict[str, Any]

    @property
    def shared(self) -> tuple[Any, ...]:
        """What updates in one call have in common."""
        val = self.found["param"].meta["val"]
        lists = "max_exp_avg_sq" in self.found, "new_copy" in self.found
        return self.op, val.dtype, val.device, *lists, *self.numbers.values()

    @property
    def numbers(self) -> dict[str, Any]:
        """The arguments of the op that are no lists."""
        numbers = {name: self.found[name] for name in _NUMBERS[self.kernel]}
        copy = self.found.get("new_copy")
        factors = {name: self.found[name] for name in _MOST_FACTORS if name in self.found}
        return numbers | factors | ({} if copy is None else {"copy_dtype": copy.meta["val"].dtype})


@graph_pass(
    requires=("captured",),
    provides=("updates-fused",),
    numerics="1e-6 relative a step in fp32: a fused update rounds bias corrections and products in another order",
)
def fuse_updates(step: StepGraph, *, names: tuple[str, ...] | None = None, ops: str = "auto") -> int:
    """Make the updates of AdamW, Adam, SGD with momentum and Lion by one call for those that stand together.

    Args:
        step: the graph, in its final order.
        names: of ALL, which updates; None: those of BY_TORCH on the CPU, all by kernels.
        ops: "triton": by the kernels of `fxzero.kernels`, on any device; "auto": by them on a GPU, and where torch has
            no op.

    Returns:
        The number of parameters whose update is fused.
    """
    position = step.positions()
    by_kernel = ops == "triton" or device_of(step) == "cuda"
    names = names or (ALL if by_kernel else BY_TORCH)
    made_by = {name: (_KERNEL_OPS if by_kernel or name not in _TORCH_OPS else _TORCH_OPS)[name] for name in names}
    found = [update for node in step.phase("update") if (update := _update_at(node, made_by, position)) is not None]
    updates = [_with_more(update) for update in found if _is_read_behind(update, position)]
    groups = list(_groups(step, updates))
    nearest = {name: _nearest(step, name) for name in names if not any(g[0].kernel == name for g in groups)}
    for group in groups:
        _fuse(step, group)
    erase_dead(step)
    counts = {name: [len(g) for g in groups if g[0].kernel == name] for name in names}
    step.remarks["fuse_updates"] = "; ".join(
        f"{name}: {sum(sizes)} parameters updated by {len(sizes)} fused calls" if sizes else f"{name}: {nearest[name]}"
        for name, sizes in counts.items()
    )
    return len(updates)


def _update_at(node: fx.Node, made_by: dict[str, Any], position: dict[fx.Node, int]) -> _Update | None:
    """The update whose new parameter a call yields."""
    for name, op in made_by.items():
        for form in _FORMS[name]:
            matched = _matched(form, node)
            if matched is None:
                continue
            found = {**form.left_out, **matched.found}
            calls = frozenset(call for call in matched.calls if yields_tensor(call))
            inner = calls - {value for key, value in found.items() if key.startswith("new_")}
            if _fits(name, op, found) and all(user in calls for call in inner for user in call.users):
                ends = [value for key, value in found.items() if key.startswith("new_")]
                return _Update(name, op, max(ends, key=position.__getitem__), calls, found)
    return None


def _matched(form: _Form, node: fx.Node) -> Match | None:
    """Where a form stands with `node` as the new parameter."""
    update = match(form.update, node)
    if update is None or form.beside is None:
        return update
    readers = list(update.found["exp_avg"].users)
    for end in dict.fromkeys([*readers, *(user for reader in readers for user in reader.users)]):
        beside = match(form.beside, end, update) if end not in update.calls else None
        if beside is not None:
            return beside
    return None


def _with_more(update: _Update) -> _Update:
    """The update with what a kernel does beside: factors of the gradient, and a copy of the new parameter."""
    if update.op not in _KERNEL_OPS.values():
        return update
    found, calls = dict(update.found), set(update.calls)
    for name in _MOST_FACTORS:
        product = found["grad"]
        factors = _factored(product, calls)
        if factors is None:
            break
        found["grad"], found[name] = factors
        calls.add(product)
    copies = [user for user in found["new_param"].users if _is_copy(user)]
    if len(copies) == 1:
        found["new_copy"] = copies[0]
        calls.add(copies[0])
    return _Update(update.kernel, update.op, update.last, frozenset(calls), found)


def _factored(product: fx.Node, readers: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(gradient, factor) of a product with a single number on the device that nothing but `readers` reads."""
    if product.target is not aten.mul.Tensor or not all(user in readers for user in product.users):
        return None
    grad, factor = product.args
    if not all(isinstance(node, fx.Node) and yields_tensor(node) for node in (grad, factor)):
        return None
    one, other = (node.meta["val"] for node in (grad, factor))  # type: ignore[union-attr]
    alike = one.shape == product.meta["val"].shape and one.dtype == torch.float32 and one.is_contiguous()
    single = not other.dim() and other.dtype == torch.float32 and other.device == one.device
    return (grad, factor) if alike and single and one.dim() else None  # type: ignore[return-value]


def _is_copy(node: fx.Node) -> bool:
    """Whether a call writes a new parameter in fewer bytes, and does nothing else."""
    if node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return False
    return node.kwargs["dtype"] in (torch.bfloat16, torch.float16)


def _nearest(step: StepGraph, name: str) -> str:
    """Why no update of a kind was fused: the first op that differs where most of a form stands."""
    differences = [
        found
        for node in step.phase("update")
        for form in _FORMS[name]
        if node.target is form.update.target and (found := first_difference(form.update, node)) is not None
    ]
    best = max(differences, key=lambda found: found.alike, default=None)
    if best is None or not best.alike:
        return "no update fused"
    if not best.told:
        return f"no update fused; nearest, %{best.last}: its tensors or what else reads them fit no op"
    return f"no update fused; nearest, %{best.last}: {best.told}"


def _is_read_behind(update: _Update, position: dict[fx.Node, int]) -> bool:
    """Whether what an update makes is read, elsewhere, behind its last call only: that is where all of it is made."""
    readers = (user for call in update.calls for user in call.users if user not in update.calls)
    return all(position[user] > position[update.last] for user in readers)


def _rests(node: Any) -> bool:
    """Whether a value is state that rests on the device, or this rank's rows of it."""
    return isinstance(node, fx.Node) and (node.op == "placeholder" or is_rows_of(node)) and not is_off_device(node)


def _fits(name: str, op: Any, found: dict[str, Any]) -> bool:
    """Whether an op takes the tensors of an update: alike, dense, on a device that it is for."""
    tensors = [found[key] for key in _LISTS[name] if key in found and key != "step"]
    state = [node for key, node in found.items() if f"new_{key}" in found]
    if not all(isinstance(node, fx.Node) and yields_tensor(node) for node in tensors) or not all(map(_rests, state)):
        return False
    vals = [node.meta["val"] for node in tensors]
    alike = {(val.dtype, tuple(val.shape), val.device) for val in vals}
    dense = all(val.is_contiguous() and val.is_floating_point() for val in vals)
    counted_on_host = "step" not in found or found["step"].meta["val"].device.type == "cpu"
    by_kernel = op is _KERNEL_OPS[name]
    dtypes = (torch.float32,) if by_kernel else (torch.float32, torch.float64)
    in_place = vals[0].dtype in dtypes and len(set(tensors)) == len(tensors)
    return len(alike) == 1 and dense and in_place and counted_on_host and (by_kernel or vals[0].device.type == "cpu")


def _groups(step: StepGraph, updates: list[_Update]) -> Iterator[list[_Update]]:
    """Updates in a row that share a call: nothing stands between them but their own calls and numbers."""
    by_last = {update.last: update for update in updates}
    inside = {call for update in updates for call in update.calls}
    group: list[_Update] = []
    for node in step.calls():
        update = by_last.get(node)
        if update is not None and (not group or group[0].shared == update.shared):
            group.append(update)
        elif update is not None or (node not in inside and not _may_stand_between(node)):
            yield from [group] if group else []
            group = [] if update is None else [update]
    yield from [group] if group else []


def _may_stand_between(node: fx.Node) -> bool:
    """Whether a call is a number of the host's, or a step count."""
    return node.meta["phase"] == "update" and (not yields_tensor(node) or not node.meta["val"].dim())


def _fuse(step: StepGraph, group: list[_Update]) -> None:
    """Put one call in the place of the last of some updates."""
    first, kernel = group[0], group[0].kernel
    lists = [[u.found[key] for u in group if key in u.found] for key in _LISTS[kernel]]
    editor = Editor(step, phase="update", module=first.last.meta["module"])
    with editor.before(group[-1].last):
        call = editor.call(first.op, *lists, **first.numbers)
        keys = [key for key in (*_LISTS[kernel], "copy") if f"new_{key}" in first.found]
        for place, (key, update) in enumerate((key, update) for key in keys for update in group):
            old = update.found[f"new_{key}"]
            new = editor.call(operator.getitem, call, place)
            new.meta = {**old.meta}
            old.replace_all_uses_with(new)
