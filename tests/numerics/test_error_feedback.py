"""PowerSGD and top-k: several steps are the published algorithm, what is not sent is kept, ranks stay equal.

Four ranks in one process against a plain reference; planted faults are seen.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxzero import Plan, StepGraph
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.error_feedback_ops import drop_top_k, pack_top_k, power_basis, sum_top_k
from fxzero.recipe import auxiliary_state
from tests.numerics.local_ranks import train_ranks
from tests.numerics.test_compression import (
    BELOW,
    MATRICES,
    WORLD,
    Tied,
    batch,
    compiled,
    forget_what_was_kept,
    make,
    plan_of,
    sent,
)

STEPS = 4
CASES: list[dict[str, Any]] = [
    {"compress_reductions": "powersgd", "powersgd_rank": 3},
    {"compress_reductions": "powersgd", "zero": 1},
    {"compress_reductions": "topk", "topk_fraction": 0.05},
    {"compress_reductions": "topk", "topk_fraction": 0.05, "zero": 0},
]
WAYS: list[dict[str, Any]] = [
    {"compress_reductions": "powersgd", "zero": 2, "bucket_form": "coalesced"},
    {"compress_reductions": "powersgd", "zero": 0, "bucket_form": "coalesced"},
    {"compress_reductions": "powersgd", "bucket_bytes": 0, "disable": ["place_updates"], "persist_below": 2000},
    {"compress_reductions": "topk", "zero": 2, "bucket_form": "coalesced", "compress_below": 0},
    {"compress_reductions": "topk", "bucket_form": "separate", "prefetch": 2, "bucket_bytes": 3000},
]


# ---- references, on lists with an entry for each rank


class PowerSGD:
    """Algorithm 1 and 2 of the paper, for one parameter."""

    def __init__(self, p: nn.Parameter, rank: int) -> None:
        self.kept = [torch.zeros_like(p) for _ in range(WORLD)]
        self.q = power_basis(torch.zeros(p.shape[1], rank))  # what it starts from is no part of the algorithm

    def __call__(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        totals = [g + kept for g, kept in zip(gradients, self.kept, strict=True)]
        p = torch.linalg.qr(sum(m @ self.q for m in totals) / WORLD).Q
        own = [m.T @ p for m in totals]
        self.q = sum(own) / WORLD
        self.kept = [m - p @ q.T for m, q in zip(totals, own, strict=True)]
        return p @ self.q.T


class TopK:
    """The largest elements, for one parameter; the others wait."""

    def __init__(self, p: nn.Parameter, fraction: float) -> None:
        self.kept = [torch.zeros_like(p) for _ in range(WORLD)]
        self.k = math.ceil(fraction * p.numel())

    def __call__(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        totals = [g + kept for g, kept in zip(gradients, self.kept, strict=True)]
        cuts = [total.abs().flatten().sort(descending=True).values[self.k - 1] for total in totals]
        sends = [torch.where(total.abs() >= cut, total, 0.0) for total, cut in zip(totals, cuts, strict=True)]
        self.kept = [total - send for total, send in zip(totals, sends, strict=True)]
        return sum(sends) / WORLD


def reference(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters, and what is kept back, after STEPS steps."""
    model, optimizer = make()
    below = keys.get("compress_below", BELOW)
    compressors: dict[str, Any] = {}
    for name, p in model.named_parameters():
        if keys["compress_reductions"] == "powersgd" and name in MATRICES:
            compressors[name] = PowerSGD(p, keys.get("powersgd_rank", 4))
        elif keys["compress_reductions"] == "topk" and p.numel() >= below:
            compressors[name] = TopK(p, keys.get("topk_fraction", 0.01))
    for number in range(STEPS):
        named = dict(model.named_parameters())
        every = [torch.autograd.grad(model(*batch(number, rank)), list(named.values())) for rank in range(WORLD)]
        for (name, p), *gradients in zip(named.items(), *every, strict=True):
            p.grad = compressors[name](gradients) if name in compressors else sum(gradients) / WORLD
        optimizer.step()
    return {f"kept {name}": torch.stack(c.kept) for name, c in compressors.items()} | {
        name: p.detach() for name, p in model.named_parameters()
    }


def differences(keys: dict[str, Any], step: StepGraph) -> list[str]:
    """Names of what STEPS steps of a graph leave elsewhere than the reference does."""
    batches = [[batch(number, rank) for rank in range(WORLD)] for number in range(STEPS)]
    state = train_ranks(*make(), batches, plan_of(**keys), step=step).state
    kind = {"powersgd": "powersgd", "topk": "top_k"}[keys["compress_reductions"]]
    wrong = []
    for name, expected in reference(keys).items():
        key = ("auxiliary", f"{kind}.residual.{name[5:]}") if name.startswith("kept ") else ("parameter", name)
        if not torch.allclose(state[key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("keys", [*CASES, *WAYS], ids=str)
def test_several_steps_are_the_published_algorithm(keys: dict[str, Any]) -> None:
    assert differences(keys, compiled(**keys)) == []


def keep_what_was_sent(step: StepGraph) -> None:
    """Everything is kept back, what was sent included."""
    for node in step.inputs("auxiliary"):
        key = node.meta["entry"].key
        if ".residual." in key[1]:
            result = step.results[key]
            if result.target is drop_top_k:
                step.set_result(*key, result.args[0])
            else:
                product = result.args[0]
                product.kwargs = {"alpha": -0.5}


def start_afresh(step: StepGraph) -> None:
    """The factor of the step before is not used."""
    for node in step.inputs("auxiliary"):
        if ".factor." in node.meta["entry"].name:
            step.set_result(*node.meta["entry"].key, node)


def take_own_factor(step: StepGraph) -> None:
    """A rank's own second factor stands for the mean."""
    for wait in step.calls(c10d.wait):
        if wait.name.endswith("powersgd_q_mean"):
            wait.replace_all_uses_with(c10d.sent_to(wait))


def read_as_other_rows(step: StepGraph) -> None:
    """Each rank adds up the rows of rank 0."""
    for node in step.calls(sum_top_k):
        node.args = (*node.args[:5], 0, *node.args[6:])


FAULTS: list[tuple[Callable[[StepGraph], Any], dict[str, Any]]] = [
    (forget_what_was_kept, CASES[0]),
    (forget_what_was_kept, CASES[2]),
    (keep_what_was_sent, CASES[0]),
    (keep_what_was_sent, CASES[2]),
    (start_afresh, CASES[0]),
    (read_as_other_rows, CASES[2]),
]


@pytest.mark.parametrize(("fault", "keys"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_step_that_does_otherwise_is_seen(fault: Callable[[StepGraph], Any], keys: dict[str, Any]) -> None:
    step = compiled(**keys)
    fault(step)
    assert [name for name in differences(keys, step) if name in MATRICES] != []


def test_ranks_that_keep_other_factors_are_seen() -> None:
    """`train_ranks` compares what is whole on every rank."""
    step = compiled(**CASES[1])
    take_own_factor(step)
    with pytest.raises(AssertionError, match="ranks differ"):
        differences(CASES[1], step)


# ---- what is sent, and kept


def reduction_bytes(keys: dict[str, Any]) -> int:
    """Bytes that a rank sends at zero=3 for the gradients of Tied."""
    total = 0.0
    for name, p in Tied().named_parameters():
        if name not in MATRICES:
            total += -(-p.shape[0] // WORLD) * p[0].numel() * (WORLD - 1) * 4
        elif keys["compress_reductions"] == "powersgd":
            total += sum(int(2 * 4 * keys["powersgd_rank"] * side * (WORLD - 1) / WORLD) for side in p.shape)
        else:
            total += 8 * math.ceil(keys["topk_fraction"] * p.numel()) * (WORLD - 1)
    return int(total)


@pytest.mark.parametrize("keys", [CASES[0], CASES[2]], ids=str)
def test_bytes_on_the_wire(keys: dict[str, Any]) -> None:
    assert sent(compiled(**keys), gathers=False) == reduction_bytes(keys)


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_the_state_of_a_graph_is_what_the_recipe_announces(keys: dict[str, Any]) -> None:
    step, model = compiled(**keys), make()[0]
    announced = auxiliary_state(plan_of(**keys), dict(model.named_parameters()))
    assert {s.entry: s.dtype for s in announced} == {
        n.meta["entry"]: n.meta["val"].dtype for n in step.inputs("auxiliary")
    }
    assert len(announced) == len(MATRICES) * (2 if keys["compress_reductions"] == "powersgd" else 1)
    one = Plan(mesh={"dp": 1}, **{key: value for key, value in keys.items() if key != "zero"})
    assert auxiliary_state(one, dict(model.named_parameters())) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compress_reductions": "topk", "compress_below": 5000}, "a gradient of 5000 elements or more .*got none"),
        (
            {"compress_reductions": "powersgd", "powersgd_rank": 30},
            "that two factors of rank 30 make smaller, got none",
        ),
    ],
)
def test_a_plan_that_compresses_nothing_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compiled(**keys)


# ---- the ops alone


def test_a_basis_stays_where_it_has_begun_and_is_independent_where_not() -> None:
    factor = torch.zeros(64, 5)
    basis = power_basis(factor)
    assert torch.linalg.cond(basis) < 5 and torch.equal(basis, power_basis(factor))
    factor[:, 2] = 1.0
    mixed = power_basis(factor)
    assert torch.equal(mixed[:, 2], factor[:, 2])
    assert torch.equal(mixed[:, [0, 1, 3, 4]], basis[:, [0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_what_is_packed_and_what_is_kept_is_all_there_is(dtype: torch.dtype, num_shards: int) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(6, 7, generator=generator, dtype=dtype) for _ in range(3)]
    packed = [pack_top_k(x, 10) for x in xs]
    kept = [drop_top_k(x, p) for x, p in zip(xs, packed, strict=True)]
    args = ([6, 7], 3, "avg", num_shards)
    rows = [sum_top_k(torch.cat(packed), *args, index, dtype) for index in range(num_shards)]
    mean = torch.cat(rows)[:6]
    assert torch.cat(rows)[6:].abs().sum() == 0
    assert torch.allclose(mean + sum(kept) / 3, sum(xs) / 3, atol=1e-6)
    assert all(int((k.abs() > 1e-6).sum()) == 32 for k in kept)
    cut = [x.abs().flatten().sort(descending=True).values[10] for x in xs]
    assert all(float(k.abs().max()) <= c for k, c in zip(kept, cut, strict=True))


def test_copies_are_not_shared() -> None:
    x = torch.ones(4, 4)
    before = copy.deepcopy(x)
    drop_top_k(x, pack_top_k(x, 3))
    assert torch.equal(x, before)
