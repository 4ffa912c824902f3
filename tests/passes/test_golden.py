"""What each pass does to a small step, as a diff that a reviewer reads; accept a change with --accept."""

from __future__ import annotations

import difflib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero import Plan
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.errors import PipelineError, RewriteError
from fxzero.graph.contract import graph_pass
from fxzero.graph.text import to_text
from fxzero.pass_manager import Pipeline
from fxzero.recipe import ALL_PASSES, recipe


class Gated(nn.Module):
    """Uneven rows (7 over 4), a norm, a gated activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 7)
        self.head = nn.Linear(7, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.head(F.silu(self.up(self.norm(x)))), x)


def captured(optimizer_class=torch.optim.SGD):
    torch.manual_seed(0)
    model = Gated()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    return capture_step(rehearse(Inventory.of(model, optimizer))[0], None, (torch.randn(4, 8),), {}).step


def snapshots(plan, backend):
    step = captured()
    step.mesh = dict(plan.axes)
    texts: list[tuple[str, str]] = []
    recipe(plan, backend=backend).run(step, snapshot=lambda name, graph: texts.append((name, to_text(graph))))
    return texts


PLANS = {
    "zero3_gloo": (Plan(zero=3, mesh={"dp": 4}), "gloo"),
    "zero3_nccl": (Plan(zero=3, mesh={"dp": 4}), "nccl"),
    "zero1_nccl": (Plan(zero=1, mesh={"dp": 4}), "nccl"),
    "int8_gloo": (
        Plan(zero=3, mesh={"dp": 4}, compress_gathers="int8", compress_reductions="int8", compress_below=50),
        "gloo",
    ),
    "inductor_gloo": (Plan(zero=3, mesh={"dp": 4}, lowering="inductor"), "gloo"),
    "hybrid_gloo": (Plan(zero=2, mesh={"dp_replicate": 2, "dp": 2}), "gloo"),
}


@pytest.mark.parametrize("name", PLANS)
def test_each_pass_does_what_it_did(name, golden):
    texts = snapshots(*PLANS[name])
    parts = [texts[0][1]]
    for (before, old), (after, new) in itertools.pairwise(texts):
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), before, after, n=0, lineterm="")
        parts.append("\n".join(line for line in diff if not line.startswith("@@")))
    golden(name, "\n\n".join(parts) + "\n")


def test_order_is_checked():
    by_name = {p.name: p for p in ALL_PASSES}
    with pytest.raises(PipelineError, match=r"pass 1 'bucket_all_gathers': expected parameters-sharded before it"):
        Pipeline([by_name["bucket_all_gathers"]])


def test_a_broken_pass_names_itself():
    @graph_pass()
    def stumble(step):
        """Fail."""
        raise KeyError("x")

    with pytest.raises(RewriteError, match="pass 'stumble'"):
        Pipeline([stumble]).run(captured())


def test_passes_leave_their_input_alone():
    step = captured()
    before = to_text(step)
    plan = Plan(zero=3, mesh={"dp": 4})
    step.mesh = dict(plan.axes)
    with_mesh = to_text(step)
    recipe(plan, backend="gloo").run(step)
    assert to_text(step) == with_mesh != before


@pytest.mark.parametrize("depth", [2, 4])
def test_fewer_activations_are_kept(depth):
    from fxzero.cost.memory import memory_profile

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = F.silu(layer(x))
            return x.sum()

    model = Deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = capture_step(rehearse(Inventory.of(model, optimizer))[0], None, (torch.randn(512, 256),), {}).step
    step.mesh = {"dp": 1}
    plan = Plan(zero=0, mesh={"dp": 1})
    kept = memory_profile(recipe(plan.replace(disable=("recompute_pointwise",)), backend="gloo").run(step))
    fewer = memory_profile(recipe(plan, backend="gloo").run(step))
    activation = 512 * 256 * 4
    assert kept.peak_bytes - fewer.peak_bytes >= (depth - 2) * activation
