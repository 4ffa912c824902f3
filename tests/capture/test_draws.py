"""What a trace makes of random numbers and of branches on values."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.errors import CaptureError

Forward = Callable[["Model", torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """Two layers with dropout, used in the way that a test gives."""

    def __init__(self, use: Forward) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.use = use

    def body(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.dropout(torch.relu(self.first(x)), 0.5, True)
        return torch.dropout(torch.relu(self.second(hidden)), 0.5, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self, x).sum()


def checkpointed(model: Model, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(model.body, x, use_reentrant=False)


def nested(model: Model, x: torch.Tensor) -> torch.Tensor:
    def outer(y: torch.Tensor) -> torch.Tensor:
        return checkpointed(model, y) + torch.rand_like(y) * y

    return checkpoint(outer, x, use_reentrant=False) + torch.rand(8) * model.second.bias


def twice(model: Model, x: torch.Tensor) -> torch.Tensor:
    return checkpointed(model, x) + checkpointed(model, x + 1)


def without_state(model: Model, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(model.body, x, use_reentrant=False, preserve_rng_state=False)


def transposed(model: Model, x: torch.Tensor) -> torch.Tensor:
    return torch.dropout(model.body(x).t(), 0.5, True)


def asks_a_constant(model: Model, x: torch.Tensor) -> torch.Tensor:
    """As the mask code of transformers does."""
    hidden = model.body(x)
    return hidden if (torch.diff(torch.arange(9)) != 1).cumsum(-1)[-1] == 0 else hidden * 2


def asks_a_literal(model: Model, x: torch.Tensor) -> torch.Tensor:
    hidden = model.body(x)
    return hidden if torch.tensor([1, 2]).sum() == 3 else hidden * 2


def asks_the_batch_in_eager_mode(model: Model, x: torch.Tensor) -> torch.Tensor:
    hidden = model.body(x)
    return hidden if torch.compiler.is_compiling() or (x < 100).all() else hidden * 2


def run(model: Model, step: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """Three steps from one random state; returns the state after them."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(7)
    for _ in range(3):
        step(torch.randn(4, 8, generator=generator))
    return torch.get_rng_state()


@pytest.mark.parametrize(
    "use",
    [
        checkpointed,
        nested,
        twice,
        without_state,
        transposed,
        asks_a_constant,
        asks_a_literal,
        asks_the_batch_in_eager_mode,
    ],
)
def test_parameters_and_random_state_are_those_of_the_plain_loop(use: Forward) -> None:
    torch.manual_seed(0)
    plain = Model(use)
    model = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        plain(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    state = run(plain, step)
    assert torch.equal(run(model, fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1))), state)
    for (name, expected), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected), name
    assert not torch.compiler.is_compiling()


def seeds(model: Model, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return model.body(x)


def draws_in_python(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model.body(x) * random.random()


def draws_in_numpy(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model.body(x) * float(np.random.rand())


def asks_the_batch(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model.body(x) if (x < 100).all() else x


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (seeds, "state was set in the step"),
        (draws_in_python, "`random` or `numpy.random`"),
        (draws_in_numpy, "`random` or `numpy.random`"),
        (asks_the_batch, "if (x < 100).all()"),
    ],
)
def test_what_a_graph_would_freeze_is_refused(use: Forward, reason: str) -> None:
    model = Model(use)
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())
    with pytest.raises(CaptureError, match=reason.replace("(", r"\(").replace(")", r"\)")):
        step(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    after = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
