"""Products in pieces beside their collectives: the numbers of one device, launches in flight beside products."""

import copy
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import Link, known_hardware
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import placement_of
from fxzero.graph.verify import verify
from fxzero.passes.chunk_products import chunk_products, pairs_of
from fxzero.passes.split_tensors import split_tensors
from fxzero.schedule.piece_counts import Estimate
from tests.numerics.local_ranks import compile_for, train_ranks
from tests.sharding.machines import free_network
from tests.sharding.steps import step_on

aten = torch.ops.aten

WIDTH, WORDS, TOKENS = 16, 32, 16
TOLERANCE = 1e-5


class Block(nn.Module):
    """What mixes tokens, and a gated perceptron; norms before."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.out(self.q(y) * torch.sigmoid(self.k(y)).cumsum(1) + self.v(y))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Words(nn.Module):
    """A small language model that yields its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Words()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(rows: int, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(WORDS, (rows, TOKENS + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


@pytest.fixture
def machine(tmp_path: Path) -> str:
    """A machine that computes slowly, but sends slowly enough that no weight travels."""
    link = Link(0.0, 1e9)
    path = tmp_path / "machine.toml"
    path.write_text(dataclasses.replace(free_network(), node_link=link, network_link=link).to_toml())
    return str(path)


@functools.cache
def captured(rows: int) -> StepGraph:
    """A step of the small model; copy it before you change it."""
    inventory = rehearse(Inventory.of(*made()))[0]
    return capture_step(inventory, None, batch(rows), {}).step


def split(rows: int, machine: str, *, tp: int = 2) -> StepGraph:
    step = captured(rows).copy()
    step.mesh = {"dp": 1, "tp": tp}
    split_tensors.run(step, axis="tp", hardware=machine)
    return step


def in_order(step: StepGraph, *nodes: fx.Node) -> bool:
    position = step.positions()
    places = [position[node] for node in nodes]
    return places == sorted(places)


def launches(step: StepGraph, stem: str) -> list[fx.Node]:
    return [node for node in step.calls() if node.name.startswith(f"{stem}_piece_") and "piece" in node.meta]


def node_named(step: StepGraph, name: str) -> fx.Node:
    return next(node for node in step.calls() if node.name == name)


# ---- numbers


def trained(plan: Plan, rows: int) -> tuple[StepGraph, Any]:
    model, optimizer = made()
    step = compile_for(model, optimizer, batch(rows), plan)
    parts = plan.axes.get("dp", 1)
    steps = [[batch(rows, 10 * number + index) for index in range(parts)] for number in range(2)]
    return step, train_ranks(model, optimizer, steps, plan, step=step)


def on_one_device(rows: int, parts: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, optimizer = copy.deepcopy(made())
    losses = []
    for number in range(2):
        optimizer.zero_grad()
        each = [model(*batch(rows, 10 * number + index)) for index in range(parts)]
        (torch.stack(each).sum() / parts).backward()
        optimizer.step()
        losses = [float(loss.detach()) for loss in each]
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("rows", "chunks", "mesh", "keys"),
    [
        (1, 2, {"tp": 2}, {}),
        (1, 8, {"tp": 2}, {}),
        (3, 3, {"tp": 2}, {}),  # pieces of whole rows
        (3, 4, {"tp": 2}, {}),  # pieces of tokens of each row
        (1, 4, {"tp": 4}, {"recompute": "blocks"}),
        (1, 2, {"dp": 2, "tp": 2}, {"zero": 3}),
        (1, 2, {"sp": 2, "tp": 2}, {}),
        (1, 2, {"tp": 2}, {"schedule": "cost"}),
    ],
    ids=str,
)
def test_ranks_make_the_steps_of_one_device(
    rows: int, chunks: int, mesh: dict[str, int], keys: dict[str, Any], machine: str
) -> None:
    plan = Plan(mesh={"dp": 1} | mesh, **({"zero": 0, "hardware": machine, "lowering": "eager"} | keys))
    _, whole = trained(plan, rows)
    step, pieces = trained(plan.replace(tp_chunks=chunks), rows)
    assert sum("piece" in node.meta for node in step.calls()) >= 4 * chunks
    losses, parameters = on_one_device(rows, mesh.get("dp", 1))
    assert [pieces.losses[index * mesh["tp"]].item() for index in range(mesh.get("dp", 1))] == pytest.approx(losses)
    for name, expected in parameters.items():
        assert torch.allclose(pieces.state[("parameter", name)], expected, rtol=TOLERANCE, atol=TOLERANCE), name
    for key, expected in whole.state.items():
        assert torch.allclose(pieces.state[key], expected, rtol=TOLERANCE, atol=TOLERANCE), key


# ---- the graph


@pytest.mark.parametrize(("rows", "chunks"), [(1, 2), (1, 8), (3, 3), (3, 2)])
def test_all_collectives_beside_products_are_cut_once(rows: int, chunks: int, machine: str) -> None:
    step = split(rows, machine)
    pairs = pairs_of(step)
    before = verify(step)
    assert chunk_products.run(step, chunks=chunks) == len(pairs) >= 9
    verify(step, before=before)
    assert sum("piece" in node.meta for node in step.calls()) == chunks * len(pairs)
    text = str(step)
    assert chunk_products.run(step, chunks=chunks) == 0 and str(step) == text


def test_products_that_read_one_gather_share_its_pieces_which_are_all_under_way(machine: str) -> None:
    step = split(1, machine)
    gathered = next(pair for pair in pairs_of(step) if len(pair.products) == 3)
    names, lies = [node.name for node in gathered.products], [node.meta["placements"] for node in gathered.products]
    chunk_products.run(step, chunks=4)
    pieces = launches(step, gathered.launch.name)
    assert [node.meta["because"].split(":")[0] for node in pieces] == [f"piece {n} of 4" for n in range(1, 5)]
    waits = [next(iter(node.users)) for node in pieces]
    products = [[node_named(step, f"{name}_piece_{number}") for name in names] for number in range(4)]
    order = [node for wait, made in zip(waits, products, strict=True) for node in (wait, *made)]
    assert in_order(step, *pieces, *order)
    assert all(c10d.is_wait(wait) for wait in waits)
    for name, lie in zip(names, lies, strict=True):
        joined = node_named(step, f"{name}_joined")
        assert joined.meta["placements"] == lie and joined.meta["because"] == "rows of 4 pieces in order"


def test_a_piece_is_sent_before_the_product_of_the_next_is_made(machine: str) -> None:
    step = split(1, machine)
    scattered = next(pair for pair in pairs_of(step) if pair.launch.target is c10d.reduce_scatter)
    (product,), part = scattered.products, scattered.wait.name
    lie, because = scattered.wait.meta["placements"], scattered.wait.meta["because"]
    chunk_products.run(step, chunks=4)
    pieces = launches(step, scattered.launch.name)
    products = [node_named(step, f"{product.name}_piece_{number}") for number in range(4)]
    waits = [next(iter(node.users)) for node in pieces]
    order = [node for pair in zip(products, pieces, strict=True) for node in pair]
    assert in_order(step, *order, *waits)
    assert all(placement_of(node, "tp").is_partial for node in products)
    joined = node_named(step, f"{part}_joined")
    assert joined.meta["placements"] == lie and joined.meta["because"] == f"{because}; rows of 4 pieces in order"


def test_a_gradient_of_a_weight_stays_whole_and_backward_keeps_pieces(machine: str) -> None:
    step = split(1, machine)
    gradients = {name: node.target for name, node in step.gradients().items()}
    shapes = {name: tuple(node.meta["val"].shape) for name, node in step.gradients().items()}
    chunk_products.run(step, chunks=2)
    assert {name: node.target for name, node in step.gradients().items()} == gradients
    assert {name: tuple(node.meta["val"].shape) for name, node in step.gradients().items()} == shapes
    kept = [n for n in step.phase("forward") if c10d.is_wait(n) and "tp_whole_piece" in n.name]
    again = [user for node in kept for user in node.users if user.meta["phase"] == "backward"]
    assert len(kept) >= 8 and len(again) >= 8
    wholes = [n for n in step.phase("backward") if "reads it whole: rows of 2 pieces" in n.meta.get("because", "")]
    assert wholes and not any("reads it whole" in n.meta.get("because", "") for n in step.phase("forward"))


def test_a_product_that_is_a_gradient_reads_what_was_gathered_whole(machine: str) -> None:
    step = split(1, machine)
    gathered = next(pair for pair in pairs_of(step) if len(pair.products) == 3)
    gathered.products[1].meta["grad_of"] = ("layers.0.k.weight",)
    found = next(pair for pair in pairs_of(step) if pair.launch is gathered.launch)
    assert found.products == (gathered.products[0], gathered.products[2])
    assert gathered.products[1] in itertools.chain(*found.others.values())
    scattered = next(pair for pair in pairs_of(step) if pair.launch.target is c10d.reduce_scatter)
    scattered.products[0].meta["grad_of"] = ("layers.0.out.weight",)
    assert all(pair.launch is not scattered.launch for pair in pairs_of(step))


# ---- what is asked for


def test_pieces_that_divide_no_rows_are_refused_and_those_that_do_are_named(machine: str) -> None:
    with pytest.raises(PlanError) as caught:
        chunk_products.run(split(1, machine), chunks=3)
    expected = (
        "Plan.tp_chunks: expected a number of pieces that divides the rows of a rank (8), got 3; take 2 or 4 or 8"
    )
    assert str(caught.value) == expected


def test_where_no_product_stands_beside_a_collective_it_is_told() -> None:
    step = captured(1).copy()
    assert chunk_products.run(step, chunks=2) == 0
    told = "no product stands beside a gather or a reduce-scatter of values in parts"
    assert step.remarks["chunk_products"] == told


@pytest.mark.parametrize("by_cost", [False, True])
def test_auto_cuts_what_is_predicted_to_pay(by_cost: bool) -> None:
    pytest.importorskip("transformers")
    whole = step_on(1, tp=8, rows=4, tokens=2048)
    split_tensors.run(whole, axis="tp", hardware="h100")
    estimate, step = Estimate(known_hardware("h100"), by_cost=by_cost), whole.copy()
    edits = chunk_products.run(step, chunks="auto", by_cost=by_cost, hardware="h100")
    assert 0 < edits <= len(pairs_of(whole))
    assert estimate.seconds(step) < 0.99 * estimate.seconds(whole)
    first, *lines = step.remarks["chunk_products"].splitlines()
    assert f"; {estimate.seconds(step) * 1e3:.3f} ms a step by the model of costs, " in first and lines
    uniform = []
    for count in (2, 4, 8):
        trial = whole.copy()
        chunk_products.run(trial, chunks=count)
        uniform.append(estimate.seconds(trial))
    assert estimate.seconds(step) <= min(uniform) * (1 + 1e-9)


def test_auto_leaves_whole_what_pieces_make_slower(tmp_path: Path) -> None:
    """Where a launch takes as long as a message."""
    pytest.importorskip("transformers")
    machine = dataclasses.replace(known_hardware("h100"), launch_s=1e-3)
    path = tmp_path / "slow.toml"
    path.write_text(machine.to_toml())
    step = step_on(1, tp=8, rows=4, tokens=2048)
    split_tensors.run(step, axis="tp", hardware="h100")
    assert chunk_products.run(step, chunks="auto", hardware=str(path)) == 0
