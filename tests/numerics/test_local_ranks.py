"""Ranks in one process: four against the mean of their gradients, for every ZeRO stage; and meshes of several axes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fxzero import Plan, StepGraph, compat_distributed
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.graph.placement_rules import check_placements
from fxzero.graph.rules import Context
from fxzero.passes.reduce_gradients import reduce_gradients
from tests.graph import split_by_hand
from tests.numerics.local_ranks import Mesh, compile_for, join, run_ranks, split, train_ranks
from tests.sharding.by_execution import launched

WORLD = 4


class Tied(nn.Module):
    """62 rows over 4 ranks do not divide; the head shares the embedding; one bias, one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(62, 16)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 62, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(torch.relu(self.hidden(self.embed(x))))), y)


def make(optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW):
    torch.manual_seed(0)
    model = Tied()
    batches = [(torch.randint(62, (8,)), torch.randint(62, (8,))) for _ in range(WORLD)]
    return model, optimizer_class(model.parameters(), lr=1e-2), batches


def reference(model, optimizer, batches):
    model, optimizer = copy.deepcopy((model, optimizer))
    losses = [model(*batch) for batch in batches]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
        parameter.grad = torch.stack(parts).sum(0) / WORLD
    optimizer.step()
    return [loss.detach() for loss in losses], {name: p.detach() for name, p in model.named_parameters()}


def differences(outcome, losses, parameters):
    wrong = [f"loss {i}" for i, loss in enumerate(losses) if not torch.equal(outcome.losses[i], loss)]
    for name, expected in parameters.items():
        if not torch.allclose(outcome.state[("parameter", name)], expected, rtol=1e-6, atol=1e-8):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 0}, {"reduce_scatter": "all_to_all"}], ids=str)
def test_four_ranks_make_the_mean_update(zero, options):
    model, optimizer, batches = make()
    plan = Plan(zero=zero, mesh={"dp": WORLD}, **options)
    step = compile_for(model, optimizer, batches[0], plan)
    outcome = run_ranks(model, optimizer, batches, plan, step=step)
    assert differences(outcome, *reference(model, optimizer, batches)) == []


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_sum_in_place_of_a_mean_is_seen(zero):
    model, optimizer, batches = make(torch.optim.SGD)  # Adam's first step would not notice a scaled gradient
    plan = Plan(zero=zero, mesh={"dp": WORLD}, bucket_bytes=0)
    step = compile_for(model, optimizer, batches[0], plan)
    target = c10d.all_reduce if zero < 2 else c10d.reduce_scatter
    victim = step.calls(target)[0]
    victim.args = tuple("sum" if argument == "avg" else argument for argument in victim.args)
    outcome = run_ranks(model, optimizer, batches, plan, step=step)
    assert differences(outcome, *reference(model, optimizer, batches)) != []


# ---- several axes

MESHES = ({"tp": 4}, {"dp": 2, "tp": 2}, {"tp": 2, "dp": 2}, {"dp": 2, "sp": 1, "tp": 2})
STEPS = 2


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """A process group of eight ranks, in place of what others have made, and of which none stays."""
    if dist.is_initialized():
        dist.destroy_process_group()
    compat_distributed.fake_process_group(8)
    yield
    dist.destroy_process_group()


def by_columns_and_rows(mesh: dict[str, int], *sharded: str) -> StepGraph:
    """The step that is split by hand, with gradients reduced over dp, and ZeRO's rows for some parameters."""
    step = split_by_hand.split_step(mesh)
    for name in sharded:
        split_by_hand.shard_rows(step, name)
    if "dp" in mesh:
        reduce_gradients.run(step, axes=("dp",))
    return step


def trained(step: StepGraph) -> dict[str, float]:
    """State after some steps -> how far it is from that of one device; ranks that differ are an AssertionError."""
    model, optimizer = split_by_hand.make()
    data = split_by_hand.batches(step.mesh.get("dp", 1))
    outcome = train_ranks(model, optimizer, [data] * STEPS, Plan(zero=0), step=step)
    for _ in range(STEPS):
        losses = [model(*batch) for batch in data]
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        optimizer.step()
    mesh = Mesh.of(step)
    far = {f"loss of {rank}": outcome.losses[rank] - losses[mesh.data_index(rank)] for rank in mesh.ranks}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        far[name] = outcome.state[("parameter", name)] - parameter
        far[f"{name}:momentum"] = outcome.state[("optimizer", f"{name}:momentum_buffer")] - momentum
    assert len(far) == 12 + len(mesh.ranks)
    return {name: float(found.detach().abs().max()) for name, found in far.items()}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_columns_and_rows_over_tp_make_the_update_of_one_device(mesh: dict[str, int]) -> None:
    far = trained(by_columns_and_rows(mesh))
    assert max(far.values()) < 1e-6, far


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
@pytest.mark.parametrize("sharded", [("up.weight", "up.bias"), ("down.weight", "inner.weight")], ids=str)
def test_rows_of_parts_are_split_and_put_together(mesh: dict[str, int], sharded: tuple[str, ...]) -> None:
    step = by_columns_and_rows(mesh, *sharded)
    assert next(check_placements(Context(step)), None) is None
    far = trained(step)
    assert max(far.values()) < 1e-6, far


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 4}, {"tp": 4, "dp": 2}, {"dp": 2, "sp": 2, "tp": 2}], ids=str)
def test_eight_ranks(mesh: dict[str, int], eight_ranks: None) -> None:
    far = trained(by_columns_and_rows(mesh, "up.weight", "down.weight"))
    assert max(far.values()) < 1e-6, far


def put(target: object, index: int, value: object):
    """A fault: the first call of a target takes another argument."""
    return lambda step: step.calls(target)[0].update_arg(index, value)


def leave_out(axis: str):
    """A fault: readers of the first all-reduce over an axis read what it takes."""

    def plant(step: StepGraph) -> None:
        launch = next(node for node in step.calls(c10d.all_reduce) if c10d.axis_of(node) == axis)
        (wait,) = launch.users
        wait.replace_all_uses_with(launch.args[0])
        step.graph.erase_node(wait)
        step.graph.erase_node(launch)

    return plant


def lies_otherwise(step: StepGraph) -> None:
    for node in step.inputs("parameter"):
        if node.meta["entry"].name == "inner.weight":
            node.meta["placements"] = {"tp": shard(0)}


PLANTED = {
    "no sum over tp": (leave_out("tp"), "ranks differ"),
    "a mean over tp": (put(c10d.all_reduce, 1, "avg"), "far"),
    "a sum over dp in its place": (put(c10d.all_reduce, 2, "dp"), "ranks differ"),
    "no mean over dp": (leave_out("dp"), "ranks differ"),
    "a scatter over dp": (put(c10d.reduce_scatter, 3, "dp"), "far"),
    "other parts": (lies_otherwise, "inner_weight has other parts"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_among_axes_is_seen(fault: str) -> None:
    plant, says = PLANTED[fault]
    step = by_columns_and_rows({"dp": 2, "tp": 2})
    plant(step)
    if says == "far":
        assert max(trained(step).values()) > 1e-3
        return
    with pytest.raises(AssertionError, match=says):
        trained(step)


def test_ranks_are_those_of_the_mesh_outermost_first() -> None:
    step = StepGraph(torch.fx.Graph(), {"dp_replicate": 2, "dp": 4, "dp_node": 2, "tp": 3})
    mesh = Mesh.of(step)
    assert (mesh.axes, mesh.nodes) == ({"dp_replicate": 2, "dp": 4, "tp": 3}, {"dp": 2})
    assert len(mesh.ranks) == 24
    assert mesh.coordinates(0) == {"dp_replicate": 0, "dp": 0, "tp": 0, "dp_node": 0}
    assert mesh.coordinates(23) == {"dp_replicate": 1, "dp": 3, "tp": 2, "dp_node": 1}
    assert mesh.coordinates(7) == {"dp_replicate": 0, "dp": 2, "tp": 1, "dp_node": 0}
    assert [mesh.data_index(rank) for rank in (0, 2, 3, 11, 12, 23)] == [0, 0, 1, 3, 4, 7]


@pytest.mark.parametrize("placement", [shard(0), shard(1), shard(1, 2), shard(0, 3), REPLICATED], ids=str)
def test_what_is_split_is_joined(placement) -> None:
    whole = torch.arange(6 * 8.0).view(6, 8)
    parts = split(whole, placement, 2)
    assert all(part.equal(whole) for part in parts) if placement == REPLICATED else join(parts, placement).equal(whole)
    assert split(torch.arange(8), shard(0, 2), 2)[1].tolist() == [2, 3, 6, 7]
    with pytest.raises(AssertionError, match="no rank knows its summand"):
        split(whole, partial(), 2)


def expected_of(target: object, sources: list[torch.Tensor], index: int) -> torch.Tensor:
    """What a collective yields for the index-th rank of a group."""
    if target in (c10d.all_gather, c10d.all_gather_coalesced):
        return torch.cat(sources)
    if target is c10d.shift:
        return sources[index - 1]
    if target is c10d.all_to_all:
        return torch.cat([source.chunk(len(sources))[index] for source in sources])
    total = torch.stack(sources).sum(0)
    return total if target in (c10d.all_reduce, c10d.all_reduce_coalesced) else total.chunk(len(sources))[index]


@pytest.mark.parametrize("target", c10d.TABLE, ids=lambda target: c10d.TABLE[target].name)
@pytest.mark.parametrize("axes", [{"dp": 4, "tp": 2}, {"dp": 2, "sp": 2, "tp": 2}], ids=str)
def test_every_collective_runs_over_every_axis(axes: dict[str, int], target, eight_ranks: None) -> None:
    """Torch's mode makes the groups of other ranks of rank 0's, which the tests above rely on."""
    mesh = Mesh(axes, {})
    own = {rank: torch.arange(8.0).view(8, 1) + 100 * rank for rank in mesh.ranks}
    groups = mesh.groups()
    for axis, size in axes.items():
        sizes = {c10d.all_to_all: ([8 // size] * size,) * 2}.get(target, ())
        if target in (c10d.all_reduce, c10d.all_reduce_coalesced):
            sizes = ("sum",)
        elif target is c10d.shift:
            index = compat_distributed.local_int({rank: mesh.coordinates(rank)[axis] for rank in mesh.ranks})
            sizes = (1, size, index)
        elif not sizes:
            sizes = ("sum", size) if "reduce" in c10d.TABLE[target].name else (size,)
        with compat_distributed.local_tensor_mode(8):
            x = compat_distributed.local_tensor(own)
            coalesced = c10d.TABLE[target].coalesced
            found = launched(target)([x] if coalesced else x, *sizes, groups[axis].group_name)
            parts = compat_distributed.local_values(c10d.wait(found[0] if coalesced else found))
        for rank in mesh.ranks:
            index = mesh.coordinates(rank)
            group = [other for other in mesh.ranks if {**mesh.coordinates(other), axis: index[axis]} == index]
            wanted = expected_of(target, [own[other] for other in group], index[axis])
            assert parts[rank].equal(wanted), f"{axis}, rank {rank}"
