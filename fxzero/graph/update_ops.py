"""Updates of many parameters by one op each: functional in a graph, in place in its program.

adamw(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay) -> all new
sgd(params, grads, momentums, *, lr, momentum, dampening, weight_decay, nesterov) -> all new

"All new" is one list: the new values of the first list, then those of each further list that an update writes. `steps`
count the one that is being made; max_exp_avg_sqs are those of amsgrad, or none. The arithmetic is that of
torch.optim.AdamW and SGD with fused=True, which runs each on all of its tensors in one pass over memory.

Shapes: any, contiguous, equal for what belongs to one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define(
    "adamw(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
    "Tensor[] steps, *, float lr, float beta1, float beta2, float eps, float weight_decay) -> Tensor[]"
)
_LIBRARY.define(
    "sgd(Tensor[] params, Tensor[] grads, Tensor[] momentums, *, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov) -> Tensor[]"
)

Tensors = Sequence[torch.Tensor]


def adamw_(*lists: Tensors, **numbers: float) -> list[torch.Tensor]:
    """Parameters and state are written over; returns them as the op does. `lists` are the op's, in order."""
    params, _, averages, squares, greatest, _ = lists
    aten._fused_adamw_.default(*lists, **numbers, amsgrad=bool(greatest), maximize=False)
    return [*params, *averages, *squares, *greatest]


def sgd_(*lists: Tensors, **numbers: Any) -> list[torch.Tensor]:
    """Parameters and momentum are written over; returns them as the op does. `lists` are the op's, in order."""
    params, _, momentums = lists
    aten._fused_sgd_.default(*lists, **numbers, maximize=False, is_first_step=False)
    return [*params, *momentums]


InPlaceForm = tuple[Callable[..., list[torch.Tensor]], tuple[int, ...]]  # and which of the lists it writes
_FORMS: dict[str, InPlaceForm] = {
    "adamw": (adamw_, (0, 2, 3, 4)),
    "sgd": (sgd_, (0, 2)),
}


def _register(name: str) -> None:
    """Let the functional op write over copies, and be traced on fake tensors."""
    in_place, writes = _FORMS[name]

    @torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")
    def functional(*lists: Tensors, **numbers: Any) -> list[torch.Tensor]:
        return in_place(*([t.clone() for t in ts] if i in writes else ts for i, ts in enumerate(lists)), **numbers)

    @torch.library.register_fake(f"fxzero::{name}", lib=_LIBRARY)
    def fake(*lists: Tensors, **numbers: Any) -> list[torch.Tensor]:
        return [torch.empty_like(t) for index in writes for t in lists[index]]


for _name in _FORMS:
    _register(_name)

adamw = torch.ops.fxzero.adamw.default
sgd = torch.ops.fxzero.sgd.default

# op -> its form in place, and which of its lists are written
IN_PLACE: dict[Any, tuple[Callable[..., list[torch.Tensor]], tuple[int, ...]]] = {
    adamw: _FORMS["adamw"],
    sgd: _FORMS["sgd"],
}


def written(node: fx.Node) -> list[fx.Node]:
    """What a call of such an op writes where it runs in place, in the order of what it yields; none for other calls."""
    if node.op != "call_function" or node.target not in IN_PLACE:
        return []
    return [source for index in IN_PLACE[node.target][1] for source in node.args[index]]  # type: ignore[union-attr, misc]
