"""A step in one CUDA graph, on a stand-in that replays on the CPU: what is read where, and when it is captured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero import compat
from fxzero.errors import LoweringError, PlanError
from fxzero.graph import ops
from fxzero.runtime.cuda_graph import graph_calls
from fxzero.runtime.graphed_program import GraphedProgram, Numbers
from tests.lower.interpreted import interpreted
from tests.numerics.models import all_cases, clipped_cases, rarer_cases
from tests.numerics.reference import first_difference, num_programs, run_compiled, run_plain
from tests.runtime.graph_stand_in import StandIn, graphs_on_the_cpu

PLAN = fxzero.Plan(cuda_graph=True)
ALL = {**all_cases(), **rarer_cases(), **clipped_cases()}
# a schedule, several programs and state that the host computes, metrics of state, a Python number as state, clipping
NAMES = ("one_cycle_adamw", "asgd", "metrics_of_state", "third_party", "clip_norm2")
CASES = {name: ALL[name] for name in NAMES}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_are_bit_equal_to_the_plain_loop(case: Any) -> None:
    with graphs_on_the_cpu() as calls:
        got, step = run_compiled(case, PLAN)
    difference = first_difference(run_plain(case), got)
    assert difference is None, str(difference)
    assert num_programs(step) == case.captures
    assert sum(graph.num_replays for graph in calls.captured) == case.steps - case.captures, "the first run is eager"


def test_regions_are_captured_too() -> None:
    case = ALL["adamw"].but(steps=4)
    with interpreted() as store, graphs_on_the_cpu():
        got, step = run_compiled(case, PLAN.replace(lowering="inductor"))
    difference = first_difference(run_plain(case), got)
    assert difference is None, str(difference)
    assert store.texts and '"number"' not in "".join(store.texts), "regions read numbers at addresses"
    assert "one CUDA graph" in step.report() and " regions of " in step.report()


class Net(nn.Module):
    """A layer with dropout behind it."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.lin = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.lin(x), self.drop).square().mean()


def loss_with_metric(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The largest of the batch is a metric."""
    return model(x), {"largest": x.amax()}


def compiled(optimizer: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> fxzero.TrainStep:
    torch.manual_seed(0)
    model = Net()
    loss = options.pop("loss", None)
    return fxzero.compile(model, optimizer(model.parameters(), **{"lr": 1e-2, **options}), PLAN, loss=loss)


def batch(index: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(index))


def program_of(step: fxzero.TrainStep) -> GraphedProgram:
    program = step._last[-1].program
    assert isinstance(program, GraphedProgram)
    return program


def test_what_a_step_returned_is_not_written_over_by_the_next() -> None:
    with graphs_on_the_cpu():
        step = compiled(loss=loss_with_metric)
        returned = [(step(batch(i)), step.metrics["largest"]) for i in range(5)]
    before = [(loss.item(), largest.item()) for loss, largest in returned]
    assert [largest for _, largest in before] == [batch(i).amax().item() for i in range(5)]
    assert len({loss for loss, _ in before}) == 5


def test_a_graph_is_captured_at_the_second_call_and_the_report_says_so() -> None:
    with graphs_on_the_cpu() as calls:
        step = compiled()
        step(batch(0))
        assert not calls.captured and "one CUDA graph, to be captured at call 2" in step.report()
        for index in range(3):
            step(batch(index))
        assert "one CUDA graph, captured at call 2, 3 replays, pool 3.00 MiB\n" in step.report()


def test_a_graph_reads_a_copy_of_the_batch_and_leaves_the_batch_alone() -> None:
    given = [batch(index) for index in range(4)]
    with graphs_on_the_cpu():
        step = compiled(loss=loss_with_metric)
        seen = []
        for x in given:
            step(x)
            seen.append(step.metrics["largest"].item())
    assert seen == [batch(i).amax().item() for i in range(4)]
    assert all(torch.equal(x, batch(index)) for index, x in enumerate(given))


@pytest.mark.parametrize("kind", ["parameter", "optimizer"])
def test_state_that_has_moved_is_captured_again(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A user's new tensor is read and written, not the memory of the old one."""

    def train(plan: fxzero.Plan) -> tuple[list[float], list[torch.Tensor], fxzero.TrainStep]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = fxzero.compile(model, optimizer, plan)
        losses = []
        for index in range(6):
            if index == 3 and kind == "parameter":
                old, model.lin.weight = model.lin.weight, nn.Parameter(model.lin.weight.detach() * 2)
                optimizer.param_groups[0]["params"][0] = model.lin.weight
                optimizer.state[model.lin.weight] = optimizer.state.pop(old)
            elif index == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            losses.append(step(batch(index)).item())
        return losses, [p.detach().clone() for p in model.parameters()], step

    with graphs_on_the_cpu() as calls, caplog.at_level(logging.INFO, "fxzero"):
        losses, parameters, step = train(PLAN)
    expected, wanted, _ = train(fxzero.Plan())
    assert losses == expected and all(map(torch.equal, parameters, wanted))
    assert [graph.num_replays for graph in calls.captured] == [2, 3]
    said = [record.getMessage() for record in caplog.records if "captured again" in record.getMessage()]
    assert len(said) == 1 and f"{kind} lin.weight" in said[0]
    assert "captured at call 4, captured 2 times, 5 replays" in step.report()
    assert program_of(step).num_captures == 2


def test_numbers_are_sent_anew_at_each_step_and_stand_apart() -> None:
    with graphs_on_the_cpu() as calls:
        step = compiled(torch.optim.SGD)
        for index in range(4):
            step.optimizer.param_groups[0]["lr"] = 0.1 * (index + 1)
            step(batch(index))
    assert [sent[0] for sent in calls.sent] == [-0.1 * (i + 1) for i in range(4)], "SGD adds -lr times the gradient"
    names = [node.name for node in step.graph.calls(ops.on_device)]
    numbers = Numbers(step.graph, StandIn())
    assert [*numbers.tensors] == names
    assert all(tensor.data_ptr() % 16 == 0 for tensor in numbers.tensors.values())


def test_dropout_draws_anew_at_each_replay() -> None:
    with graphs_on_the_cpu():
        model = Net(drop=0.5)
        step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.0), PLAN)
        losses = [step(batch(0)).item() for _ in range(4)]
    assert len({*losses}) == 4


# ---- what is refused


def test_a_call_that_cannot_be_captured_is_named_and_nothing_has_run() -> None:
    with graphs_on_the_cpu(refused=torch.ops.aten.addmm.default):
        step = compiled()
        step(batch(0))
        before = copy.deepcopy((step.model.state_dict(), step.optimizer.state_dict()))
        said = (
            r"CUDA graph, %addmm, forward of lin: expected calls that can be captured, got RuntimeError: CUDA error: "
            r"operation not permitted when stream is capturing; take the call out of the step, or set cuda_graph=False"
        )
        with pytest.raises(LoweringError, match=said):
            step(batch(1))
    after = step.model.state_dict(), step.optimizer.state_dict()
    for old, new in zip(flat(before), flat(after), strict=True):
        assert torch.equal(torch.as_tensor(old), torch.as_tensor(new))


def flat(tree: Any) -> list[Any]:
    leaves = (leaf for _, leaf in compat.flatten_with_path(tree)[0])
    return [leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, float, int))]


def test_the_error_behind_the_end_of_a_capture_is_the_first_one() -> None:
    """CUDA's own end of a failed capture raises an error of its own, which says nothing."""
    with graphs_on_the_cpu(refused=torch.ops.aten.addmm.default) as calls:
        capture = calls.capture

        def ending_badly(run: Any) -> Any:
            try:
                return capture(run)
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        calls.capture = ending_badly  # type: ignore[method-assign]
        step = compiled()
        step(batch(0))
        with pytest.raises(LoweringError, match=r"%addmm, forward of lin: .*operation not permitted"):
            step(batch(1))


def test_a_device_without_graphs_is_refused_before_anything_is_traced() -> None:
    model = Net()
    with pytest.raises(PlanError, match=r"Plan.cuda_graph: expected a model on cuda, got one on cpu; move the model"):
        fxzero.compile(model, torch.optim.SGD(model.parameters()), PLAN)
    for backend in ("gloo", "shm"):
        with pytest.raises(PlanError, match=rf"Plan.cuda_graph: expected collectives over nccl, got {backend};"):
            graph_calls(PLAN, torch.device("cuda"), backend=backend)
    assert graph_calls(fxzero.Plan(), torch.device("cpu"), backend="gloo") is None


def test_an_optimizer_that_takes_numbers_as_numbers_is_named() -> None:
    with graphs_on_the_cpu(), pytest.raises(PlanError, match=r"%addmm.* \(aten::addmm\) in update of up.weight"):
        run_compiled(ALL["muon"], PLAN)


def test_calls_of_one_graph_are_not_recorded() -> None:
    with graphs_on_the_cpu():
        step = compiled()
        with pytest.raises(PlanError, match=r"step.record\(...\): expected calls that run one by one, got one CUDA"):
            step.record(batch(0))
