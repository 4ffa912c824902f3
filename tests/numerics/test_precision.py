"""Low precision: two ranks are bit-equal to FSDP2 with the same policy, one to the plain loop under autocast.

Run as a module, this file is what each rank does.
"""

import contextlib
import copy
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
from fxzero.capture import CaptureOptions, Inventory, capture_step
from fxzero.capture.precision import Precision
from fxzero.cost.memory import memory_profile
from fxzero.errors import CaptureError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import num_bytes
from fxzero.recipe import recipe
from tests.numerics.side_by_side import Values, check, first_difference, parameters, results_of, run_jobs
from tests.numerics.sparing import sharing_first_capture, verifying_less

STEPS, WORDS, WIDTH = 20, 51, 16


class Reader(nn.Module):
    """Words and a floating input; a norm, dropout, a buffer, a tied head; 51 rows divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(3 * WIDTH)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("places", torch.linspace(-1, 1, WIDTH))

    def forward(self, x: torch.Tensor, features: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x) * 0.3 + features + self.places.to(features.dtype)
        hidden = hidden + self.out(self.drop(self.norm(F.gelu(self.mix(hidden)))))
        return F.cross_entropy(self.head(hidden), y)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """foreach=False: the form that fxzero traces."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)


def batch(step: int, rank: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randint(WORDS, (2, 8), generator=generator)
    return x, torch.randn(8, WIDTH, generator=generator), y


def run(step: Callable[..., torch.Tensor], model: nn.Module, *, rank: int) -> Values:
    """Losses of all steps and parameters after them."""
    torch.manual_seed(7 + rank)
    losses = {f"loss {i}": step(*batch(i, rank)).detach().clone() for i in range(STEPS)}
    return losses | parameters(model)


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., torch.Tensor]:
    def step(*args: torch.Tensor) -> torch.Tensor:
        loss = model(*args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


# ---- two ranks


@dataclass(frozen=True)
class Job:
    """A plan beside a policy of FSDP2; `equal` is whether the two mean the same."""

    plan: dict[str, Any]
    reduce_dtype: torch.dtype = torch.float32
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    keeps_norm: bool = False
    equal: bool = True
    faults: dict[str, Any] = field(default_factory=dict)  # attribute of Precision -> what stands in its place

    @property
    def name(self) -> str:
        """A test's id."""
        words = [f"{key}={value}" for key, value in self.plan.items()] + [self.optimizer.__name__]
        return " ".join([*words, *(f"fault {name}" for name in self.faults), "" if self.equal else "unlike"]).strip()


def keeps_inputs(self: Precision, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """A fault: floating inputs are rounded twice as coarsely."""
    return tuple((a * 1.01).bfloat16() if a.dtype.is_floating_point else a for a in args), kwargs


def jobs() -> list[Job]:
    low = {"precision": "bf16"}
    found = [Job({"zero": zero, **low}) for zero in range(4)]
    found += [Job({"zero": zero, **low, "reduce_dtype": "bf16"}, torch.bfloat16) for zero in (0, 3)]
    found += [
        Job({"zero": 3, **low, "bucket_bytes": 2**20, "bucket_form": "coalesced"}),
        Job({"zero": 3, **low, "prefetch": 2, "bucket_bytes": 0}),
        Job({"zero": 2, **low, "bucket_bytes": 2**20}, optimizer=momentum),
        Job({"zero": 3, **low, "keep_fp32": ["norm"]}, keeps_norm=True),
        Job({"zero": 3, **low, "keep_fp32": ["norm"]}, equal=False),
        Job({"zero": 3, **low}, torch.bfloat16, equal=False),
        Job({"zero": 3}, equal=False),
        Job({"zero": 3, **low}, equal=False, faults={"_cast_inputs": keeps_inputs}),
    ]
    return found


def fsdp2(job: Job, *, rank: int) -> Values:
    """The reference: one group, or two where the norm keeps its dtype."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = Reader()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if job.keeps_norm:
        fully_shard(model.norm, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, job.reduce_dtype))
    return run(plain_loop(model, job.optimizer(model)), model, rank=rank)


def compiled(job: Job, *, rank: int) -> Values:
    torch.manual_seed(0)
    model = Reader()
    with contextlib.ExitStack() as stack:
        for name, fault in job.faults.items():
            stack.enter_context(mock.patch.object(Precision, name, fault))
        step = fxzero.compile(model, job.optimizer(model), fxzero.Plan(**job.plan))
        return run(step, model, rank=rank)


def main(path: str) -> None:
    references: dict[Any, Values] = {}
    captures: dict[str, Any] = {}

    def compare(job: Job, rank: int) -> str:
        key = (job.reduce_dtype, job.optimizer, job.keeps_norm)
        if key not in references:
            references[key] = fsdp2(job, rank=rank)
        case = f"{job.optimizer.__name__} {sorted(job.faults)}"
        with verifying_less(job.plan, broken=bool(job.faults)), sharing_first_capture(captures, case):
            return first_difference(references[key], compiled(job, rank=rank))

    run_jobs(path, jobs(), compare)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return results_of("tests.numerics.test_precision", tmp_path_factory.mktemp("precision"), ranks=2)


@pytest.mark.multirank
@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.name)
def test_two_ranks_are_bit_equal_to_fsdp2_with_the_same_policy(job: Job, results: list[dict[str, str]]) -> None:
    check(job, results, differs=not job.equal)


# ---- one rank


@pytest.mark.parametrize("optimizer", [adamw, momentum])
def test_autocast_is_bit_equal_to_the_plain_loop_under_autocast(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    torch.manual_seed(0)
    model = Reader()
    plain = copy.deepcopy(model)
    held = optimizer(plain)

    def under_autocast(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain(*args)
        loss.backward()
        held.step()
        held.zero_grad()
        return loss

    expected = run(under_autocast, plain, rank=0)
    step = fxzero.compile(model, optimizer(model), fxzero.Plan(precision="autocast:bf16"))
    assert first_difference(expected, run(step, model, rank=0)) == ""
    other = Reader()
    other.load_state_dict(step.model.state_dict())
    torch.manual_seed(0)
    full = Reader()
    assert first_difference(expected, run(plain_loop(full, optimizer(full)), full, rank=0)), (
        "autocast makes no difference"
    )


class Rotates(nn.Module):
    """Multiplies by a table in fp32, which promotes what two matrices then cannot multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x * self.table).mean()


class Attends(Rotates):
    """The same, before attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(x)[None]
        return F.scaled_dot_product_attention(x * self.table, x, x).mean()


class Normalizes(Rotates):
    """Running statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.out(x)).mean()


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (
            Rotates,
            r"module 'out', op aten.addmm.default: expected tensors of one dtype, got bfloat16, float32, bfloat16",
        ),
        (Attends, r"op aten.mul.Tensor.*expected a model that computes in torch.bfloat16"),
        (Normalizes, r"module 'norm', op aten._native_batch_norm.*got bfloat16, bfloat16, float32, float32"),
    ],
)
def test_a_model_that_mixes_dtypes_is_told_what_to_cast(kind: type[nn.Module], where: str) -> None:
    model = kind()
    step = fxzero.compile(model, momentum(model), fxzero.Plan(precision="bf16"))
    with pytest.raises(CaptureError, match=where + r".*with \.to\(x\.dtype\)"):
        step(torch.ones(2, WIDTH))
    if kind is Normalizes:
        kept = fxzero.compile(model, momentum(model), fxzero.Plan(precision="bf16", keep_fp32=["norm"]))
        assert torch.isfinite(kept(torch.ones(2, WIDTH)))


def graph_of(**plan: Any) -> StepGraph:
    model = Reader()
    optimizer = adamw(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    resolved = fxzero.Plan(**plan).resolve(4)
    precision = Precision.parse(resolved.precision)
    step = capture_step(Inventory.of(model, optimizer), None, batch(0, 0), {}, options=CaptureOptions(precision)).step
    step.mesh = dict(resolved.axes)
    return recipe(resolved, backend="fake").run(step)


def gathered_bytes(step: StepGraph) -> int:
    """Bytes that the gathers of one step yield."""
    ops = (c10d.all_gather, c10d.all_gather_coalesced)
    return sum(num_bytes(node.meta["val"]) for op in ops for node in step.calls(op))


def test_gathers_carry_half_the_bytes() -> None:
    assert gathered_bytes(graph_of(precision="bf16")) * 2 == gathered_bytes(graph_of())


@pytest.mark.parametrize("zero", [1, 2])
def test_below_zero_3_a_parameter_is_gathered_once_a_step(zero: int) -> None:
    """Ranks keep what forward gathered; what they gather is half of what the update of fp32 parameters would be."""
    step = graph_of(zero=zero, precision="bf16")
    assert gathered_bytes(step) * 2 == gathered_bytes(graph_of(zero=zero))
    assert {node.meta["phase"] for node in step.calls(c10d.all_gather)} <= {"forward"}


def test_a_cast_stands_before_its_first_reader() -> None:
    model = Reader()
    step = capture_step(
        Inventory.of(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        None,
        batch(0, 0),
        {},
        options=CaptureOptions(Precision(compute=torch.bfloat16)),
    ).step
    order = step.positions()
    casts = [n for n in step.phase("forward") if n.all_input_nodes and n.all_input_nodes[0] in step.inputs("parameter")]
    assert len(casts) == len(list(model.parameters()))
    for cast in casts:
        assert min(order[user] for user in cast.users) == order[cast] + 1 or cast.next in casts


def test_a_gradient_is_cast_where_it_is_born() -> None:
    """Else all of them would be alive unreduced at the end of backward, where autograd makes the casts."""
    step = graph_of(precision="bf16", bucket_bytes=0)
    order = step.positions()
    gradients = [node for node in step.gradients().values() if node.target is torch.ops.aten._to_copy.default]
    assert len(gradients) == len(list(Reader().parameters()))
    for gradient in gradients:
        assert order[gradient] - order[gradient.all_input_nodes[0]] <= 2
    low, full = (memory_profile(graph_of(bucket_bytes=0, **plan)) for plan in ({"precision": "bf16"}, {}))
    assert low.peak_bytes < full.peak_bytes


if __name__ == "__main__":
    main(sys.argv[1])
