"""Updates of parameters by the op that makes them in one pass over memory, several of them in one call.

[Note: fused updates]
An update is a dozen pointwise calls a parameter. Where they are those of torch.optim.AdamW (or Adam) or of SGD with
momentum, whatever the optimizer is called, one call of `graph/update_ops.py` takes their place. Updates that stand one
behind the other, with the same numbers, share a call; none moves, so that an update waits for no gradient but those
that had arrived before it anyway. What comes before the update proper (the L2 term of Adam, the sign of maximize,
unscaling, clipping) stays as it is. A value in between that anything else reads leaves the update as it is.
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
from fxzero.graph.patterns import Call, match
from fxzero.graph.step_graph import yields_tensor
from fxzero.graph.swap_ops import is_off_device
from fxzero.passes.shard_optimizer_state import is_rows_of

aten = torch.ops.aten

ALL = ("adamw", "sgd")


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


_DECAYED = Call(
    *(aten.mul.Tensor, "param", Call(operator.sub, 1.0, Call(operator.mul, "lr", "weight_decay"))),
)
_WITH_L2 = Call(aten.add.Tensor, "grad", "param", alpha="weight_decay")
# name -> patterns with the numbers that they leave out
_PATTERNS: dict[str, tuple[tuple[Call, dict[str, Any]], ...]] = {
    "adamw": tuple(
        (_adamw(decayed, amsgrad=amsgrad), {} if decayed is _DECAYED else {"weight_decay": 0.0})
        for decayed in (_DECAYED, "param")
        for amsgrad in (False, True)
    ),
    "sgd": tuple(
        (_sgd(grad, nesterov=nesterov), {"nesterov": nesterov, "dampening": 0.0, **left_out})
        for grad, left_out in ((_WITH_L2, {}), ("grad", {"weight_decay": 0.0}))
        for nesterov in (True, False)
    ),
}
_OPS = {"adamw": update_ops.adamw, "sgd": update_ops.sgd}
# the lists of an op; a value that a pattern has not leaves its list empty
_LISTS = {
    "adamw": ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"),
    "sgd": ("param", "grad", "buffer"),
}
_NUMBERS = {
    "adamw": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
}


@dataclass(frozen=True)
class _Update:
    """The update of one parameter.

    Args:
        kernel: one of ALL.
        last: its last call.
        calls: all of them that yield tensors, but for what counts steps.
        found: name in the pattern -> what stands there.
    """

    kernel: str
    last: fx.Node
    calls: frozenset[fx.Node]
    found: dict[str, Any]

    @property
    def shared(self) -> tuple[Any, ...]:
        """What updates in one call have in common."""
        val = self.found["param"].meta["val"]
        numbers = tuple(self.found[name] for name in _NUMBERS[self.kernel])
        return self.kernel, val.dtype, val.device, "max_exp_avg_sq" in self.found, *numbers


@graph_pass(
    requires=("captured",),
    provides=("updates-fused",),
    numerics="1e-6 relative a step in fp32: a fused update rounds bias corrections and products in another order",
)
def fuse_updates(step: StepGraph, *, names: tuple[str, ...] = ALL) -> int:
    """Make the updates of AdamW, Adam and SGD with momentum by one call for those that stand together.

    Args:
        step: the graph, in its final order.
        names: of ALL, which updates.

    Returns:
        The number of parameters whose update is fused.
    """
    position = step.positions()
    found = [update for node in step.phase("update") if (update := _update_at(node, names)) is not None]
    updates = [update for update in found if _is_read_behind(update, position)]
    groups = list(_groups(step, updates))
    for group in groups:
        _fuse(step, group)
    erase_dead(step)
    counts = {name: [len(g) for g in groups if g[0].kernel == name] for name in names}
    step.remarks["fuse_updates"] = "; ".join(
        f"{name}: {sum(sizes)} parameters updated by {len(sizes)} fused calls" if sizes else f"{name}: no update fused"
        for name, sizes in counts.items()
    )
    return len(updates)


def _update_at(node: fx.Node, names: tuple[str, ...]) -> _Update | None:
    """The update that ends with a call."""
    for name in names:
        for pattern, left_out in _PATTERNS[name]:
            matched = match(pattern, node)
            if matched is None:
                continue
            found = {**left_out, **matched.found}
            calls = frozenset(call for call in matched.calls if yields_tensor(call))
            inner = calls - {value for key, value in found.items() if key.startswith("new_")}
            if _fits(name, found) and all(user in calls for call in inner for user in call.users):
                return _Update(name, node, calls, found)
    return None


def _is_read_behind(update: _Update, position: dict[fx.Node, int]) -> bool:
    """Whether what an update makes is read, elsewhere, behind its last call only: that is where all of it is made."""
    readers = (user for call in update.calls for user in call.users if user not in update.calls)
    return all(position[user] > position[update.last] for user in readers)


def _rests(node: Any) -> bool:
    """Whether a value is state that rests on the device, or this rank's rows of it."""
    return isinstance(node, fx.Node) and (node.op == "placeholder" or is_rows_of(node)) and not is_off_device(node)


def _fits(name: str, found: dict[str, Any]) -> bool:
    """Whether an op takes the tensors of an update: alike, dense, on the CPU."""
    tensors = [found[key] for key in _LISTS[name] if key in found and key != "step"]
    state = [node for key, node in found.items() if f"new_{key}" in found]
    if not all(isinstance(node, fx.Node) and yields_tensor(node) for node in tensors) or not all(map(_rests, state)):
        return False
    vals = [node.meta["val"] for node in tensors]
    alike = {(val.dtype, tuple(val.shape), val.device) for val in vals}
    dense = all(val.is_contiguous() and val.is_floating_point() for val in vals)
    steps = found["step"].meta["val"].device.type if "step" in found else "cpu"
    in_place = vals[0].dtype in (torch.float32, torch.float64) and len(set(tensors)) == len(tensors)
    return len(alike) == 1 and dense and in_place and vals[0].device.type == steps == "cpu"


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
        call = editor.call(_OPS[kernel], *lists, **{name: first.found[name] for name in _NUMBERS[kernel]})
        keys = [key for key in _LISTS[kernel] if f"new_{key}" in first.found]
        for place, (key, update) in enumerate((key, update) for key in keys for update in group):
            old = update.found[f"new_{key}"]
            new = editor.call(operator.getitem, call, place)
            new.meta = {**old.meta}
            old.replace_all_uses_with(new)
