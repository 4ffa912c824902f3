"""What a plan may ask through torch.compile, and how it is told what it may not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero import compat_inductor
from fxzero.backend import fxzero_backend, programs
from fxzero.backend.options import read_options
from fxzero.errors import PlanError
from fxzero.lower.choose import VARIABLE
from tests.backend.models import Decoder, tokens
from tests.backend.reference import compiled, regions_interpreted

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero": 3}, r"Plan.zero: expected 0 through torch.compile, got 3; write zero=0 .* fxzero.compile\(model"),
    ({"zero": 1}, r"Plan.zero: expected 0 .*got 1"),
    ({"mesh": {"dp": 2}}, r"Plan.mesh: expected one rank through torch.compile, got 2; .*fxzero.compile"),
    ({"accumulate": 4}, r"Plan.accumulate: expected 1 .*got 4; your loop does that: call backward\(\) for each"),
    ({"clip_grad_norm": 1.0}, r"Plan.clip_grad_norm: expected None .*got 1.0; .*clip_grad_norm_ before"),
    ({"clip_grad_value": 1.0}, r"Plan.clip_grad_value: expected None .*clip_grad_value_"),
    ({"loss_scale": "dynamic"}, r"Plan.loss_scale: expected None .*got 'dynamic'; .*GradScaler"),
    ({"offload_optimizer": "host"}, r"Plan.offload_optimizer: expected 'none' .*got 'host'; this door does not see"),
    ({"offload_parameters": "host"}, r"Plan.offload_parameters: expected 'none' .*got 'host'; parameters stay"),
    ({"offload_optimizer": "host", "update_on_host": 1.0}, r"Plan.offload_optimizer: expected 'none'"),
    (
        {"compress_gathers": "int8"},
        r"Plan.compress_gathers: expected 'none' .*got 'int8'; tensors are sent",
    ),
    ({"compress_reductions": "int8"}, r"Plan.compress_reductions: expected 'none' .*tensors are sent as they are"),
    ({"cross_step": True}, r"Plan.cross_step: expected False .*a call knows of no next step"),
    ({"cuda_graph": True}, r"Plan.cuda_graph: expected False .*are launched by your loop"),
    ({"schedule": "cost"}, r"Plan.schedule: expected 'fixed' .*got 'cost'; forward and backward run when"),
    ({"schedule": "cost", "costs": "costs.json"}, r"Plan.schedule: expected 'fixed'"),
    ({"memory_budget": "1 GiB"}, r"Plan.memory_budget: expected None .*got 1073741824; the peak depends on your loop"),
    ({"memory_budget": "1 GiB", "recompute": "auto"}, r"Plan.memory_budget: expected None .*set recompute='blocks'"),
    ({"precision": "bf16"}, r"Plan.precision: expected 'fp32' .*got 'bf16'; .*torch.autocast, or cast it"),
    ({"precision": "autocast:bf16"}, r"Plan.precision: expected 'fp32' .*got 'autocast:bf16'; call the model under"),
    ({"node_size": 2}, r"Plan.node_size: expected 0 .*got 2"),
    ({"recompte": "blocks"}, r"Plan: expected a plan key, got 'recompte'.*recompute"),
    ({"lowering": "triton"}, r"Plan.lowering: "),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_this_door_cannot_give_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_options({"plan": keys})
    with pytest.raises(PlanError, match=message):
        read_options(keys)


def test_it_comes_at_the_first_call_as_it_is() -> None:
    """Not wrapped by Dynamo, nor hidden where errors are suppressed."""
    called = compiled(nn.Linear(2, 2), accumulate=2)
    for suppressed in (False, True):
        with torch._dynamo.config.patch(suppress_errors=suppressed), pytest.raises(PlanError, match=r"Plan.accumulate"):
            called(torch.ones(1, 2))
    with pytest.raises(PlanError, match=r"Plan.recompute|Plan: expected a plan key"):
        compiled(nn.Linear(2, 2), dynamic=True, recompute=True)(torch.ones(3, 2))


def test_a_plan_must_say_zero_and_keys_need_not() -> None:
    for given in ({}, {"recompute": "blocks"}, {"zero": 0}, {"mesh": {"dp": 1}}):
        assert read_options(given).plan.axes == {"dp": 1} and read_options(given).plan.zero == 0
    assert read_options({"plan": fxzero.Plan(zero=0, recompute=0.5)}).plan.recompute == 0.5
    with pytest.raises(PlanError, match=r"write zero=0 .a Plan that does not say it has 3"):
        read_options({"plan": fxzero.Plan(recompute=0.5)})


def test_a_graph_without_parameters_has_nothing_to_shard() -> None:
    plan = read_options({"plan": fxzero.Plan(regather=False, recompute=0.5)}, reads_parameters=False).plan
    assert plan.axes == {"dp": 1} and plan.zero == 0 and plan.recompute == 0.5


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_plan_may_be_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    plan = fxzero.Plan(zero=0, recompute="blocks")
    path.write_text(getattr(plan, f"to_{suffix}")())
    for given in (path, str(path)):
        assert read_options({"plan": given}).plan.recompute == "blocks"
    with pytest.raises(PlanError, match=r"Plan.load"):
        read_options({"plan": tmp_path / "plan.yaml"})


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        (
            {"plan": {}, "recompute": "blocks"},
            None,
            r"expected 'plan' or keys of a plan, got 'plan' and \['recompute'\]",
        ),
        ({"dump": 3}, None, r"'dump': expected a folder, got 3"),
        ({}, "max-autotune", r"torch.compile\(mode=..\): expected none with backend 'fxzero', got 'max-autotune'"),
        ({"plan": 3}, None, r"Plan: expected a table of keys, got 3"),
    ],
)
def test_other_options_are_checked(options: dict[str, Any], mode: str | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_options(options, mode=mode)


def test_recompute_concerns_the_graphs_that_have_such_modules() -> None:
    """A graph without blocks, as they come between graph breaks, keeps what it has."""
    called = compiled(nn.Linear(4, 4), recompute="blocks")
    called(torch.ones(2, 4)).sum().backward()
    model = Decoder(2)
    compiled(model, recompute=["layers.1", "nowhere.*"])(*tokens(0)).backward()
    again = {n.meta["module"].split(".ffn")[0] for n in programs()[-1].calls() if "addmm" in str(n.target)}
    assert {path.rpartition(".")[0] for path in again} == {"layers.1"}


def test_a_pass_may_be_disabled() -> None:
    found = []
    for disable in ((), ("recompute_pointwise",)):
        torch.compiler.reset()
        weight = torch.ones(256, 1, requires_grad=True)
        compiled(lambda w, x: (w * x).sin().exp(), disable=disable)(weight, torch.ones(256, 256)).sum().backward()
        found.append(len(programs()[-1].calls()))
    assert found[0] > found[1]


def test_the_backend_has_a_name_that_people_know() -> None:
    assert "fxzero" in fxzero_backend.__name__


@pytest.mark.parametrize("compiler", ["g++", None])
def test_what_the_options_leave_open_is_compiled_where_it_can_be(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(compat_inductor, "find_cpp_compiler", lambda: compiler)
    with regions_interpreted() as store:
        compiled(Decoder(1))(*tokens(0)).backward()
    assert bool(store.texts) == (compiler is not None)
    marked = [node for step in programs()[-2:] for node in step.calls() if "region" in node.meta]
    assert bool(marked) == (compiler is not None)


def test_the_environment_cannot_ask_for_what_this_door_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(PlanError, match=r"Plan\.lowering: expected 'eager' or 'inductor' at this door, got 'triton'"):
        compiled(Decoder(1))(*tokens(0))
