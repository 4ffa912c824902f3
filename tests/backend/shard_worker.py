"""What each of two ranks runs: sharded models through the door, beside FSDP2; rank 0 writes what they found."""

from __future__ import annotations

import functools
import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.backend import fxzero_backend
from tests.backend.models import Decoder, tokens


class Uneven(nn.Module):
    """Rows that two ranks cannot share evenly, a single row, frozen parameters, and some that nothing reads.

    Args:
        tied: the head has the weight of the embedding.
        breaks: forward prints a number in the middle, where its graph breaks.
    """

    def __init__(self, *, tied: bool = False, breaks: bool = False) -> None:
        super().__init__()
        self.breaks = breaks
        self.embed, self.unused = nn.Embedding(51, 7), nn.Linear(3, 5)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Dropout(0.1), nn.Linear(9, 7)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(1, 7))
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.head = nn.Linear(7, 51)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x) * self.scale
        for layer in self.layers:
            hidden = hidden + layer(hidden)
            if self.breaks:
                print("norm", hidden.norm().item())
        return F.cross_entropy(self.head(self.frozen(hidden)).flatten(0, 1), y.flatten())


class Handed(nn.Module):
    """A weight, and a view of one, that leave their graph: it breaks between where they are read and where used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 6), nn.Linear(6, 50)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight, turned = self.head.weight, self.embed.weight.t()
        print("break")
        return F.cross_entropy((F.embedding(x, turned.t()) @ weight.t() + self.head.bias).flatten(0, 1), y.flatten())


class Checkpointed(Decoder):
    """The model itself wants its blocks computed again."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Case:
    """One comparison with FSDP2.

    Args:
        build: the model.
        plan: for fxzero.shard.
        options: for torch.compile; None: nothing is compiled.
        steps: of AdamW.
        accumulate: backwards before a step.
        clip: greatest norm of all gradients.
        sizes: rows of the batch of a step, by rank.
    """

    build: Callable[[], nn.Module]
    plan: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = field(default_factory=dict)
    steps: int = 4
    accumulate: int = 1
    clip: float | None = None
    sizes: Callable[[int, int], int] = lambda step, rank: 4


NATIVE = {"bucket_form": "coalesced", "all_gather": "native", "reduce_scatter": "native"}
CASES: dict[str, Case] = {
    "decoder": Case(lambda: Decoder(2), {"bucket_bytes": "16 KiB"}, steps=10),
    "decoder, blocks, two backwards, clipped": Case(
        lambda: Decoder(2), {"recompute": "blocks"}, accumulate=2, clip=0.2
    ),
    "checkpointed": Case(lambda: Checkpointed(1)),
    "uneven": Case(Uneven, {"bucket_bytes": 0, "prefetch": 2}, steps=10),
    "uneven, kept gathered, blocks": Case(Uneven, {"regather": False}, {"recompute": "blocks"}),
    "uneven, coalesced, some whole": Case(Uneven, {**NATIVE, "persist_below": 10}),
    "uneven, offload": Case(Uneven, {"offload_activations": "host", "offload_below": 0}),
    "uneven, replicas": Case(Uneven, {"mesh": {"dp_replicate": 2}}),
    "uneven, not compiled": Case(Uneven, options=None),
    "graph breaks": Case(lambda: Uneven(breaks=True), {}, {"plan": {"zero": 3, "recompute": "blocks"}}, steps=10),
    "graph breaks, tied": Case(lambda: Uneven(breaks=True, tied=True), steps=10),
    "handed on": Case(Handed),
    "sizes differ": Case(Uneven, sizes=lambda step, rank: 2 + (step + rank) % 2, steps=3),
}


def train(model: nn.Module, called: Any, case: Case) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses, whole parameters, and the optimizer."""
    torch.manual_seed(3 + dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(case.steps):
        for part in range(case.accumulate):
            rows = case.sizes(step, dist.get_rank())
            loss = called(*tokens(100 * step + 10 * part + dist.get_rank(), rows=rows))
            loss.backward()
            losses.append(loss.item())
        if case.clip is not None:
            losses.append(nn.utils.clip_grad_norm_(model.parameters(), case.clip).full_tensor().item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, whole(model), optimizer


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters as one device would have them."""
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}


def fsdp2(model: nn.Module) -> nn.Module:
    for layer in getattr(model, "layers", ()):
        fully_shard(layer)
    return fully_shard(model)


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def compare(case: Case) -> dict[str, Any]:
    """How far a sharded model is from FSDP2."""
    reference = fsdp2(built(case))
    want = train(reference, reference, case)
    model = fxzero.shard(built(case), case.plan)
    called = model
    if case.options is not None:
        called = torch.compile(model, backend=fxzero_backend, options=case.options)
    got = train(model, called, case)
    names = sorted(want[1])
    return {
        "losses": max(abs(a - b) for a, b in zip(got[0], want[0], strict=True)),
        "parameters": max((got[1][name] - want[1][name]).abs().max().item() for name in names),
        "names": sorted(got[1]) == names,
        "of": names,
        "without gradient": [name for name, p in model.named_parameters() if p not in got[2].state],
    }


def checkpoints() -> dict[str, Any]:
    """What a sharded model saves, FSDP2 and a plain model load, and a sharded one goes on from."""

    def every_one_used() -> nn.Module:
        model = Uneven()
        del model.unused  # of what has no state nothing is saved
        return model

    case = Case(every_one_used, steps=1)
    model = fxzero.shard(built(case))
    called = torch.compile(model, backend=fxzero_backend)
    _, want, optimizer = train(model, called, case)
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder[0])
    found: dict[str, Any] = {}
    others = {"plain": built(case), "fsdp2": fsdp2(built(case)), "sharded": fxzero.shard(built(case))}
    for name, other in others.items():
        states = torch.optim.AdamW(other.parameters(), lr=1e-2)
        loaded = {"model": get_model_state_dict(other), "optimizer": get_optimizer_state_dict(other, states)}
        dcp.load(loaded, checkpoint_id=folder[0])
        set_model_state_dict(other, loaded["model"])
        set_optimizer_state_dict(other, states, loaded["optimizer"])
        found[name] = all(torch.equal(value, want[key]) for key, value in whole(other).items())
        if name == "plain":
            continue
        again = other if name == "fsdp2" else torch.compile(other, backend=fxzero_backend)
        torch.manual_seed(7 + dist.get_rank())
        again(*tokens(dist.get_rank())).backward()
        states.step()
        found[f"{name} goes on"] = {key: value.double().sum().item() for key, value in whole(other).items()}
    return found


def differing(rank: int) -> dict[str, str]:
    """What ranks are told that are not about to do the same; they are told at once."""
    x = torch.ones(2, 4)

    def small(layers: int = 1) -> nn.Module:
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

    def plans() -> Any:
        fxzero.shard(small(), {"prefetch": 1 + rank})

    def models() -> Any:
        fxzero.shard(small(1 + rank))

    def one_cannot_shard() -> Any:
        fxzero.shard(nn.LSTM(3, 4) if rank else small())

    def options() -> Any:
        torch.compile(fxzero.shard(small()), backend=fxzero_backend, options={"prefetch": 2 + rank})(x)

    def one_contradicts() -> Any:
        torch.compile(fxzero.shard(small()), backend=fxzero_backend, options={"zero": 3 * (1 - rank)})(x)

    def one_cannot_compile() -> Any:
        model = fxzero.shard(small())

        def called(x: torch.Tensor) -> torch.Tensor:
            return model(x) + (dict(model.named_parameters())["0.weight"].to_local().sum() if rank else 0)

        torch.compile(called, backend=fxzero_backend)(x)

    def one_skips_backward() -> Any:
        called = torch.compile(fxzero.shard(small()), backend=fxzero_backend)
        loss = called(x).sum()
        called(x) if rank else loss.backward()

    told = {}
    for case in (plans, models, one_cannot_shard, options, one_contradicts, one_cannot_compile, one_skips_backward):
        torch.compiler.reset()
        start = time.monotonic()
        try:
            case()
            told[case.__name__] = "nothing"
        except Exception as error:
            told[case.__name__] = f"{type(error).__name__}: {error}"
        assert time.monotonic() - start < 50, f"{case.__name__} waited"
    return told


def main(path: str) -> None:
    dist.init_process_group("gloo")
    jobs: dict[str, Callable[[], Any]] = {name: functools.partial(compare, case) for name, case in CASES.items()}
    jobs |= {"checkpoints": checkpoints, "differing": lambda: differing(dist.get_rank())}
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        torch.compiler.reset()
        start = time.perf_counter()
        try:
            mine = job()
        except BaseException:  # a failure of torch's checkpoints is no Exception
            mine = {"error": traceback.format_exc()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine | {"seconds": time.perf_counter() - start})
        found[name] = ranks
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    main(sys.argv[1])
