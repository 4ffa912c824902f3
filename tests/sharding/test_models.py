"""Whole models split over 2 and 4 ranks, in one process, beside one rank: the loss, and every parameter's gradient."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.trace import Capture
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import placement_of, shard
from fxzero.graph.verify import verify
from fxzero.recipe import captured_as, recipe
from fxzero.sharding.hints import pin, pinned
from tests.hf.models import CASES
from tests.numerics.local_ranks import Outcome, train_ranks
from tests.sharding.machines import free_network_file

TOLERANCE = 1e-5
MODELS = ("llama", "gpt2", "qwen3", "gemma2", "t5", "bert", "vit", "mixtral")
CLIPPED = {"clip_grad_norm": 0.1}
SEED = 7

Training = tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any], Capture]

pytest.importorskip("transformers")


@functools.cache
def captured(name: str, **plan: Any) -> Training:
    """A model, SGD with a rate of 1 (the change of a parameter is its gradient), a batch, and the captured step."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = case.batch(torch.Generator().manual_seed(5))
    inventory = rehearse(Inventory.of(model, optimizer))[0]
    capture = capture_step(inventory, case.loss, (), batch, options=captured_as(Plan(**plan)))
    return model, optimizer, batch, capture


def split(name: str, tp: int, folder: Path, **plan: Any) -> StepGraph:
    """The program of one of `tp` ranks."""
    *_, capture = captured(name, **plan)
    asked = Plan(mesh={"dp": 1, "tp": tp}, zero=0, hardware=free_network_file(folder), **plan)
    step = capture.step.copy()
    step.mesh = dict(asked.axes)
    return recipe(asked, backend="fake").run(step)


def run(name: str, step: StepGraph, **plan: Any) -> Outcome:
    """One step on all ranks of a program, from the same weights and random numbers."""
    model, optimizer, batch, capture = captured(name, **plan)
    torch.manual_seed(SEED)
    return train_ranks(model, optimizer, [[batch]], Plan(zero=0), step=step, constants=capture.constants)


@functools.cache
def alone(name: str, **plan: Any) -> Outcome:
    """The same on one rank, by the captured step as it is."""
    step = captured(name, **plan)[-1].step.copy()
    step.mesh = {"dp": 1}
    return run(name, step, **plan)


def difference(name: str, found: Outcome, **plan: Any) -> float:
    """The greatest difference of losses or gradients to those of one rank, in parts of the greatest gradient."""
    expected = alone(name, **plan)
    (loss,) = expected.losses.values()
    losses = max(abs((other - loss) / loss).item() for other in found.losses.values())
    before = dict(captured(name, **plan)[0].named_parameters())
    keys = [key for key in expected.state if key[0] == "parameter"]
    greatest = max((expected.state[key] - before[key[1]]).abs().max().item() for key in keys)
    changes = max((expected.state[key] - found.state[key]).abs().max().item() for key in keys)
    return max(losses, changes / greatest)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_is_the_model(name: str, tp: int, tmp_path: Path) -> None:
    step = split(name, tp, tmp_path)
    verify(step)
    parameters = step.inputs("parameter")
    assert sum(placement_of(node, "tp").is_shard for node in parameters) > len(parameters) // 2
    assert difference(name, run(name, step)) <= TOLERANCE


def test_the_norm_of_all_gradients_is_one_ranks(tmp_path: Path) -> None:
    step = split("llama", 2, tmp_path, **CLIPPED)
    assert difference("llama", run("llama", step, **CLIPPED), **CLIPPED) <= TOLERANCE


def test_a_summand_that_is_left_out_is_seen(tmp_path: Path) -> None:
    step = split("llama", 2, tmp_path)
    for launch in step.calls(c10d.reduce_scatter):
        launch.args = (launch.args[0], "avg", *launch.args[2:])
    assert difference("llama", run("llama", step)) > 100 * TOLERANCE


def test_the_plan_that_transformers_brings_is_kept_to(tmp_path: Path) -> None:
    model, *_, capture = captured("llama")
    hints = Plan(tp=model.config.base_model_tp_plan).tp
    assert isinstance(hints, Mapping)
    asked = Plan(mesh={"dp": 1, "tp": 2}, zero=0, tp=hints, hardware=free_network_file(tmp_path))
    wanted = pinned(asked.tp, model, ranks=2)  # type: ignore[arg-type]
    step = capture.step.copy()
    step.mesh = dict(asked.axes)
    pin(step, wanted)
    step = recipe(asked, backend="fake").run(step)
    lies = {node.meta["entry"].name: placement_of(node, "tp") for node in step.inputs("parameter")}
    assert {name: lies[name] for name in wanted} == wanted
    assert lies["model.layers.1.self_attn.q_proj.weight"] == shard(0)
    assert difference("llama", run("llama", step)) <= TOLERANCE
