"""Loss scaling: the scales, skipped steps and parameters of 200 steps are those of torch.amp.GradScaler.

Run as a module, this file is what each rank does. Overflows are planted in the batches of the last rank only.
"""

import contextlib
import copy
import sys
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxzero
import fxzero.recipe
from fxzero.capture.loss_scaling import LossScaling, Overflow
from fxzero.errors import CaptureError, GradientOverflowError, PlanError
from fxzero.graph import StepGraph
from tests.numerics.side_by_side import Values, check, first_difference, parameters, results_of, run_jobs, whole
from tests.numerics.sparing import sharing_first_capture, verifying_less
from tests.numerics.test_precision import Reader, adamw, batch, momentum

STEPS, INTERVAL = 200, 7
OVERFLOWS = {0, 3, 50, 51, 52, 120, 199}  # the first and the last step, alone and in a row


class Spiky(Reader):
    """Has a parameter whose gradient is a part of the batch, so that a single row of it can overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, features: torch.Tensor, y: torch.Tensor, spikes: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, features, y) + (self.gain * spikes).sum()


def planted_batch(step: int, rank: int) -> tuple[torch.Tensor, ...]:
    x, features, y = batch(step, rank)
    spikes = features[0, :4].clone() * 1e-3
    if step in OVERFLOWS and rank == world() - 1:
        if step % 2:
            spikes[0] = float("inf")
        else:
            features[3, 2] = float("nan")
    return x, features, y, spikes


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    out = parameters(model)
    for name, p in model.named_parameters():
        out.update({f"{name}:{key}": whole(v) for key, v in optimizer.state[p].items()})
    return out


def run_compiled(plan: dict[str, Any], build: Any, *, rank: int, steps: int) -> Values:
    torch.manual_seed(0)
    model = Spiky()
    optimizer = build(model)
    growth = {} if isinstance(plan.get("loss_scale"), float) else {"loss_scale_growth_interval": INTERVAL}
    step = fxzero.compile(model, optimizer, fxzero.Plan(**{"loss_scale": "dynamic", **growth, **plan}))
    torch.manual_seed(7 + rank)
    values: Values = {}
    for i in range(steps):
        step(*planted_batch(i, rank))
        values[f"scale {i}"] = step.metrics["loss_scale"].clone()
        values[f"skipped {i}"] = step.metrics["overflow"].clone()
        if "clip_grad_norm" in plan:
            values[f"norm {i}"] = step.metrics["grad_norm"].nan_to_num(-1.0)
    return values | state_of(model, optimizer)


def run_plain(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any], *, rank: int, steps: int
) -> Values:
    """The loop of torch's documentation, with a model that may be DDP's or FSDP2's."""
    static = isinstance(plan.get("loss_scale"), float)
    interval = {"init_scale": plan["loss_scale"], "growth_interval": 10**9} if static else {"growth_interval": INTERVAL}
    scaler = torch.amp.GradScaler("cpu", **interval)
    torch.manual_seed(7 + rank)
    values: Values = {}
    for i in range(steps):
        scale = scaler.get_scale()
        loss = model(*planted_batch(i, rank))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if "clip_grad_norm" in plan:
            norm = nn.utils.clip_grad_norm_(model.parameters(), plan["clip_grad_norm"], foreach=False)
            values[f"norm {i}"] = whole(norm).nan_to_num(-1.0)
        scaler.step(optimizer)
        scaler.update(scale if static else None)
        optimizer.zero_grad()
        values[f"scale {i}"] = torch.tensor(scale)
        values[f"skipped {i}"] = torch.tensor(float(i in OVERFLOWS)) if static else values.get(f"skipped {i}")
        if not static:
            values[f"skipped {i}"] = torch.tensor(float(scaler.get_scale() < scale))
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return values | state_of(inner, optimizer)


def decaying_momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Its first step is unlike later ones, and is skipped at first."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.5, weight_decay=0.1, foreach=False)


# ---- two ranks


def each_rank_alone() -> Any:
    """A fault: ranks do not tell each other what they found in their rows."""
    sound = fxzero.recipe.agree_on_overflow

    def run(step: StepGraph, **options: Any) -> int:
        edits = sound.run(step, **options)
        (agreed,) = (node for node in step.calls() if node.name == "overflow_max")
        launch = agreed.all_input_nodes[0]
        agreed.replace_all_uses_with(launch.all_input_nodes[0])
        step.graph.erase_node(agreed)
        step.graph.erase_node(launch)
        return edits

    return mock.patch.object(fxzero.recipe, sound.name, replace(sound, run=run))


def never_skips() -> Any:
    """A fault: the update of a step that overflowed is kept."""
    return mock.patch.object(Overflow, "select", lambda self, before, after, calls: after)


def grows_wrong() -> Any:
    """A fault: the scale grows by another factor."""
    return mock.patch.object(LossScaling, "growth_factor", 4.0)


@dataclass(frozen=True)
class Job:
    """A plan beside a loop with GradScaler: DDP's in fp32, FSDP2's in fp16."""

    plan: dict[str, Any]
    optimizer: Any = adamw
    rtol: float = 0.0
    steps: int = 60
    fault: Any = None

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in self.plan.items()] + [self.optimizer.__name__]
        return " ".join([*words, self.fault.__name__ if self.fault else ""]).strip()


def jobs() -> list[Job]:
    half = {"precision": "fp16"}
    found = [Job({"zero": zero, **precision}, steps=STEPS) for precision in ({}, half) for zero in (0, 3)]
    found += [
        Job({"zero": 1}),
        Job({"zero": 2}),
        Job({"zero": 2, **half, "reduce_dtype": "fp16"}),
        Job({"zero": 3, **half, "reduce_dtype": "fp16"}),
        Job({"zero": 3, "loss_scale": 1024.0}, optimizer=momentum),
        Job({"zero": 0}, optimizer=decaying_momentum),
        Job({"zero": 3, "precision": "fp16"}, optimizer=decaying_momentum),
        Job({"zero": 0, "clip_grad_norm": 0.5}),
        Job({"zero": 2, "clip_grad_norm": 0.5}, rtol=1e-6),
        Job({"zero": 3}, fault=each_rank_alone),
        Job({"zero": 0}, fault=never_skips),
        Job({"zero": 3}, fault=never_skips),
        Job({"zero": 1}, fault=grows_wrong),
    ]
    return found


def reference(job: Job, *, rank: int) -> Values:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model: nn.Module = Spiky()
    if "precision" in job.plan:
        reduce = torch.float16 if job.plan.get("reduce_dtype") == "fp16" else torch.float32
        policy = MixedPrecisionPolicy(torch.float16, reduce)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
        return run_plain(model, job.optimizer(model), job.plan, rank=rank, steps=job.steps)
    wrapped = nn.parallel.DistributedDataParallel(model)
    return run_plain(wrapped, job.optimizer(model), job.plan, rank=rank, steps=job.steps)


def run_job(job: Job, expected: Values, *, rank: int) -> str:
    with job.fault() if job.fault else contextlib.nullcontext():
        try:
            got = run_compiled(job.plan, job.optimizer, rank=rank, steps=job.steps)
        except GradientOverflowError as error:
            return str(error)
        return first_difference(expected, got, rtol=job.rtol)


def main(path: str) -> None:
    references: dict[str, Values] = {}
    captures: dict[str, Any] = {}

    def compare(job: Job, rank: int) -> str:
        keys = ("precision", "reduce_dtype", "loss_scale", "clip_grad_norm")
        key = str([job.steps, job.optimizer.__name__, *(job.plan.get(key) for key in keys)])
        if key not in references:
            references[key] = reference(job, rank=rank)
        case = f"{job.optimizer.__name__} {job.fault}"
        with verifying_less(job.plan, broken=job.fault is not None), sharing_first_capture(captures, case):
            return run_job(job, references[key], rank=rank)

    run_jobs(path, jobs(), compare)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return results_of("tests.numerics.test_loss_scaling", tmp_path_factory.mktemp("scaling"), ranks=2)


@pytest.mark.multirank
@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.name)
def test_two_ranks_scale_and_skip_as_grad_scaler_does(job: Job, results: list[dict[str, str]]) -> None:
    check(job, results, differs=job.fault is not None)


# ---- one rank


@pytest.mark.parametrize("plan", [{}, {"precision": "autocast:fp16"}, {"loss_scale": 8.0}, {"clip_grad_norm": 0.5}])
def test_one_rank_is_bit_equal_to_the_plain_loop(plan: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Spiky()
    if "precision" in plan:
        model.forward = torch.autocast("cpu", torch.float16)(model.forward)  # type: ignore[method-assign]
    expected = run_plain(model, adamw(model), plan, rank=0, steps=60)
    assert first_difference(expected, run_compiled(plan, adamw, rank=0, steps=60)) == ""
    assert expected["skipped 3"] == 1


class Diverges(nn.Module):
    """The gradient of `bad` is infinite, that of `good`, which stands before it, is not."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(4, 4)
        self.bad = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.good(x).sum() + self.bad.sqrt().sum()


def test_training_that_only_skips_ends_with_the_name_of_the_parameter() -> None:
    model = Diverges()
    before = copy.deepcopy(model.state_dict())
    step = fxzero.compile(model, adamw(model), fxzero.Plan(loss_scale=1.0, max_skipped_steps=6))
    for _ in range(5):
        step(torch.ones(2, 4))
    with pytest.raises(GradientOverflowError, match=r"gradient of bad: expected a finite one in 6 steps.* scale of 1;"):
        step(torch.ones(2, 4))
    assert first_difference(before, dict(model.state_dict())) == ""
    assert all(int(state["step"]) == 0 for state in step.optimizer.state.values())


def test_a_dynamic_scale_may_fall_to_1_first() -> None:
    model = Diverges()
    step = fxzero.compile(model, adamw(model), fxzero.Plan(loss_scale="dynamic", loss_scale_init=2.0**8))
    with pytest.raises(GradientOverflowError, match="20 steps were skipped"):
        for _ in range(100):
            step(torch.ones(2, 4))
    assert step.metrics["loss_scale"] == 2.0**-11  # of the 20th step


def test_the_scale_is_in_the_checkpoint() -> None:
    def fresh() -> fxzero.TrainStep:
        torch.manual_seed(0)
        model = Spiky()
        plan = fxzero.Plan(loss_scale="dynamic", loss_scale_growth_interval=INTERVAL)
        return fxzero.compile(model, adamw(model), plan)

    step, resumed, other = fresh(), fresh(), fresh()
    for i in range(5):
        step(*planted_batch(i, 0))
    saved = {key: value.clone() for key, value in step.state_dict().items()}
    assert saved["scaler.scale"] == 2.0**14 and saved["scaler.growth_tracker"] == 1
    resumed.load_state_dict(saved)
    for i in range(5, 20):
        step(*planted_batch(i, 0))
        resumed(*planted_batch(i, 0))
    assert resumed.metrics["loss_scale"] == step.metrics["loss_scale"] == 2.0**16
    other.load_state_dict({key: value for key, value in saved.items() if not key.startswith("scaler.")})
    assert other.state_dict()["scaler.scale"] == 2.0**16, "the checkpoint of a plan without a scale starts one"


class Counts(torch.optim.SGD):
    """Keeps a number of Python's as state."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda m: Counts(m.parameters(), lr=0.1), "expected a tensor on cpu.*got a Python int"),
    ],
)
def test_an_optimizer_whose_step_cannot_be_skipped_is_refused(build: Any, says: str) -> None:
    model = Spiky()
    with pytest.raises(CaptureError, match=says):
        fxzero.compile(model, build(model), fxzero.Plan(loss_scale="dynamic"))(*planted_batch(0, 0))


@pytest.mark.parametrize("precision", ["fp16", "autocast:fp16"])
def test_half_precision_asks_for_a_scale(precision: str) -> None:
    with pytest.raises(PlanError, match=r"Plan.loss_scale: expected one, with precision in fp16, got None; set loss_s"):
        fxzero.Plan(precision=precision)
    assert fxzero.Plan(precision=precision, loss_scale=1.0).loss_scale == 1.0


if __name__ == "__main__":
    main(sys.argv[1])
