"""Inputs and outputs of every kind: what eager code does to them, the compiled function does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backend.reference import compiled

Case = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mutates(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = w * x.sin()
    x.add_(1)
    return y * 2, w * x


def mutates_and_recomputes(x: torch.Tensor, w: torch.Tensor) -> Any:
    """The sine is cheap and large: it is computed again in backward, from the input as it was."""
    y = w.expand(256, 256) * x.sin()
    x.mul_(3)
    return y


def mutates_what_needs_gradient(x: torch.Tensor, w: torch.Tensor) -> Any:
    hidden = w * 2
    hidden.mul_(x)
    return hidden.exp(), hidden


def returns_inputs_and_views(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = w * x
    return x, x.view(-1), y, y.t(), y[0], w.detach(), y.detach()


def numbers_and_none(x: torch.Tensor, w: torch.Tensor) -> Any:
    return {"a": w * 2, "b": None, "c": 3, "d": (x.shape[0], w.sum())}


def integers(index: torch.Tensor, w: torch.Tensor) -> Any:
    return w[index], index + 1, (w > 0).sum()


def unused(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> Any:
    return (w * x).sum(), v.detach() * 2


def two_gradients(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> Any:
    return w * x + v.exp()


def same_gradient(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> Any:
    return w + v + x


CASES: dict[str, Case] = {
    "mutated input": (mutates, lambda: (plain(3, 3), leaf(3, 3))),
    "mutated and recomputed": (mutates_and_recomputes, lambda: (plain(256, 256), leaf(256, 1))),
    "mutated intermediate": (mutates_what_needs_gradient, lambda: (plain(3, 3), leaf(3, 3))),
    "inputs and views": (returns_inputs_and_views, lambda: (plain(3, 3), leaf(3, 3))),
    "numbers and None": (numbers_and_none, lambda: (plain(3, 3), leaf(3, 3))),
    "integers": (integers, lambda: (torch.tensor([2, 0, 2]), leaf(3, 3))),
    "no gradient for one": (unused, lambda: (plain(3, 3), leaf(3, 3), leaf(3, 3, seed=2))),
    "two gradients": (two_gradients, lambda: (plain(3, 3), leaf(3, 3), leaf(3, 3, seed=2))),
    "one gradient for two": (same_gradient, lambda: (plain(3, 3), leaf(3, 3), leaf(3, 3, seed=2))),
    "transposed": (lambda x, w: F.dropout(w @ x, 0.15) @ x, lambda: (plain(4, 4).t(), leaf(3, 4))),
    "transposed dropout": (lambda x, w: F.dropout(w.t(), 0.15) * x, lambda: (plain(25, 13), leaf(13, 25))),
    "constant": (lambda x, w: w * torch.tensor([1.0, 2.0, 3.0]) + x, lambda: (plain(3, 3), leaf(3, 3))),
    "draws": (
        lambda x, w: torch.rand_like(x) * w + F.dropout(w, 0.3) + torch.randn(3),
        lambda: (plain(3, 3), leaf(3, 3)),
    ),
}


def outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Outputs, gradients, inputs and random state afterwards."""
    torch.manual_seed(3)
    out = function(*args)
    leaves = torch.utils._pytree.tree_leaves(out)
    loss = sum(
        (t.double() * (i + 1)).sum() for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.requires_grad
    )
    loss.backward()
    return leaves, [a.grad for a in args], args, torch.get_rng_state()


def assert_equal(got: Any, want: Any, where: str) -> None:
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_equal(a, b, f"{where}.{index}")
    elif isinstance(want, torch.Tensor):
        assert torch.equal(got, want), where
        assert (got.stride(), got.requires_grad) == (want.stride(), want.requires_grad), where
    else:
        assert got == want, where


@pytest.mark.parametrize("name", CASES)
def test_a_function_does_what_eager_code_does(name: str) -> None:
    function, inputs = CASES[name]
    want = outcome(function, inputs())
    assert_equal(outcome(compiled(function), inputs()), want, name)


def test_an_output_that_is_a_view_is_one() -> None:
    x, w = plain(3, 3), leaf(3, 3)
    out = compiled(returns_inputs_and_views)(x, w)
    assert out[0] is x
    out[1].zero_()
    assert not x.any() and out[1].data_ptr() == x.data_ptr()
    assert out[3].data_ptr() == out[2].data_ptr()


@pytest.mark.parametrize("copied", [torch.clone, lambda x: x.detach().clone(), lambda x: x.clone().detach()])
def test_a_copy_of_an_input_is_one(copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = plain(3, 3)
    (copy,) = compiled(lambda x: (copied(x),))(x)
    copy.zero_()
    assert x.any()


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_without_gradients(train: bool) -> None:
    batches = [plain(4, 3, 5, 5, seed=i) for i in range(3)]
    found = []
    for wrap in (lambda model: model, compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.15)).train(train)
        called = wrap(model)
        with torch.no_grad():
            outs = [called(batch) for batch in batches]
        found.append((outs, list(model.state_dict().values())))
    assert_equal(found[1], found[0], "batch norm")


def test_training_and_evaluation_in_turns() -> None:
    found = []
    for wrap in (lambda model: model, compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.15))
        called, outs = wrap(model), []
        for step in range(4):
            model.train(step % 2 == 0)
            out = called(plain(6, 4, seed=step))
            out.sum().backward()
            outs.append(out.detach())
        found.append((outs, [p.grad for p in model.parameters()], list(model.buffers())))
    assert_equal(found[1], found[0], "turns")


def test_autocast_around_a_call() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    found = []
    for called in (model, compiled(model)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = called(plain(4, 8))
        out.float().sum().backward()
        found.append((out, [p.grad for p in model.parameters()]))
        model.zero_grad()
    assert_equal(found[1], found[0], "autocast")
    assert found[1][0].dtype is torch.bfloat16
