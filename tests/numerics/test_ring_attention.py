"""Real ranks over gloo whose keys and values travel: they train as one rank does; peaks of memory of each form.

Run as a module, this file is what each rank does.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxzero
from fxzero.cost.memory import highest_profile
from fxzero.graph import collectives as c10d
from tests.hf.models import CASES, VOCAB
from tests.numerics.allocations import Counter, build_counter
from tests.numerics.findings import write_findings
from tests.numerics.worker import launch_for_results
from tests.sharding.machines import without_latencies_file

TOKENS, STEPS = 512, 3
TOLERANCE = 1e-5
FORMS = ("heads", "gather", "ring")
ASKED = {1: ("auto",), 2: ("ring",), 4: FORMS}  # by so many ranks


class Llama(nn.Module):
    """That of `tests/hf`, which yields its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = CASES["llama"].model()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def made() -> tuple[Llama, torch.optim.Optimizer]:
    model = Llama()
    return model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def row(number: int) -> torch.Tensor:
    """One row, of a step."""
    return torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(number))


def compiled(ranks: int, form: str, hardware: str) -> fxzero.TrainStep:
    mesh = {"sp": ranks} if ranks > 1 else None
    return fxzero.compile(*made(), fxzero.Plan(mesh=mesh, hardware=hardware, sp_attention=form))


# ---- what ranks do


def trained(ranks: int, form: str, hardware: str, counter: Counter | None) -> dict[str, Any]:
    """Losses, parameters and shifts of some steps, and the last one's peak: as the graph says, and as it was seen."""
    if counter is None:
        return run(ranks, form, hardware)
    with counter.account() as account:
        found = run(ranks, form, hardware)
    return found | {"measured": account.later_peak}


def run(ranks: int, form: str, hardware: str) -> dict[str, Any]:
    """What a rank finds in some steps."""
    step = compiled(ranks, form, hardware)
    losses = [float(step(row(number))) for number in range(STEPS)]
    parameters = [getattr(p, "full_tensor", p.detach)().flatten().tolist() for p in step.model.parameters()]
    shifts = len(step.graphs[0].calls(c10d.shift))
    predicted = highest_profile(step.graphs)[1].peak_bytes
    return {"losses": losses, "parameters": parameters, "shifts": shifts, "predicted": predicted}


def findings(ranks: int, hardware: str, library: str) -> dict[str, Any]:
    """What a rank finds, by form."""
    counter = Counter(library) if library else None
    return {form: trained(ranks, form, hardware, counter) for form in ASKED[ranks]}


# ---- tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Number of ranks -> what each rank has found."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("ring_attention")
    library, _ = build_counter(folder)
    out = {}
    for ranks in (1, 2, 4):
        args = (without_latencies_file(folder), str(library or ""))
        out[ranks] = launch_for_results("tests.numerics.test_ring_attention", folder, *args, ranks=ranks, timeout_s=120)
    return out


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], list[list[float]]]:
    """Losses and parameters of torch's own loop on one device."""
    model, optimizer = made()
    losses = []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = model(row(number))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, [p.detach().flatten().tolist() for p in model.parameters()]


@pytest.mark.multirank
@pytest.mark.parametrize(("ranks", "form"), [(ranks, form) for ranks, forms in ASKED.items() for form in forms])
def test_ranks_that_split_a_row_train_as_one_device(
    ranks: int, form: str, found: dict[int, Any], alone: tuple[list[float], list[list[float]]]
) -> None:
    losses, parameters = alone
    for rank in found[ranks]:
        mine = rank[form]
        # of two layers: keys and values in forward, these and their gradients in backward
        assert mine["shifts"] == (2 * (2 + 4) * (ranks - 1) if form == "ring" else 0)
        assert mine["losses"] == pytest.approx(losses, rel=TOLERANCE)
        for part, whole in zip(mine["parameters"], parameters, strict=True):
            assert part == pytest.approx(whole, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.multirank
def test_peaks_of_each_form_are_as_predicted_and_a_ring_has_less_than_gathered_keys(found: dict[int, Any]) -> None:
    if "measured" not in found[1][0]["auto"]:
        pytest.skip("tests/benchmarks/memory_counter.cpp was not built")
    one = found[1][0]["auto"]["measured"]
    print(f"\nsp=1: {one}")
    for rank in found[4]:
        print({form: (rank[form]["predicted"], rank[form]["measured"]) for form in FORMS})
        for form in FORMS:
            assert rank[form]["predicted"] == pytest.approx(rank[form]["measured"], rel=0.03)
            assert rank[form]["measured"] < 0.75 * one
        assert rank["ring"]["predicted"] < 0.98 * rank["gather"]["predicted"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_findings(Path(sys.argv[1]), lambda ranks: findings(ranks, *sys.argv[2:]))
