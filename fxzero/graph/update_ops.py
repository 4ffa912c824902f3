"""Updates of many parameters by one op each: functional in a graph, in place in its program.

adamw(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *, lr, beta1, beta2, eps, weight_decay) -> all new
sgd(params, grads, momentums, *, lr, momentum, dampening, weight_decay, nesterov) -> all new

"All new" is one list: the new values of the first list, then those of each further list that an update writes. `steps`
count the one that is being made; max_exp_avg_sqs are those of amsgrad, or none. The arithmetic is that of
torch.optim.AdamW and SGD with fused=True, which runs each on all of its tensors in one pass over memory.

Shapes: any, contiguous, equal for what belongs to one parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: Tensors,
    **numbers: float,
) -> list[torch.Tensor]:
    """Parameters and state are written over; returns them as the op does."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    aten._fused_adamw_.default(*lists, **numbers, amsgrad=bool(max_exp_avg_sqs), maximize=False)
    return [*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs]


def sgd_(params: Tensors, grads: Tensors, momentums: Tensors, **numbers: Any) -> list[torch.Tensor]:
    """Parameters and momentum are written over; returns them as the op does."""
    aten._fused_sgd_.default(params, grads, momentums, **numbers, maximize=False, is_first_step=False)
    return [*params, *momentums]


@torch.library.impl(_LIBRARY, "adamw", "CompositeExplicitAutograd")
def _adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: Tensors,
    **numbers: float,
) -> list[torch.Tensor]:
    lists = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    params, averages, squares, greatest = ([t.clone() for t in tensors] for tensors in lists)
    return adamw_(params, grads, averages, squares, greatest, steps, **numbers)


@torch.library.impl(_LIBRARY, "sgd", "CompositeExplicitAutograd")
def _sgd(params: Tensors, grads: Tensors, momentums: Tensors, **numbers: Any) -> list[torch.Tensor]:
    return sgd_([t.clone() for t in params], grads, [t.clone() for t in momentums], **numbers)


@torch.library.register_fake("fxzero::adamw", lib=_LIBRARY)
def _adamw_fake(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: Tensors,
    **numbers: float,
) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t in (*params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs)]


@torch.library.register_fake("fxzero::sgd", lib=_LIBRARY)
def _sgd_fake(params: Tensors, grads: Tensors, momentums: Tensors, **numbers: Any) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t in (*params, *momentums)]


adamw = torch.ops.fxzero.adamw.default
sgd = torch.ops.fxzero.sgd.default

# op -> its form in place, and which of its lists are written
IN_PLACE: dict[Any, tuple[Any, tuple[int, ...]]] = {adamw: (adamw_, (0, 2, 3, 4)), sgd: (sgd_, (0, 2))}


def written(node: fx.Node) -> list[fx.Node]:
    """What a call of such an op writes where it runs in place, in the order of what it yields; none for other calls."""
    if node.op != "call_function" or node.target not in IN_PLACE:
        return []
    return [source for index in IN_PLACE[node.target][1] for source in node.args[index]]  # type: ignore[union-attr, misc]
