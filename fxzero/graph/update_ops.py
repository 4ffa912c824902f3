"""Updates of many parameters by one op each: functional in a graph, in place in its program.

adamw(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay) -> all new
sgd(params, grads, momentums, *, lr, momentum, dampening, weight_decay, nesterov) -> all new
adamw_by_kernel, sgd_by_kernel, lion_by_kernel(params, grads, exp_avgs, *, lr, beta1, beta2, weight_decay) -> all new

"All new" is one list: the new values of the first list, then those of each further list that an update writes. `steps`
count the one that is being made; max_exp_avg_sqs are those of amsgrad, or none. The arithmetic of the first two is that
of torch.optim.AdamW and SGD with fused=True, which runs each on all of its tensors in one pass over memory; the others
are kernels of ours (`update_kernels`), which take also what gradients are multiplied by, and a dtype in which the new
parameters come once more, last.

Shapes: any, contiguous, equal for what belongs to one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxzero.graph import update_kernels

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_ADAMW = (
    "(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
    "Tensor[] steps, *, float lr, float beta1, float beta2, float eps, float weight_decay"
)
_SGD = (
    "(Tensor[] params, Tensor[] grads, Tensor[] momentums, *, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov"
)
_LION = "(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, *, float lr, float beta1, float beta2, float weight_decay"
_OF_KERNELS = ", Tensor? inverse_scale=None, Tensor? clip=None, ScalarType? copy_dtype=None"

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
_FORMS: dict[str, tuple[str, InPlaceForm]] = {
    "adamw": (_ADAMW, (adamw_, (0, 2, 3, 4))),
    "sgd": (_SGD, (sgd_, (0, 2))),
    "adamw_by_kernel": (_ADAMW + _OF_KERNELS, (update_kernels.adamw_, (0, 2, 3, 4))),
    "sgd_by_kernel": (_SGD + _OF_KERNELS, (update_kernels.sgd_, (0, 2))),
    "lion_by_kernel": (_LION + _OF_KERNELS, (update_kernels.lion_, (0, 2))),
}


def _register(name: str) -> Any:
    """Let the functional op write over copies, and be traced on fake tensors; returns it."""
    schema, (in_place, writes) = _FORMS[name]
    _LIBRARY.define(f"{name}{schema}) -> Tensor[]")

    @torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")
    def functional(*lists: Tensors, **numbers: Any) -> list[torch.Tensor]:
        return in_place(*([t.clone() for t in ts] if i in writes else ts for i, ts in enumerate(lists)), **numbers)

    @torch.library.register_fake(f"fxzero::{name}", lib=_LIBRARY)
    def fake(*lists: Tensors, **numbers: Any) -> list[torch.Tensor]:
        copies = update_kernels.copies_of(lists[0], numbers.get("copy_dtype"))
        return [*(torch.empty_like(t) for index in writes for t in lists[index]), *copies]

    return getattr(torch.ops.fxzero, name).default


# op -> its form in place, and which of its lists are written
IN_PLACE: dict[Any, InPlaceForm] = {_register(name): form for name, (_, form) in _FORMS.items()}

adamw, sgd = torch.ops.fxzero.adamw.default, torch.ops.fxzero.sgd.default
adamw_by_kernel = torch.ops.fxzero.adamw_by_kernel.default
sgd_by_kernel = torch.ops.fxzero.sgd_by_kernel.default
lion_by_kernel = torch.ops.fxzero.lion_by_kernel.default


def written(node: fx.Node) -> list[fx.Node]:
    """What a call of such an op writes where it runs in place, in the order of what it yields; none for other calls.

    Copies in another dtype come behind these, in memory of their own.
    """
    if node.op != "call_function" or node.target not in IN_PLACE:
        return []
    return [source for index in IN_PLACE[node.target][1] for source in node.args[index]]  # type: ignore[union-attr, misc]
