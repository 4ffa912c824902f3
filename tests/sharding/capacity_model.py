"""A small model with a mixture of experts that have room for a fixed number of tokens each, as in GShard."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WORDS, WIDTH, HIDDEN, EXPERTS = 40, 16, 32, 4
ROWS, TOKENS = 2, 12


class Experts(nn.Module):
    """Tokens go to their best expert, as many as it has room for; the others pass by.

    Source: Lepikhin et al., 2020 (GShard); Fedus et al., 2021 (Switch Transformer) for one expert a token.
    """

    def __init__(self, *, room: int) -> None:
        super().__init__()
        self.room = room
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to tokens [T, H], and the loss of a load that is not balanced."""
        likely = self.gate(x).softmax(-1)
        best = F.one_hot(likely.argmax(-1), EXPERTS)
        place = (best.cumsum(0) * best).sum(-1) - 1
        slot = F.one_hot(place.clamp(max=self.room), self.room + 1)[:, : self.room]
        taken = (best.unsqueeze(-1) * slot.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", taken, x)
        hidden = F.gelu(torch.bmm(rows, self.up) + self.bias.unsqueeze(1))
        out = torch.einsum("ech,ehw->ecw", hidden, self.down)
        back = torch.einsum("tec,ecw->tw", taken * (likely * best).sum(-1)[:, None, None], out)
        balance = EXPERTS * (best.float().mean(0) * likely.mean(0)).sum()
        return back, balance


class CapacityModel(nn.Module):
    """Words, two mixtures of experts, and a head; it returns its loss."""

    def __init__(self, *, room: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Experts(room=room) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of rows of words."""
        x, balances = self.embed(ids).flatten(0, 1), []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out, balance = layer(norm(x))
            x = x + out
            balances.append(balance)
        loss = F.cross_entropy(self.head(x), labels.flatten())
        return loss + 0.1 * torch.stack(balances).mean()


def batch(generator: torch.Generator) -> dict[str, Any]:
    """Rows of words with the words that follow."""
    ids = torch.randint(WORDS, (ROWS, TOKENS + 1), generator=generator)
    return {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
