"""The examples run: the one that trains saves, and goes on from what it saved, on another mesh too; small and short."""

import re
from pathlib import Path

import pytest

from tests.numerics.worker import ROOT, launch, torchrun

SMALL = ("--dim", "32", "--layers", "2", "--heads", "2", "--context", "32", "--batch", "4", "--warmup", "2")
RARE = ("--eval-every", "4", "--eval-windows", "8", "--save-every", "4")


def held_out_losses(folder: Path, *args: str, ranks: int) -> dict[int, float]:
    """Step -> held-out loss, as a run prints them."""
    script = str(ROOT / "examples" / "train_gpt.py")
    output = torchrun(script, *SMALL, *RARE, "--out", str(folder), *args, ranks=ranks, timeout_s=180, cwd=ROOT)
    assert "A sample:" in output and "predicted peak" in output
    found = re.findall(r"step (\d+): held-out loss ([\d.]+) nats per byte", output)
    return {int(step): float(loss) for step, loss in found}


@pytest.mark.multirank
def test_the_example_trains_and_resumes(tmp_path: Path) -> None:
    first = held_out_losses(tmp_path, "--steps", "8", ranks=2)
    assert first.keys() == {4, 8} and 3.5 < first[8] < first[4] < 5.6
    for name in ("loss.png", "graph.txt", "report.txt", "checkpoints/step_000008/.metadata"):
        assert (tmp_path / name).stat().st_size > 0
    low = ("--zero", "1", "--precision", "bf16", "--clip-grad-norm", "1.0")
    small = ("--accumulate", "2", "--recompute", "blocks")
    later = held_out_losses(tmp_path, "--resume", "--steps", "12", "--tp", "2", *low, *small, ranks=2)
    assert later.keys() == {12} and later[12] < first[8] + 0.1


@pytest.mark.multirank
def test_a_sharded_model_in_a_loop_of_ones_own() -> None:
    output = launch("examples.shard_and_compile", ranks=2, timeout_s=120)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", output)]
    assert len(losses) == 4 and losses[0] < 3 and losses[-1] < 0.1
    assert "forward gathers 27 parameters, backward 21, and reduces 27" in output
