"""State that lies over tp and, beside it, as ZeRO's rows over dp: four ranks, with layouts given by hand.

Run as a module, this file is what each rank does: it appends what is not as it should be to a list.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import fxzero
from fxzero.capture import Inventory
from fxzero.graph.axis_placement import REPLICATED, Placement, shard
from fxzero.runtime.checkpoint import load_state_dict, state_dict
from fxzero.runtime.layout import Layout, Place
from fxzero.runtime.materialize import Init
from fxzero.runtime.state import StepState
from fxzero.runtime.topology import Topology
from fxzero.runtime.unsharded import unsharded
from tests.numerics.worker import launch

pytestmark = pytest.mark.multirank

RANKS = 4
GRID, TALL, WIDE = {"dp": 2, "tp": 2}, {"tp": 4}, {"dp": 4}
OTHER_ORDER = {"tp": 2, "dp": 2}
OVER_TP: dict[str, Placement] = {
    "by_rows": shard(0),  # of 20 rows: 10 or 5 a tp rank, which two dp ranks cannot share evenly
    "by_columns": shard(1),
    "bias": shard(0),
    "whole": REPLICATED,
}


class Tensors(nn.Module):
    """Parameters that lie in each way, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.by_rows = nn.Parameter(torch.empty(20, 3))
        self.by_columns = nn.Parameter(torch.empty(5, 8))
        self.bias = nn.Parameter(torch.empty(12))
        self.whole = nn.Parameter(torch.empty(7, 2))
        self.register_buffer("running", torch.zeros(4))
        reset(self)


def reset(module: nn.Module) -> None:
    """Values that tell elements apart."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters(recurse=False)):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 100 * number + 1)
        for buffer in module.buffers(recurse=False):
            buffer.fill_(7)


class Copying(torch.optim.Optimizer):
    """State that starts as the parameter, and state of shapes of its own: one that a part of the parameter has, too."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["copy"] = p.clone()
                    state["square"] = p.new_ones(p.shape[0] // 2, p.shape[-1])
                    state["count"] = torch.tensor(0.0)
                p.sub_(p.grad)


Given = dict[tuple[str, str], dict[str, Placement]]


def given() -> Given:
    """The layout of `OVER_TP`, with one state that lies otherwise than its parameter, and one of a shape of its own."""
    found: Given = {("parameter", name): {"tp": placement} for name, placement in OVER_TP.items()}
    return found | {
        ("optimizer", "by_columns:copy"): {"tp": REPLICATED},
        ("optimizer", "bias:square"): {"tp": shard(1)},
    }


def state_of(
    mesh: dict[str, int] | None,
    *,
    how: Given | None = None,
    init: Init | None = None,
    meta: bool = False,
    optimizer: Callable[[Any], torch.optim.Optimizer] = Copying,
    **keys: Any,
) -> StepState:
    """A bound state; as `how` says, or not laid out."""
    with torch.device("meta" if meta else "cpu"):
        model = Tensors()
    plan = fxzero.Plan(mesh=mesh, **keys)
    topology = Topology.of(plan, "cpu").sharing_memory() if dist.is_initialized() else Topology.of(plan, "cpu")
    shares = topology.backend == "shm" and plan.zero == 3 and plan.offload_parameters == "none"
    state = StepState(
        model,
        optimizer(model.parameters()),
        topology,
        device=torch.device("cpu"),
        init=init,
        share_rows=shares and topology.plan.axes["dp"] > 1,
    )
    if how is not None:
        state.lay_out(how)
    state.bind()
    return state


def place(state: StepState, axis: str) -> Place:
    """This rank's."""
    size = state.topology.plan.axes.get(axis, 1)
    return Place(size, state.topology.coordinate(axis) if axis in state.topology.plan.axes else 0)


def expected() -> dict[tuple[str, str], torch.Tensor]:
    """What every tensor is after `bind`."""
    model = Tensors()
    found = {("parameter", name): p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found[("optimizer", f"{name}:copy")] = p.detach()
        found[("optimizer", f"{name}:square")] = torch.ones(p.shape[0] // 2, p.shape[-1])
    return found


def layout_of(state: StepState, key: tuple[str, str], shape: torch.Size) -> Layout:
    """How an entry should lie, written down apart from `Layouts`."""
    plan, name = state.topology.plan, key[1].partition(":")[0]
    over_tp = OVER_TP[name]
    alike = key[0] == "parameter" or key[1].endswith(":copy")
    if not alike or key[1] == "by_columns:copy":
        over_tp = shard(1) if key[1] == "bias:square" else REPLICATED
    rows = alike and key[1] != "by_columns:copy" and plan.zero >= (3 if key[0] == "parameter" else 1)
    tp, dp = place(state, "tp"), place(state, "dp")
    if tp.size == 1:
        over_tp, rows = REPLICATED, alike and plan.zero >= (3 if key[0] == "parameter" else 1)
    return Layout(tuple(shape), over_tp, rows and dp.size > 1, tp, dp)


def faults_of(state: StepState, values: dict[tuple[str, str], torch.Tensor] | None = None) -> Iterator[str]:
    """What of a bound state is not as it should be: whole values, this rank's part of them, its memory."""
    values = expected() if values is None else values
    inventory = Inventory.of(state.model, state.optimizer)
    taken = {key: state.lookup(inventory, *key) for key in values}
    inventory = Inventory.of(state.model, state.optimizer)
    owned = {(kind, name): tensor for kind, name, tensor in state.named() if (kind, name) in values}
    if owned.keys() != values.keys():
        yield f"owned are {sorted(owned)}"
    for key, value in values.items():
        layout = layout_of(state, key, value.shape)
        mine = layout.memory_of_whole(value)
        tensor: Any = owned[key].detach()
        whole, local = (tensor.full_tensor(), tensor.to_local()) if isinstance(tensor, DTensor) else (tensor, tensor)
        if not torch.equal(whole, value):
            yield f"{key}: {whole.tolist()} in all"
        if not torch.equal(local, layout.local_of(mine)):
            yield f"{key}: this rank owns {local.tolist()}"
        memory = taken[key]
        rows = layout.local_of(memory)  # the padding of a meta model is NaN
        if memory.shape != mine.shape or not torch.equal(rows, layout.local_of(mine)) or not memory.is_contiguous():
            yield f"{key}: a program takes {memory.tolist()}"
        if memory.untyped_storage().nbytes() != mine.nbytes and state.topology.plan.offload_optimizer == "none":
            yield f"{key}: {memory.untyped_storage().nbytes()} bytes for {list(mine.shape)}"
    if not all(torch.equal(buffer, torch.full((4,), 7.0)) for buffer in inventory.buffers.values()):
        yield "a buffer has changed"


# ---- what ranks do; each yields what is wrong


def binds() -> Iterator[str]:
    """Each mesh, each stage that makes a difference."""
    for mesh in (GRID, TALL, OTHER_ORDER, {"dp_replicate": 2, "tp": 2}):
        for zero in (0, 1, 3) if mesh == GRID else (3,):
            yield from (f"{mesh}, zero={zero}: {fault}" for fault in faults_of(state_of(mesh, how=given(), zero=zero)))


def dtensors_lie_tp_first() -> Iterator[str]:
    """With public placements only, over one mesh."""
    state = state_of(GRID, how=given())
    parameter: Any = state.model.by_rows
    if parameter.device_mesh.mesh_dim_names != ("tp", "dp") or parameter.placements != (Shard(0), Shard(0)):
        yield f"by_rows lies as {parameter.placements} over {parameter.device_mesh}"
    parameter = state.model.by_columns
    if parameter.placements != (Shard(1), Shard(0)):
        yield f"by_columns lies as {parameter.placements}"
    copies: Any = state.optimizer.state[state.model.by_columns]["copy"]
    if copies.placements != (Replicate(), Replicate()):
        yield f"by_columns:copy lies as {copies.placements}"
    if (
        state.topology.coordinate("tp") != dist.get_rank() % 2
        or state.topology.coordinate("dp") != dist.get_rank() // 2
    ):
        yield "the last axis is not the fastest"
    mesh: Any = state.topology.state_mesh
    names = [mesh.get_group(axis).group_name for axis in ("tp", "dp")]
    if names != [state.topology.groups[axis].group_name for axis in ("tp", "dp")]:
        yield "the mesh of the state has process groups of its own"
    small = state_of(GRID, how=given(), persist_below=12)  # of bias a tp rank has 6 elements
    if small.model.bias.placements != (Shard(0), Replicate()):  # type: ignore[union-attr]
        yield f"bias lies as {small.model.bias.placements}"  # type: ignore[union-attr]


def moves_when_laid_out_late() -> Iterator[str]:
    """Bound for a checkpoint before the first program: parts of dim 0; then as the program says."""
    for keys in ({}, {"offload_optimizer": "host", "offload_parameters": "host", "offload_below": 0}):
        state = state_of(GRID, **keys)
        held = state.model.by_columns.to_local(), state.model.bias.to_local()  # type: ignore[operator, union-attr]
        if [len(part) for part in held] != [3 - 1 * (place(state, "dp").index), 3]:
            yield f"before: {[part.shape for part in held]}"
        state.lay_out(given())
        yield from faults_of(state)


def rests_on_the_host() -> Iterator[str]:
    state = state_of(GRID, how=given(), offload_optimizer="host", offload_parameters="host", offload_below=0)
    yield from faults_of(state)


def is_read_anew() -> Iterator[str]:
    """State that the user puts in place of ours: DTensors as ours, of another mesh, and whole tensors."""
    state = state_of(GRID, how=given())
    values = {key: value + 1000 * key[1].endswith(":copy") for key, value in expected().items()}
    other = state_of(WIDE, how={})
    for source in (state, other):
        saved = copy.deepcopy(source.optimizer.state_dict())
        for entries in saved["state"].values():
            entries["copy"] = entries["copy"] + 1000
        state.optimizer.load_state_dict(saved)
        yield from faults_of(state, values)
    whole = copy.deepcopy(state.optimizer.state_dict())
    for entries in whole["state"].values():
        entries["copy"] = entries["copy"].full_tensor() + 1
    state.optimizer.load_state_dict(whole)
    yield from faults_of(state, {key: value + key[1].endswith(":copy") for key, value in values.items()})


def is_written_back() -> Iterator[str]:
    state = state_of(GRID, how=given())
    with unsharded(state, writeback=True) as model:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor) or not torch.equal(parameter, expected()[("parameter", name)]):
                yield f"{name} is not the plain parameter"
            parameter.data.neg_()
    values = {key: -value if key[0] == "parameter" else value for key, value in expected().items()}
    yield from faults_of(state, values)


def fills_meta_models(folder: Path) -> Iterator[str]:
    """By `init`; and by a checkpoint, into this rank's parts alone."""
    yield from faults_of(state_of(GRID, how=given(), meta=True, init=reset))
    state = state_of(GRID, how=given(), meta=True)
    if not state.model.by_rows.to_local().isnan().all():  # type: ignore[operator, union-attr]
        yield "not NaN before the checkpoint"
    load(state, folder / "grid")
    yield from faults_of(state, changed())
    asked: list[tuple[int, ...]] = []

    def blank(shape: tuple[int, ...]) -> torch.Tensor:
        asked.append(shape)
        return torch.zeros(shape)

    state.blank_parameter("by_rows", torch.Size((20, 3)), (3, 1), blank)
    if asked != [(5, 3)]:
        yield f"memory of {asked} is asked for"


def changed() -> dict[tuple[str, str], torch.Tensor]:
    """What is saved: no tensor as `bind` leaves it."""
    return {key: value + 0.5 for key, value in expected().items()}


def save(state: StepState, folder: Path) -> None:
    with torch.no_grad():
        for _, _, tensor in state.named():
            if tensor.dim() == 2 or tensor.shape == (12,):
                tensor.add_(0.5)
    dcp.save(state_dict(state), checkpoint_id=folder)


def load(state: StepState, folder: Path) -> None:
    values = state_dict(state)
    dcp.load(values, checkpoint_id=folder)
    load_state_dict(state, values)


def saves(folder: Path) -> Iterator[str]:
    """Across layouts, also those that differ for each state; one process has saved, too."""
    save(state_of(GRID, how=given()), folder / "grid")
    save(state_of(WIDE, how={}), folder / "wide")
    for saved, meshes in (("grid", (WIDE, TALL, GRID)), ("wide", (GRID, TALL)), ("one", (GRID, TALL))):
        for mesh in meshes:
            state = state_of(mesh, how={} if mesh == WIDE else given())
            load(state, folder / saved)
            yield from (f"{saved} into {mesh}: {fault}" for fault in faults_of(state, changed()))


def run(folder: Path) -> dict[str, list[str]]:
    """All of these, in this order."""
    plain = (binds, dtensors_lie_tp_first, moves_when_laid_out_late, rests_on_the_host, is_read_anew, is_written_back)
    found = {job.__name__: list(job()) for job in plain}
    return found | {job.__name__: list(job(folder)) for job in (saves, fills_meta_models)}


def main(folder: Path) -> None:
    """One rank; rank 0 writes what all have found."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, run(folder))
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process and then four ranks have saved."""
    path = tmp_path_factory.mktemp("tensor_state")
    save(state_of(None), path / "one")
    launch("tests.numerics.test_tensor_state", str(path), ranks=RANKS, timeout_s=120)
    return path


@pytest.mark.parametrize(
    "job",
    [
        binds,
        dtensors_lie_tp_first,
        moves_when_laid_out_late,
        rests_on_the_host,
        is_read_anew,
        is_written_back,
        saves,
        fills_meta_models,
    ],
    ids=lambda job: job.__name__,
)
def test_on_four_ranks(job: Callable[..., Any], folder: Path) -> None:
    found = json.loads((folder / "found.json").read_text())
    assert {rank: faults[job.__name__] for rank, faults in enumerate(found) if faults[job.__name__]} == {}


@pytest.mark.parametrize("saved", ["grid", "wide"])
def test_one_process_loads_what_ranks_have_saved(saved: str, folder: Path) -> None:
    state = state_of(None)
    load(state, folder / saved)
    owned = {(kind, name): tensor.detach() for kind, name, tensor in state.named()}
    assert [key for key, value in changed().items() if not torch.equal(owned[key], value)] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
