"""Mixtures of experts split over ep, in one process, beside one rank: the loss, and every parameter's gradient."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.trace import Capture
from fxzero.errors import PlanError
from fxzero.graph.axis_placement import placement_of, shard
from fxzero.graph.routing_ops import check_room
from fxzero.graph.verify import verify
from fxzero.recipe import recipe
from tests.hf.models import CASES
from tests.numerics.local_ranks import Outcome, train_ranks
from tests.sharding import capacity_model
from tests.sharding.machines import free_network_file

TOLERANCE = 1e-5
SEED = 7
EXPERTS = [f"model.layers.{layer}.mlp.experts.{name}_proj" for layer in range(2) for name in ("gate_up", "down")]

Training = tuple[nn.Module, torch.optim.Optimizer, list[dict[str, Any]], Capture]

pytest.importorskip("transformers")


def made(name: str) -> tuple[nn.Module, Any]:
    """A model, and what makes a batch of it."""
    if name == "capacity":
        return capacity_model.CapacityModel(), capacity_model.batch
    if name == "dense":
        return nn.Sequential(nn.Linear(8, 8)), None
    if name.startswith("many"):  # many_2: eight experts, two for each token
        return many_experts(int(name.removeprefix("many_"))), long_batch
    model = CASES["mixtral"].model()
    if name == "auxiliary":
        model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    return model.to(torch.bfloat16) if name == "bf16" else model, CASES["mixtral"].batch


def many_experts(per_token: int) -> nn.Module:
    """A Mixtral of eight experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "attn_implementation": "sdpa"}
    experts = {"num_local_experts": 8, "num_experts_per_tok": per_token}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, use_cache=False))


def long_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of tokens, so many that experts have about as many each."""
    ids = torch.randint(512, (4, 64), generator=generator)
    return {"input_ids": ids, "labels": ids}


@functools.cache
def captured(name: str) -> Training:
    """A model, SGD with a rate of 1 (the change of a parameter is its gradient), two batches, the step of the first."""
    torch.manual_seed(0)
    model, batch = made(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(5)
    batches = [batch(generator) for _ in range(2)]
    inventory = rehearse(Inventory.of(model, optimizer))[0]
    return model, optimizer, batches, capture_step(inventory, None, (), batches[0])


def split(name: str, mesh: Mapping[str, int], folder: Path, *, zero: int = 0, **plan: Any) -> StepGraph:
    """The program of one rank of a mesh."""
    machine = {"hardware": free_network_file(folder)} | plan
    asked = Plan(mesh={"dp": 1, **mesh}, zero=zero, **machine)
    step = captured(name)[-1].step.copy()
    step.mesh = dict(asked.axes)
    return recipe(asked, backend="fake").run(step)


def run(name: str, step: StepGraph, *, zero: int = 0) -> Outcome:
    """One step on all ranks of a program, from the same weights and random numbers."""
    model, optimizer, batches, capture = captured(name)
    torch.manual_seed(SEED)
    given = [batches[: step.mesh["dp"]]]
    return train_ranks(model, optimizer, given, Plan(zero=zero), step=step, constants=capture.constants)


@functools.cache
def alone(name: str, dp: int) -> Outcome:
    """The same on whole tensors, by the captured step as it is, or with its gradients reduced over dp."""
    step = captured(name)[-1].step.copy()
    step.mesh = {"dp": dp}
    return run(name, recipe(Plan(mesh={"dp": dp}, zero=0), backend="fake").run(step))


def difference(name: str, found: Outcome, *, dp: int = 1) -> float:
    """The greatest difference of losses or gradients to those of one rank, in parts of the greatest gradient."""
    expected = alone(name, dp)
    assert len(found.losses) % dp == 0
    each = len(found.losses) // dp
    losses = max(abs(loss / expected.losses[rank // each] - 1).item() for rank, loss in found.losses.items())
    before = dict(captured(name)[0].named_parameters())
    keys = [key for key in expected.state if key[0] == "parameter"]
    greatest = max((expected.state[key] - before[key[1]]).abs().max().item() for key in keys)
    changes = max((expected.state[key] - found.state[key]).abs().max().item() for key in keys)
    return max(losses, changes / greatest)


def lies(step: StepGraph) -> dict[str, str]:
    """Name of each parameter that is split over ep -> how it lies."""
    found = {node.meta["entry"].name: placement_of(node, "ep") for node in step.inputs("parameter")}
    return {name: str(placement) for name, placement in found.items() if placement.is_shard}


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_with_room_of_their_own_are_split(ep: int, tmp_path: Path) -> None:
    step = split("capacity", {"ep": ep}, tmp_path)
    verify(step)
    assert lies(step) == {f"layers.{layer}.{name}": "S(0)" for layer in range(2) for name in ("up", "down")}
    products = [node for node in step.calls(torch.ops.aten.bmm.default) if placement_of(node, "ep") == shard(0)]
    assert [node.meta["val"].shape[0] for node in products if node.meta["phase"] == "forward"] == [4 // ep] * 4
    assert difference("capacity", run("capacity", step)) <= TOLERANCE


@pytest.mark.parametrize("zero", [0, 3])
def test_what_ep_splits_zero_shards(zero: int, tmp_path: Path) -> None:
    step = split("capacity", {"dp": 2, "ep": 2}, tmp_path, zero=zero)
    assert len(lies(step)) == 4
    assert difference("capacity", run("capacity", step, zero=zero), dp=2) <= TOLERANCE


def test_a_number_of_experts_that_ranks_do_not_divide_is_refused(tmp_path: Path) -> None:
    expected = (
        r"Plan.mesh\['ep'\], parameter layers.0.up: expected a number of experts that ep=3 divides, got 4 of shape "
    )
    with pytest.raises(PlanError, match=rf"{expected}\(4, 16, 32\); set ep to 2 or 4 in the mesh"):
        split("capacity", {"ep": 3}, tmp_path)


@pytest.mark.parametrize("mesh", [{"ep": 2}, {"ep": 4}, {"tp": 2, "ep": 2}, {"ep": 2, "sp": 2}], ids=str)
def test_experts_of_mixtral_are_split(mesh: dict[str, int], tmp_path: Path) -> None:
    step = split("mixtral", mesh, tmp_path)
    verify(step)
    assert lies(step) == dict.fromkeys(EXPERTS, "S(0)")
    assert difference("mixtral", run("mixtral", step)) <= TOLERANCE


@pytest.mark.parametrize("ep", [2, 4])
def test_losses_of_the_load_are_those_of_the_whole_batch(ep: int, tmp_path: Path) -> None:
    assert alone("auxiliary", 1).losses[0] > alone("mixtral", 1).losses[0] + 0.4
    step = split("auxiliary", {"ep": ep}, tmp_path)
    assert difference("auxiliary", run("auxiliary", step)) <= TOLERANCE


def test_tp_splits_rows_of_experts_along_their_columns(tmp_path: Path) -> None:
    step = split("mixtral", {"ep": 2, "tp": 2}, tmp_path, hardware="cpu")
    assert "no rule" not in step.remarks["split_tensors"]
    text = str(split("mixtral", {"ep": 2, "tp": 2}, tmp_path))
    assert re.search(r"f32\[48/48~ep, \d+/tp\] +(take_rows|transformers::grouped_mm_fallback)", text)


@pytest.mark.parametrize(("name", "ep"), [("mixtral", 2), ("mixtral", 4), ("bf16", 2)])
def test_rows_stay_with_their_experts_where_messages_cost(name: str, ep: int, tmp_path: Path) -> None:
    step = split(name, {"ep": ep}, tmp_path, hardware="cpu")
    verify(step)
    inside = [node for node in step.calls() if node.meta["module"].endswith("act_fn")]
    assert len(inside) >= 4 and {str(placement_of(node, "ep")) for node in inside} == {"E(0, 48 of 48)"}
    assert f"{'bf16' if name == 'bf16' else 'f32'}[48/48~ep, 96]" in str(step)
    assert difference(name, run(name, step)) <= TOLERANCE


def test_what_ep_splits_of_mixtral_zero_shards(tmp_path: Path) -> None:
    step = split("mixtral", {"dp": 2, "ep": 2}, tmp_path, zero=3)
    assert lies(step) == dict.fromkeys(EXPERTS, "S(0)")
    assert difference("mixtral", run("mixtral", step, zero=3), dp=2) <= TOLERANCE


def test_a_rank_holds_rows_for_as_many_as_it_has_room(tmp_path: Path) -> None:
    step = split("mixtral", {"ep": 2}, tmp_path, hardware="cpu", expert_room=1.9)
    verify(step)
    assert "f32[48/46~ep, 96]" in str(step) and "f32[48/48~ep" not in str(step)
    assert difference("mixtral", run("mixtral", step)) <= TOLERANCE


@pytest.mark.parametrize("mesh", [{"ep": 4}, {"dp": 2, "ep": 2}], ids=str)
def test_too_little_room_is_an_error(mesh: dict[str, int], tmp_path: Path) -> None:
    step = split("mixtral", mesh, tmp_path, hardware="cpu", expert_room=1.0)
    says = (
        r"Plan.expert_room, model.layers.\d.mlp.experts, rank \d of ep: expected at most \d+ rows .* of 48 rows over "
    )
    with pytest.raises(PlanError, match=rf"{says}.*, got \d+; set expert_room to 1.\d+ or more") as refused:
        run("mixtral", step)
    enough = float(re.search(r"to (1\.\d+) or more", str(refused.value))[1])  # type: ignore[index]
    step = split("mixtral", mesh, tmp_path, hardware="cpu", expert_room=enough)
    assert difference("mixtral", run("mixtral", step), dp=mesh.get("dp", 1)) <= TOLERANCE


def test_room_for_all_asks_nothing(tmp_path: Path) -> None:
    for room in ("all", 2.0):
        assert not split("mixtral", {"ep": 2}, tmp_path, expert_room=room).calls(check_room)


@pytest.mark.parametrize("schedule", ["fixed", "cost"])
def test_room_is_asked_for_before_any_update(schedule: str, tmp_path: Path) -> None:
    step = split("mixtral", {"dp": 2, "ep": 2}, tmp_path, zero=2, expert_room=1.5, schedule=schedule)
    (check,) = step.calls(check_room)
    calls = step.calls()
    updates = [index for index, node in enumerate(calls) if node.meta["phase"] == "update"]
    assert updates and calls.index(check) < min(updates)
