"""Four ranks in one process against the mean of their gradients, for every ZeRO stage."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero import Plan
from fxzero.graph import collectives as c10d
from tests.numerics.local_ranks import compile_for, run_ranks

WORLD = 4


class Tied(nn.Module):
    """62 rows over 4 ranks do not divide; the head shares the embedding; one bias, one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(62, 16)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 62, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(torch.relu(self.hidden(self.embed(x))))), y)


def make(optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW):
    torch.manual_seed(0)
    model = Tied()
    batches = [(torch.randint(62, (8,)), torch.randint(62, (8,))) for _ in range(WORLD)]
    return model, optimizer_class(model.parameters(), lr=1e-2), batches


def reference(model, optimizer, batches):
    model, optimizer = copy.deepcopy((model, optimizer))
    losses = [model(*batch) for batch in batches]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
        parameter.grad = torch.stack(parts).sum(0) / WORLD
    optimizer.step()
    return [loss.detach() for loss in losses], {name: p.detach() for name, p in model.named_parameters()}


def differences(outcome, losses, parameters):
    wrong = [f"loss {i}" for i, loss in enumerate(losses) if not torch.equal(outcome.losses[i], loss)]
    for name, expected in parameters.items():
        if not torch.allclose(outcome.state[("parameter", name)], expected, rtol=1e-6, atol=1e-8):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 0}, {"reduce_scatter": "all_to_all"}], ids=str)
def test_four_ranks_make_the_mean_update(zero, options):
    model, optimizer, batches = make()
    plan = Plan(zero=zero, mesh={"dp": WORLD}, **options)
    step = compile_for(model, optimizer, batches[0], plan)
    outcome = run_ranks(model, optimizer, batches, plan, step=step)
    assert differences(outcome, *reference(model, optimizer, batches)) == []


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_sum_in_place_of_a_mean_is_seen(zero):
    model, optimizer, batches = make(torch.optim.SGD)  # Adam's first step would not notice a scaled gradient
    plan = Plan(zero=zero, mesh={"dp": WORLD}, bucket_bytes=0)
    step = compile_for(model, optimizer, batches[0], plan)
    target = c10d.all_reduce if zero < 2 else c10d.reduce_scatter
    victim = step.calls(target)[0]
    victim.args = tuple("sum" if argument == "avg" else argument for argument in victim.args)
    outcome = run_ranks(model, optimizer, batches, plan, step=step)
    assert differences(outcome, *reference(model, optimizer, batches)) != []
