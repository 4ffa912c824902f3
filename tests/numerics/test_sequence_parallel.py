"""One batch for all ranks of sp, whose tokens they split: numbers are those of one device, and memory is a part.

Run as a module, this file is what each rank does.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.cost.memory import highest_profile
from fxzero.errors import PlanError, RankMismatchError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import placement_of
from tests.numerics.allocations import Counter, build_counter
from tests.numerics.findings import write_findings
from tests.numerics.worker import launch_for_results
from tests.sharding.machines import without_latencies_file

WORDS, WIDTH, HEADS, TOKENS = 64, 64, 4, 512
STEPS = 3
TOLERANCE = 1e-5


class Block(nn.Module):
    """Causal attention and a perceptron, with norms before."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Words(nn.Module):
    """A small language model that yields its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())


def made() -> tuple[Words, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Words()
    return model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def batch(number: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, of a step and an index on dp."""
    generator = torch.Generator().manual_seed(10 * number + index)
    ids = torch.randint(WORDS, (1, TOKENS + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def compiled(mesh: dict[str, int] | None, hardware: str, **keys: Any) -> fxzero.TrainStep:
    return fxzero.compile(*made(), fxzero.Plan(mesh=mesh, hardware=hardware, **keys))


# ---- what ranks do


def split_tokens(step: StepGraph) -> float:
    """Of the bytes that forward makes and backward reads, the part that is split over sp by tokens or heads."""
    kept = [n for n in step.calls() if n.meta["phase"] == "forward" and "placements" in n.meta]
    kept = [n for n in kept if any(user.meta["phase"] == "backward" for user in n.users)]
    sizes = [n.meta["val"].nbytes * (step.mesh["sp"] if placement_of(n, "sp").is_shard else 1) for n in kept]
    return sum(s for s, n in zip(sizes, kept, strict=True) if placement_of(n, "sp").is_shard) / sum(sizes)


def trained(mesh: dict[str, int], hardware: str, **keys: Any) -> dict[str, Any]:
    """Losses and parameters after some steps."""
    step, index = compiled(mesh, hardware, **keys), dist.get_rank() // mesh["sp"]
    losses = [float(step(*batch(number, index))) for number in range(STEPS)]
    parameters = [p.full_tensor().flatten().tolist() for p in step.model.parameters()]  # type: ignore[attr-defined]
    kinds = sorted({c10d.axis_of(n) for n in step.graphs[0].calls() if c10d.is_collective(n)})
    return {"losses": losses, "parameters": parameters, "axes": kinds}


def measured(mesh: dict[str, int] | None, hardware: str, library: str) -> dict[str, float]:
    """Peak bytes of a later step, as the graph says and as the allocator saw it."""
    counter = Counter(library)
    with counter.account() as account:
        step = compiled(mesh, hardware)
        for number in range(STEPS):
            step(*batch(number, 0))
    profile = highest_profile(step.graphs)[1]
    split = split_tokens(step.graphs[0]) if mesh else 0.0
    return {"predicted": profile.peak_bytes, "measured": account.later_peak, "split": split}


def other_batch(hardware: str) -> str:
    """What a rank is told where one of an sp group has another batch."""
    try:
        compiled({"sp": 2}, hardware)(*batch(dist.get_rank(), 0))
    except RankMismatchError as error:
        return str(error)
    return ""


def findings(ranks: int, hardware: str, library: str) -> dict[str, Any]:
    """What a rank finds."""
    found: dict[str, Any] = {}
    if ranks == 2:
        found = {"trained": trained({"sp": 2}, hardware), "other batch": other_batch(hardware)}
    if ranks == 4:
        found = {"trained": trained({"dp": 2, "sp": 2}, hardware, zero=3)}
    if ranks in (1, 4) and library:
        found["memory"] = measured({"sp": 4} if ranks == 4 else None, hardware, library)
    return found


# ---- tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Number of ranks -> what each rank has found."""
    folder = tmp_path_factory.mktemp("sequence_parallel")
    library, _ = build_counter(folder)
    out = {}
    for ranks in (1, 2, 4):
        args = (without_latencies_file(folder), str(library or ""))
        out[ranks] = launch_for_results(
            "tests.numerics.test_sequence_parallel", folder, *args, ranks=ranks, timeout_s=120
        )
    return out


def plain(groups: int) -> tuple[list[list[float]], list[list[float]]]:
    """(losses by step and group, parameters) of one process on the batches of all groups."""
    model, optimizer = made()
    losses = []
    for number in range(STEPS):
        optimizer.zero_grad()
        each = [model(*batch(number, index)) for index in range(groups)]
        (torch.stack(each).sum() / groups).backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in each])
    return losses, [p.detach().flatten().tolist() for p in model.parameters()]


@pytest.mark.multirank
@pytest.mark.parametrize(("ranks", "groups"), [(2, 1), (4, 2)], ids=["sp=2", "dp=2 sp=2, zero 3"])
def test_ranks_of_sp_train_as_one_device(ranks: int, groups: int, found: dict[int, Any]) -> None:
    losses, parameters = plain(groups)
    for number, rank in enumerate(found[ranks]):
        mine, index = rank["trained"], number // 2
        assert mine["axes"] == (["sp"] if groups == 1 else ["dp", "sp"])
        assert mine["losses"] == pytest.approx([each[index] for each in losses], rel=TOLERANCE)
        for part, whole in zip(mine["parameters"], parameters, strict=True):
            assert part == pytest.approx(whole, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.multirank
def test_ranks_of_sp_are_told_of_another_batch(found: dict[int, Any]) -> None:
    for rank in found[2]:
        assert (
            "batch input args.0: expected the same on all ranks of a tp, sp or ep group, [0, 1]" in rank["other batch"]
        )


@pytest.mark.multirank
def test_a_row_is_split_by_tokens_and_memory_falls_as_predicted(found: dict[int, Any]) -> None:
    if "memory" not in found[1][0]:
        pytest.skip("tests/benchmarks/memory_counter.cpp was not built")
    (alone,), together = (([rank["memory"] for rank in found[ranks]]) for ranks in (1, 4))
    print(f"\nsp=1: {alone}\nsp=4: {together[0]}")
    assert alone["predicted"] == pytest.approx(alone["measured"], rel=0.03)
    for rank in together:
        assert rank["predicted"] == pytest.approx(rank["measured"], rel=0.03)
        assert rank["split"] > 0.9
        assert rank["measured"] < 0.45 * alone["measured"]


@pytest.mark.parametrize("how", ["powersgd", "topk"])
def test_what_keeps_rows_of_gradients_is_refused_beside_sp(how: str) -> None:
    with pytest.raises(PlanError, match=f"a mesh without sp with '{how}'"):
        fxzero.Plan(mesh={"dp": 2, "sp": 2}, zero=1, compress_reductions=how)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_findings(Path(sys.argv[1]), lambda ranks: findings(ranks, *sys.argv[2:]))
