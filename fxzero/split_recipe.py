"""The passes that split a step over the axes of a mesh on which ranks have one batch.

[Note: parameters over sp]
Ranks of sp have one batch, and split what is made of it: rows, tokens, heads. Parameters are whole on each. An axis
that splits them is tp, and what saves their memory at rest is ZeRO over dp: split over sp, too, they would be
gathered at each use or tokens at each product, which is tp under another name. So state, checkpoints and layouts
know nothing of sp; gradients are added up over it where they are born, and everything behind that is as without.
Over ep, experts' parameters are split, each rank has some experts, and all else is as over sp: ranks of ep have one
batch and split it.
"""

from __future__ import annotations

from fxzero.graph.contract import Pass
from fxzero.passes.chunk_products import chunk_products
from fxzero.passes.split_tensors import split_tensors
from fxzero.plan import Plan


def splitting(plan: Plan, backend: str) -> list[Pass]:
    """What splits values over ep, sp and tp, and products beside their collectives into pieces.

    Args:
        plan: resolved.
        backend: what carries collectives.
    """
    split: list[Pass] = []
    machine = {"hardware": plan.hardware, "backend": backend}
    tp, sp = plan.axes.get("tp", 1), plan.axes.get("sp", 1)
    if plan.axes.get("ep", 1) > 1:
        room = None if plan.expert_room == "all" else plan.expert_room
        experts = {"parameters": "experts", "expert_room": room}
        split.append(split_tensors.using(axis="ep", **experts, head_blocks=tp * sp, **machine))
    if sp > 1:
        how = {"head_blocks": tp, "attention": plan.sp_attention}
        split.append(split_tensors.using(axis="sp", parameters="whole", **how, **machine))
    if tp > 1:
        split.append(split_tensors.using(axis="tp", strict=plan.tp_strict, **machine))
    if split and plan.tp_chunks != 1:
        order = {"by_cost": plan.schedule == "cost", "memory_bytes": plan.memory_budget}
        split.append(chunk_products.using(chunks=plan.tp_chunks, **order, **machine))
    return split
