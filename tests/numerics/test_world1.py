"""One process: after 12 steps everything is bit-equal to the plain PyTorch loop; each planted fault is seen."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import fxzero
from fxzero.capture import Inventory
from fxzero.errors import VerifyError
from fxzero.graph import StepGraph
from fxzero.runtime.state import StepState
from tests.numerics import reference
from tests.numerics.models import Case, all_cases, clipped_cases, rarer_cases
from tests.numerics.reference import first_difference, num_programs, planted, run_compiled, run_plain

CASES = all_cases()
RARER = rarer_cases()
CLIPPED = clipped_cases()
capture_signature = importlib.import_module("fxzero.capture.signature")


def check(case: Case) -> None:
    """fxzero and the plain loop agree to the bit, with no program too many."""
    got, step = run_compiled(case, fxzero.Plan())
    difference = first_difference(run_plain(case), got)
    assert difference is None, str(difference)
    assert num_programs(step) == case.captures


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bit_equal_to_the_plain_loop(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CLIPPED.values(), ids=CLIPPED)
def test_clipped_steps_are_bit_equal_too(case: Case) -> None:
    check(case)
    loose = run_plain(case.but(clip={}, steps=3)).values
    assert bool(case.clip.get("clip_grad_norm", 0) > 1e3) == torch.equal(
        run_plain(case.but(steps=3)).values["parameter block.mix.weight"], loose["parameter block.mix.weight"]
    ), "clipping that clips nothing"


@pytest.mark.parametrize("case", RARER.values(), ids=RARER)
def test_rarer_things_are_bit_equal_too(case: Case) -> None:
    check(case)


# ---- the same comparison finds planted faults


@pytest.mark.parametrize(
    ("name", "fault", "label"),
    [
        ("one_cycle_sgd", reference.double_gradient, "loss 1"),
        # Adam divides the factor out, up to its eps: a last bit of some loss may come before the state
        ("adam", reference.double_gradient, ("state", "loss")),
        ("adam", reference.drop_dropout, "loss 0"),
        ("adam", reference.untie, "loss 1"),
        ("adam", reference.keep_buffers, "buffer block.norm.running_mean"),
        ("groups", reference.ignore_decay, "loss"),
    ],
)
def test_a_fault_in_the_graph_is_seen(name: str, fault: Callable[[StepGraph], int], label: Any) -> None:
    with planted(fault):
        got, _ = run_compiled(CASES[name], fxzero.Plan())
    difference = first_difference(run_plain(CASES[name]), got)
    assert difference is not None and difference.label.startswith(label)


def test_a_skipped_update_is_seen_by_the_verifier_and_by_the_comparison() -> None:
    case = CASES["adam"]
    with planted(reference.skip_update), pytest.raises(VerifyError, match="gradients"):
        run_compiled(case, fxzero.Plan())
    with planted(reference.skip_update, verified=False):
        got, _ = run_compiled(case, fxzero.Plan())
    difference = first_difference(run_plain(case), got)
    assert difference is not None and difference.label == "loss 1"


def test_a_frozen_learning_rate_is_seen() -> None:
    look_up, first = StepState.lookup, {}

    def stale(self: StepState, inventory: Any, kind: str, name: str) -> Any:
        value = look_up(self, inventory, kind, name)
        return first.setdefault(name, value) if kind == "hyperparameter" else value

    with mock.patch.object(StepState, "lookup", stale):
        got, _ = run_compiled(CASES["one_cycle_sgd"], fxzero.Plan())
    difference = first_difference(run_plain(CASES["one_cycle_sgd"]), got)
    assert difference is not None and difference.label.startswith("loss")


def test_a_program_that_outlives_an_attribute_is_seen() -> None:
    with mock.patch.object(Inventory, "attributes", {}):
        got, step = run_compiled(CASES["attributes"], fxzero.Plan())
    assert num_programs(step) == 1
    difference = first_difference(run_plain(CASES["attributes"]), got)
    assert difference is not None and difference.label == "loss 3"


@pytest.mark.parametrize(("name", "part"), [("train_and_eval", "training"), ("two_paths", "batch")])
def test_a_program_that_outlives_its_signature_is_seen(name: str, part: str) -> None:
    of = capture_signature.Signature.of

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(of(*args, **kwargs), **{part: ()})

    with mock.patch.object(capture_signature.Signature, "of", forgetful):
        got, step = run_compiled(CASES[name], fxzero.Plan())
    assert num_programs(step) == 1
    difference = first_difference(run_plain(CASES[name]), got)
    assert difference is not None and difference.label.startswith("loss")


def test_a_random_state_left_elsewhere_is_seen() -> None:
    expected, (got, _) = run_plain(CASES["adam"]), run_compiled(CASES["adam"], fxzero.Plan())
    got.values["random state"] = torch.roll(got.values["random state"], 1)
    difference = first_difference(expected, got)
    assert difference is not None and difference.label == "random state"


def test_a_difference_says_where_and_by_how_much() -> None:
    expected, (got, _) = run_plain(CASES["adam"]), run_compiled(CASES["adam"], fxzero.Plan())
    got.values["parameter block.mix.weight"][3, 4] += 0.25
    difference = first_difference(expected, got)
    assert difference is not None and abs(difference.amount - 0.25) < 1e-6
    assert str(difference).startswith("parameter block.mix.weight: expected ") and "at 55 of 289" in str(difference)
    got.values["parameter block.mix.weight"][3, 4] -= 0.25
    assert first_difference(expected, got, rtol=1e-6) is None
