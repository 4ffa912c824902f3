"""Microbatches: one rank is bit-equal to the plain loop, several ranks take the step of one large batch.

Run as a module, this file is what each rank does.
"""

import contextlib
import copy
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.capture import Inventory, capture_step
from fxzero.capture.accumulation import Accumulation
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.lifetimes import is_resting
from fxzero.cost.memory import memory_timeline
from fxzero.errors import PlanError
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import CARRIED_KINDS, num_bytes
from fxzero.recipe import captured_as, recipe
from tests.numerics.side_by_side import Values, check, first_difference, parameters, results_of, run_jobs
from tests.numerics.sparing import sharing_first_capture, verifying_less
from tests.numerics.test_precision import WIDTH, WORDS, adamw, momentum

K, ROWS, STEPS = 4, 2, 5  # 4 x 2 rows a rank are one batch of 8


class Words(nn.Module):
    """Words, a norm, a tied head, and a part that only long inputs use; optionally dropout and a running mean."""

    def __init__(self, *, noisy: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.BatchNorm1d(3 * WIDTH) if noisy else nn.LayerNorm(3 * WIDTH)
        self.drop = nn.Dropout(0.1 if noisy else 0.0)
        self.out = nn.Linear(3 * WIDTH, WIDTH)
        self.long = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x).flatten(0, 1)
        hidden = hidden + self.out(self.drop(self.norm(F.gelu(self.mix(hidden)))))
        if x.shape[1] > 6:
            hidden = hidden + self.long(hidden)
        return self.head(hidden)


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(x)
    loss = F.cross_entropy(logits, y.flatten(), ignore_index=-100)
    return loss, {"right": (logits.argmax(1) == y.flatten()).sum()}


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randint(WORDS, (2, K * ROWS, 8), generator=generator)
    return x, y


def padded(step: int, rank: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
    """Microbatches of other lengths, with how many of their labels count: other numbers on each rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    out = []
    for index in range(K):
        length = 5 + (index + step) % 3 if world() == 1 else 5 + index % 2 * 3  # of few lengths: each is a program
        x, y = torch.randint(WORDS, (2, ROWS, length), generator=generator)
        y[0, : (index + 2 * rank) % 5] = -100
        out.append((x, y))
    return out, [int((y != -100).sum()) for _, y in out]


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- one rank


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any], *, weighted: bool) -> Values:
    """The loop of torch's documentation."""
    torch.manual_seed(7)
    values: Values = {}
    for i in range(STEPS):
        x, y = batch(i, 0)
        microbatches, weights = padded(i, 0) if weighted else (list(zip(x.chunk(K), y.chunk(K), strict=True)), [])
        parts = torch.tensor(weights, dtype=torch.float32)
        losses = []
        for index, (x, y) in enumerate(microbatches):
            loss, metrics = cross_entropy(model, x, y)
            loss = loss * (parts[index] / parts.sum()) if weighted else loss / K
            loss.backward()
            losses.append(loss.detach())
            values[f"right {i} {index}"] = metrics["right"]
        values[f"loss {i}"] = torch.stack(losses).sum()
        if "clip_grad_norm" in plan:
            nn.utils.clip_grad_norm_(model.parameters(), plan["clip_grad_norm"], foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    return values | parameters(model) | dict(model.named_buffers())


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any], *, weighted: bool) -> Values:
    step = fxzero.compile(model, optimizer, fxzero.Plan(accumulate=K, **plan), loss=cross_entropy)
    torch.manual_seed(7)
    values: Values = {}
    for i in range(STEPS):
        if weighted:
            microbatches, weights = padded(i, 0)
            values[f"loss {i}"] = step(microbatches, weights=weights)
        else:
            values[f"loss {i}"] = step(*batch(i, 0))
        for index, right in enumerate(step.metrics["right"]):
            values[f"right {i} {index}"] = right
    return values | parameters(model) | dict(model.named_buffers())


@pytest.mark.parametrize(
    ("plan", "weighted"),
    [
        ({}, False),
        ({}, True),
        ({"accumulate_in": "unsharded"}, True),
        ({"clip_grad_norm": 0.2, "loss_scale": 4.0}, False),
    ],
)
def test_one_rank_is_bit_equal_to_the_plain_loop(plan: dict[str, Any], weighted: bool) -> None:
    """Dropout, running statistics, microbatches of other lengths, a parameter that only some of them use."""
    torch.manual_seed(0)
    model = Words(noisy=True)
    other = copy.deepcopy(model)
    expected = plain(other, adamw(other), plan, weighted=weighted)
    got = compiled(model, adamw(model), plan, weighted=weighted)
    assert first_difference(expected, {key: got[key] for key in expected}) == ""


# ---- two ranks and four


def forgets_first(self: Accumulation, so_far: Any, gradients: Any) -> Any:
    """A fault: the gradients of earlier microbatches are lost."""
    return dict(gradients)


def counts_whole(self: Accumulation, loss: torch.Tensor, table: Any) -> torch.Tensor:
    """A fault: weights are taken as part of this rank's own, not of all ranks'."""
    weight, weights = (table[entry.key] for entry in self.weights)
    return loss * (weight / weights.mul(1.0).sum(0, keepdim=True).squeeze(0)) if self.weighted else loss / K


@dataclass(frozen=True)
class Job:
    """A plan beside the plain loop on batches as large as all microbatches together."""

    plan: dict[str, Any]
    weighted: bool = False
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    faults: dict[str, Any] = field(default_factory=dict)  # attribute of Accumulation -> what stands in its place

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in self.plan.items()] + [self.optimizer.__name__]
        return " ".join([*words, *["weighted"] * self.weighted, *(fault.__name__ for fault in self.faults.values())])


def jobs(ranks: int) -> list[Job]:
    unsharded = {"accumulate_in": "unsharded"}
    if ranks == 4:
        hybrid = {"mesh": {"dp_replicate": 2, "dp": 2}}
        return [
            Job({"zero": 3}),
            Job({"zero": 2, **unsharded}),
            Job({"zero": 3, **hybrid, "loss_scale": "dynamic"}, weighted=True),
        ]
    found = [Job({"zero": zero}) for zero in (0, 3)]
    found += [
        Job({"zero": 1, **unsharded}),
        Job({"zero": 3, **unsharded}),
        Job({"zero": 3}, weighted=True),
        Job({"zero": 0, **unsharded}, weighted=True),
        Job({"zero": 3, "clip_grad_norm": 0.2, "bucket_bytes": 2**20, "bucket_form": "coalesced"}),
        Job({"zero": 2, "loss_scale": "dynamic"}, optimizer=momentum),
        Job({"zero": 3}, faults={"summed": forgets_first}),
        Job({"zero": 1}, weighted=True, faults={"share": counts_whole}),
    ]
    return found


def large_batches(job: Job, *, rank: int) -> Values:
    """The reference: one batch of all microbatches a step, gradients averaged over ranks by hand."""
    torch.manual_seed(0)
    model = Words()
    optimizer = job.optimizer(model)
    values: Values = {}
    for i in range(STEPS):
        if job.weighted:
            microbatches, weights = padded(i, rank)
            total = torch.tensor(float(sum(weights)))
            dist.all_reduce(total)
            loss = sum(
                F.cross_entropy(model(x), y.flatten(), ignore_index=-100, reduction="sum") * dist.get_world_size()
                for x, y in microbatches
            )
            loss = loss / total
        else:
            loss = cross_entropy(model, *batch(i, rank))[0]
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad.div_(dist.get_world_size()))
        if "clip_grad_norm" in job.plan:
            nn.utils.clip_grad_norm_(model.parameters(), job.plan["clip_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        values[f"loss {i}"] = loss.detach()
    return values | parameters(model)


def accumulated(job: Job, *, rank: int) -> Values:
    torch.manual_seed(0)
    model = Words()
    with contextlib.ExitStack() as stack:
        for name, fault in job.faults.items():
            stack.enter_context(mock.patch.object(Accumulation, name, fault))
        plan = fxzero.Plan(accumulate=K, **job.plan)
        step = fxzero.compile(model, job.optimizer(model), plan, loss=cross_entropy)
        values: Values = {}
        for i in range(STEPS):
            microbatches, weights = padded(i, rank)
            loss = step(microbatches, weights=weights) if job.weighted else step(*batch(i, rank))
            values[f"loss {i}"] = loss
        return values | parameters(model)


def main(path: str) -> None:
    references: dict[Any, Values] = {}
    captures: dict[str, Any] = {}

    def compare(job: Job, rank: int) -> str:
        key = (job.weighted, job.optimizer, job.plan.get("clip_grad_norm"))
        if key not in references:
            references[key] = large_batches(job, rank=rank)
        case = f"{job.optimizer.__name__} {job.weighted} {sorted(job.faults)}"
        with verifying_less(job.plan, broken=bool(job.faults)), sharing_first_capture(captures, case):
            return first_difference(references[key], accumulated(job, rank=rank), rtol=1e-6)

    run_jobs(path, jobs(int(os.environ["WORLD_SIZE"])), compare)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("accumulation")
    return {ranks: results_of("tests.numerics.test_accumulation", folder, ranks=ranks) for ranks in (2, 4)}


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("ranks", "job"),
    [(ranks, job) for ranks in (2, 4) for job in jobs(ranks)],
    ids=lambda value: value.name if isinstance(value, Job) else str(value),
)
def test_microbatches_take_the_step_of_one_large_batch(ranks: int, job: Job, results: dict[int, Any]) -> None:
    check(job, results[ranks], differs=bool(job.faults))


# ---- what is alive


def programs(**plan: Any) -> list[StepGraph]:
    """The first, a middle and the last program of a step, on four ranks."""
    resolved = fxzero.Plan(accumulate=3, **plan).resolve(4)
    options = captured_as(resolved)
    model = Words()
    inventory = rehearse(Inventory.of(model, adamw(model)))[0]
    out: list[StepGraph] = []
    carried: list[str] = []
    for index in range(3):
        place = options.accumulation.at(index, carried=carried)
        how = type(options)(options.precision, options.clipping, options.scaling, place)
        captured = capture_step(inventory, cross_entropy, tuple(t[:3] for t in batch(0, 0)), {}, options=how).step
        captured.mesh = dict(resolved.axes)
        carried = [name for kind, name in captured.results if kind in CARRIED_KINDS]
        out.append(recipe(resolved, backend="gloo").run(captured))
    return out


def most_unsharded(step: StepGraph) -> int:
    """The most bytes of whole gradients that are alive at once: of parameters' shapes, made for or from gradients."""
    shapes = {node.meta["entry"].shape for node in step.inputs("parameter")}
    timeline = memory_timeline(step)
    moving = [s for s in timeline.storages if not (is_resting(s.node) or s.is_scratch)]
    whole = [s for s in moving if _is_whole_gradient(s.node, shapes)]
    return max(sum(s.num_bytes for s in whole if s.start <= i <= s.end) for i in range(len(timeline.nodes)))


def _is_whole_gradient(node: Any, shapes: set[tuple[int, ...]]) -> bool:
    if node.op == "placeholder":
        return "sharding" not in node.meta
    val = node.meta["val"]
    backward = node.meta["phase"] == "backward" and isinstance(val, torch.Tensor) and "sharding" not in node.meta
    return backward and tuple(val.shape) in shapes and "all_gather" not in str(node.target)


@pytest.mark.parametrize("zero", [2, 3])
def test_shards_never_meet_a_whole_set_of_gradients(zero: int) -> None:
    """At most what is being reduced, in each of the programs: here two of the largest size, as the tied head needs."""
    sizes = sorted((p.numel() * 4 for p in Words().parameters()), reverse=True)
    for step in programs(zero=zero, bucket_bytes=0):
        assert most_unsharded(step) <= 2 * sizes[0] < sum(sizes)
        handed = [node for (kind, _), node in step.results.items() if kind in CARRIED_KINDS]
        handed += step.inputs(*CARRIED_KINDS)
        assert all(node.meta["sharding"].axis == "dp" for node in handed)
        assert sum(num_bytes(node.meta["val"]) for node in handed) <= 2 * sum(sizes) / 4 * 1.1
    whole = programs(zero=zero, bucket_bytes=0, accumulate_in="unsharded")
    assert min(map(most_unsharded, whole)) >= sum(sizes) * 0.8, "the measure sees whole gradients"


# ---- bad batches


def step_of(**plan: Any) -> fxzero.TrainStep:
    model = Words()
    return fxzero.compile(model, momentum(model), fxzero.Plan(accumulate=K, **plan), loss=cross_entropy)


def test_a_batch_that_does_not_divide() -> None:
    x, y = batch(0, 0)
    says = (
        r"accumulate=4: expected a batch whose dim 0 divides by 4, got args.0 of shape \[6, 8\]; set accumulate=3, or"
    )
    with pytest.raises(PlanError, match=says):
        step_of()(x[:6], y[:6])
    with pytest.raises(PlanError, match=r"equal dim 0, which is split, got args.1 with 4 rows beside args.0 with 8;"):
        step_of()(x, y[:4])
    with pytest.raises(PlanError, match="to be split on dim 0, got no tensor"):
        step_of()(3)


def test_a_list_of_another_length() -> None:
    with pytest.raises(PlanError, match="expected 4 microbatches, got 2; give one for each, or set accumulate=2"):
        step_of()([batch(0, 0)] * 2)
    with pytest.raises(PlanError, match="expected 4 weights, got 1"):
        step_of()(*batch(0, 0), weights=[1.0])
    with pytest.raises(PlanError, match=r"expected a list of numbers or a tensor, one weight a microbatch, got 3\.0;"):
        step_of()(*batch(0, 0), weights=3.0)


def test_the_report_counts_all_microbatches() -> None:
    step = step_of()
    step(*batch(0, 0))
    assert "zero 3 on dp=1, 4 microbatches a step" in step.report() or "one rank, 4 microbatches" in step.report()
    first, second, third, last = step.graphs
    assert second is third and first is not second and last is step.graph


def test_ranks_agree_on_the_order_of_programs_too() -> None:
    """Else one rank's second microbatch could meet the other's third, with other collectives."""
    joined = importlib.import_module("fxzero.programs").joined_text
    assert joined(("a", "b", "b", "c")) != joined(("a", "a", "b", "c"))
    assert joined(("a",)) == "a"


def test_microbatches_as_dicts_and_weights_as_tensors() -> None:
    torch.manual_seed(0)
    a, b = step_of(), step_of()
    b.model.load_state_dict(a.model.state_dict())
    microbatches, weights = padded(0, 0)
    counts = [(y != -100).sum() for _, y in microbatches]
    first = a([{"x": x, "y": y} for x, y in microbatches], weights=counts)
    assert torch.equal(first, b(microbatches, weights=torch.tensor(weights)))


if __name__ == "__main__":
    main(sys.argv[1])
