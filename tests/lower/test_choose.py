"""What a plan leaves open about its lowering: the environment, the schedule and what is installed decide."""

import argparse
from typing import Any

import pytest
import torch

import fxzero
from fxzero import compat_inductor
from fxzero.cli.options import add_plan_options, plan_of
from fxzero.errors import PlanError
from fxzero.lower import inductor
from fxzero.lower.choose import VARIABLE, with_lowering
from tests.lower.models import Decoder, tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(compat_inductor, "find_cpp_compiler", lambda: "g++")


def chosen(**keys: Any) -> str:
    return with_lowering(fxzero.Plan(**keys), CPU).lowering


def test_it_is_inductor_where_its_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == "inductor"
    monkeypatch.setattr(compat_inductor, "find_cpp_compiler", lambda: None)
    assert chosen() == "eager"


def test_it_is_eager_without_headers_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.sysconfig, "get_path", lambda name: "/nowhere")
    assert chosen() == "eager"
    with pytest.raises(PlanError, match=r"Plan\.lowering: expected the headers .* got no /nowhere/Python\.h; install"):
        fxzero.compile(model := Decoder(1), torch.optim.SGD(model.parameters()), fxzero.Plan(lowering="inductor"))


def test_a_schedule_by_costs_is_of_single_calls() -> None:
    assert chosen(schedule="cost") == "eager"


def test_what_a_plan_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    assert chosen() == "triton"
    for name in ("eager", "inductor"):
        assert chosen(lowering=name) == name


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(PlanError, match=r"\$FXZERO_LOWERING: expected 'eager' or 'inductor' or 'triton', got 'fast'"):
        chosen()


def test_the_report_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "eager")
    model = Decoder(1)
    step = fxzero.compile(model, torch.optim.SGD(model.parameters()))
    step(*tokens(0))
    assert step.plan.lowering == "eager"
    assert step.report().startswith("zero 3 on dp=1, lowering eager\n") or "one rank, lowering eager\n" in step.report()


@pytest.mark.parametrize(("backend", "expected"), [("nccl", "inductor"), ("gloo", "eager")])
def test_commands_take_gpus_to_have_a_compiler(backend: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_inductor, "find_cpp_compiler", lambda: None)
    monkeypatch.setattr(inductor.importlib.util, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    assert plan_of(parser.parse_args(["--world", "2", "--backend", backend])).lowering == expected
