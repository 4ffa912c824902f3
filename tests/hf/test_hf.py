"""Models of `transformers`: captured in one process; trained by two ranks under ZeRO-3 as DDP trains them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxzero
from fxzero.cost.memory import memory_profile
from fxzero.errors import CaptureError
from tests.hf.models import CASES
from tests.hf.worker import FAULT, build
from tests.numerics.reference import num_programs
from tests.numerics.sparing import sharing_first_capture
from tests.numerics.worker import launch

TOLERANCE = 1e-5
TIMEOUT_S = 800
CAPTURED = [name for name, case in CASES.items() if not case.refused]
REFUSED = [name for name, case in CASES.items() if case.refused]

Results = tuple[dict[str, list[dict[str, Any]]], str]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_with_its_reason(name: str) -> None:
    case = CASES[name]
    model, optimizer = build(case, rank=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = fxzero.compile(model, optimizer, fxzero.Plan(), loss=case.loss)
    with pytest.raises(CaptureError) as error:
        step(**case.batch(torch.Generator().manual_seed(5)))
    check_reason(name, str(error.value))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not optimizer.state


def test_padding_may_come_and_go_without_another_capture() -> None:
    """The graph for a batch with a mask holds whatever the mask says."""
    case = CASES["llama_padded"]
    model, optimizer = build(case, rank=0)
    step = fxzero.compile(model, optimizer, fxzero.Plan())
    batch = case.batch(torch.Generator().manual_seed(5))
    for last in (12, 9, 12, 5):
        mask = (torch.arange(12) < torch.tensor([[12], [last]])).long()
        batch = {**batch, "attention_mask": mask}
        expected = case.train(model, batch).detach()
        torch.testing.assert_close(step(**batch), expected, rtol=0, atol=TOLERANCE)
    assert num_programs(step) == 1


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank found, by case, and why the run ended early, if it did."""
    path, failure = tmp_path_factory.mktemp("hf") / "results.json", ""
    try:
        launch("tests.hf.worker", str(path), ranks=2, timeout_s=TIMEOUT_S)
    except AssertionError as error:
        failure = str(error)
    return (json.loads(path.read_text()) if path.exists() else {}), failure


def found_by_ranks(name: str, two_ranks: Results) -> list[dict[str, Any]]:
    results, failure = two_ranks
    assert name in results, f"not run: {failure}"
    for rank, found in enumerate(results[name]):
        assert not found["error"], f"rank {rank}: {found['error']}"
    return results[name]


@pytest.mark.multirank
@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("name", CAPTURED)
def test_first_loss_in_one_process_is_that_of_the_plain_loop(name: str, two_ranks: Results) -> None:
    (found,) = [found["alone"] for found in found_by_ranks(name, two_ranks) if found["alone"]]
    assert not found["error"], found["error"]
    assert not found["refused"], found["refused"]
    assert found["difference"] == 0
    assert found["programs"] == 1


@pytest.mark.multirank
@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("name", CAPTURED)
def test_two_ranks_under_zero_3_train_as_ddp_does(name: str, two_ranks: Results) -> None:
    for rank, found in enumerate(found_by_ranks(name, two_ranks)):
        assert not found["refused"], f"rank {rank}: {found['refused']}"
        assert found["difference"] <= TOLERANCE, f"rank {rank}: losses differ by {found['difference']}"
        assert found["parameter_difference"] <= TOLERANCE, f"rank {rank}: by {found['parameter_difference']}"
        assert found["programs"] == 1
        assert found["sharded"] > 0


@pytest.mark.multirank
@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("name", REFUSED)
def test_two_ranks_refuse_for_the_same_reason(name: str, two_ranks: Results) -> None:
    for found in found_by_ranks(name, two_ranks):
        check_reason(name, found["refused"])


@pytest.mark.multirank
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_a_doubled_gradient_is_seen(two_ranks: Results) -> None:
    for rank, found in enumerate(found_by_ranks(FAULT, two_ranks)):
        assert found["difference"] > 10 * TOLERANCE, f"rank {rank}: losses differ by only {found['difference']}"


def check_reason(name: str, message: str) -> None:
    for part in CASES[name].refused:
        assert part in message, f"{part!r} is not in {message!r}"


def test_every_model_has_its_line_in_the_docs() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    missing = [name for name in CASES if f"| `{name}` |" not in table]
    assert not missing, f"docs/models.md has no line for {missing}"


@pytest.mark.parametrize("name", ["gpt2", "llama_lora"])
def test_recompute_by_budget_is_bit_equal_to_keeping_everything(name: str) -> None:
    case = CASES[name]
    captures: dict[str, Any] = {}

    def train(**plan: Any) -> tuple[list[torch.Tensor], fxzero.TrainStep]:
        model, optimizer = build(case, rank=0)
        step = fxzero.compile(model, optimizer, fxzero.Plan(**plan), loss=case.loss)
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(100)
        with sharing_first_capture(captures, name):
            losses = [step(**case.batch(generator)) for _ in range(3)]
        return [*losses, *(p.detach() for p in model.parameters())], step

    kept, step = train()
    most, least = (memory_profile(s.graph).peak_bytes for s in (step, train(recompute="blocks")[1]))
    budget = (most + least) // 2
    values, step = train(recompute="auto", memory_budget=budget)
    assert memory_profile(step.graph).peak_bytes <= budget < most
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
