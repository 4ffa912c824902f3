"""Models that the door is tried with: each returns its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.lower.models import Decoder, tokens


class ConvNet(nn.Module):
    """Convolutions with batch norm, whose running statistics the forward writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norm(self.conv(images)))
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden.mean((2, 3))), labels)


def images(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)


class Recurrent(nn.Module):
    """A GRU or an LSTM over embedded tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 12), nn.Linear(16, 50)
        self.rnn = getattr(nn, kind)(12, 16, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.rnn(self.embed(x))[0]).flatten(0, 1), y.flatten())


class Broken(nn.Module):
    """A decoder whose forward asks for a number in the middle, and prints it: two graph breaks."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.decoder = Decoder(dropout=dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inner = self.decoder
        hidden = inner.layers[0](inner.embed(x))
        print("norm", hidden.norm().item())
        hidden = inner.layers[1](hidden)
        return F.cross_entropy(inner.head(inner.norm(hidden)).flatten(0, 1), y.flatten())


__all__ = ["Broken", "ConvNet", "Decoder", "Recurrent", "images", "tokens"]
