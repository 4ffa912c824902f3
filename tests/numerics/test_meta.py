"""Models that have no values yet: filled module by module, equal to the same model filled whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

import fxzero


class Small(nn.Module):
    """A parameter of each usual kind, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 13)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(self.hidden(self.embed(x)))), y)


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def meta_model() -> Small:
    with torch.device("meta"):
        return Small()


def test_a_meta_model_trains_like_one_that_was_filled_whole():
    x = torch.arange(8)
    model = meta_model()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2), init=reset)
    torch.manual_seed(0)
    losses = [step(x, x) for _ in range(3)]
    plain = meta_model().to_empty(device="cpu")
    torch.manual_seed(0)
    plain.apply(reset)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for mine in losses:
        loss = plain(x, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(mine, loss.detach())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_without_init_it_is_refused():
    model = meta_model()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(fxzero.PlanError, match=r"parameter embed\.weight: expected parameters with values"):
        step(torch.arange(8), torch.arange(8))
    assert all(p.is_meta for p in model.parameters())


def test_init_must_fill_everything():
    model = meta_model()

    def forgetful(module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding):
            reset(module)

    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), init=forgetful)
    with pytest.raises(fxzero.CaptureError, match=r"init\(module\) for embed\.weight"):
        step(torch.arange(8), torch.arange(8))


def test_a_meta_model_is_filled_from_a_checkpoint(tmp_path):
    x = torch.arange(8)
    torch.manual_seed(0)
    model = Small()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    step(x, x)
    dcp.save(step.state_dict(), checkpoint_id=tmp_path)
    expected = [step(x, x) for _ in range(3)]

    model = meta_model()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    values = step.state_dict()
    with pytest.raises(fxzero.PlanError, match="no checkpoint loaded yet"):
        step(x, x)
    dcp.load(values, checkpoint_id=tmp_path)
    step.load_state_dict(values)
    assert [step(x, x).item() for _ in range(3)] == [loss.item() for loss in expected]
