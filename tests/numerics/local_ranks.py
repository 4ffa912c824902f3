"""Runs a compiled graph for several ranks in one process, with real numerics (torch's LocalTensorMode)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fxzero import Plan, StepGraph, compat_distributed
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.graph.ops import local_shard
from fxzero.recipe import recipe
from fxzero.runtime.program import Program
from fxzero.runtime.state import StepState
from fxzero.runtime.topology import Topology


@dataclass
class Outcome:
    """What one step left: this rank's losses and the whole new state, by (kind, name)."""

    losses: dict[int, torch.Tensor]
    state: dict[tuple[str, str], torch.Tensor]


def compile_for(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any, plan: Plan) -> StepGraph:
    """The graph that a plan makes of a step, for the ranks of its mesh."""
    capture = capture_step(rehearse(Inventory.of(model, optimizer))[0], None, batch, {})
    capture.step.mesh = dict(plan.axes)
    return recipe(plan, backend="fake").run(capture.step)


def run_ranks(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], plan: Plan, *, step: StepGraph
) -> Outcome:
    """One step of `step` on all ranks at once; rank i gets `batches[i]`. Model and optimizer are not changed."""
    return train_ranks(model, optimizer, [batches], plan, step=step)


def train_ranks(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[list[Any]], plan: Plan, *, step: StepGraph
) -> Outcome:
    """Steps of `step` on all ranks at once; rank i gets `batches[n][i]` at step n. The losses are the last step's.

    State that is a Python number must not change between steps; model and optimizer are not changed.
    """
    size = len(batches[0])
    model, optimizer = copy.deepcopy((model, optimizer))
    state = StepState(
        model, optimizer, Topology(Plan(zero=plan.zero).resolve(1), None, "none"), device=torch.device("cpu")
    )
    state.bind()
    if not dist.is_initialized():
        compat_distributed.fake_process_group(size)
    assert dist.get_world_size() == size
    groups: dict[str, Any] = dict.fromkeys(plan.axes, dist.group.WORLD)
    if plan.node_size:
        groups["dp_node"] = dist.new_group(list(range(plan.node_size)))
    program = Program(step, groups=groups)
    values: dict[tuple[str, str], Any] = {}
    for batch in batches:
        for node in step.placeholders:
            entry = node.meta["entry"]
            if entry.key not in values or entry.kind == "batch":
                values[entry.key] = _value(node, entry, state, batch)
        with compat_distributed.local_tensor_mode(size):
            outputs = program.run(list(values.values()))
    losses = next(v for key, v in zip(program.outputs, outputs, strict=True) if key[0] == "loss")
    after = {}
    for node in step.inputs("parameter", "optimizer", "auxiliary"):
        value = values[node.meta["entry"].key]
        if isinstance(value, torch.Tensor):
            parts = compat_distributed.local_values(value) if not isinstance(value, torch.nn.Parameter) else {0: value}
            after[node.meta["entry"].key] = _whole(node, parts)
    return Outcome(compat_distributed.local_values(losses), after)


def _value(node: Any, entry: Any, state: StepState, batches: list[Any]) -> Any:
    ranks = range(len(batches))
    if entry.kind == "coordinate":
        size = node.users and entry.name == "dp_node" and next(iter(node.users)).args[1]
        return compat_distributed.local_int({rank: rank % size if size else rank for rank in ranks})
    if entry.kind == "batch":
        return compat_distributed.local_tensor({rank: batches[rank][int(entry.name.split(".")[1])] for rank in ranks})
    if entry.kind == "auxiliary":
        val = node.meta["val"]
        return compat_distributed.local_tensor({rank: torch.zeros(val.shape, dtype=val.dtype) for rank in ranks})
    value = state.lookup(Inventory.of(state.model, state.optimizer), entry.kind, entry.name)
    if not isinstance(value, torch.Tensor):
        return value
    if "sharding" in node.meta:
        return compat_distributed.local_tensor(
            {rank: local_shard(value.detach(), len(batches), rank) for rank in ranks}
        )
    return compat_distributed.local_tensor({rank: value.detach().clone() for rank in ranks})


def _whole(node: Any, parts: dict[int, torch.Tensor]) -> torch.Tensor:
    sharding = node.meta.get("sharding")
    if sharding is None:
        first = parts[0]
        assert all(torch.equal(first, part) for part in parts.values()), f"ranks differ in {node.name}"
        return first
    return torch.cat([parts[rank] for rank in sorted(parts)])[: sharding.rows]
