"""Blocks computed again in backward: bit-equal to keeping them, smaller, and nothing drawn twice."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxzero
import fxzero.passes.recompute_chosen as chosen
import fxzero.recipe
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.memory import memory_profile
from fxzero.errors import PlanError, VerifyError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.randomness import is_random
from fxzero.graph.step_graph import ancestors
from fxzero.passes.recompute_blocks import recompute_blocks
from fxzero.recipe import captured_as, recipe
from tests.numerics.side_by_side import Values, first_difference, parameters
from tests.numerics.sparing import sharing_first_capture

WIDTH, LAYERS, WORDS = 32, 4, 64


class Block(nn.Module):
    """Attention and a gated MLP, both with dropout; attention's own too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm(x)))


class Reader(nn.Module):
    """A small GPT with a tied head; optionally its blocks are under torch's own checkpoint."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if self.checkpointed else layer(hidden)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), x.flatten())


def batch(step: int) -> torch.Tensor:
    return torch.randint(WORDS, (4, 32), generator=torch.Generator().manual_seed(step))


_captures: dict[str, Any] = {}


def train(plan: dict[str, Any], *, steps: int = 20, checkpointed: bool = False) -> tuple[Values, fxzero.TrainStep]:
    torch.manual_seed(0)
    model = Reader(checkpointed=checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    step = fxzero.compile(model, optimizer, fxzero.Plan(**plan))
    torch.manual_seed(1)
    with sharing_first_capture(_captures, f"{checkpointed}"):
        losses = {f"loss {i}": step(batch(i)) for i in range(steps)}
    return losses | parameters(model), step


@pytest.fixture(scope="module")
def kept() -> tuple[Values, fxzero.TrainStep]:
    return train({})


def activations(step: fxzero.TrainStep) -> int:
    profile = memory_profile(step.graph)
    return profile.peak_bytes - profile.state_bytes


@pytest.mark.parametrize(
    ("recompute", "least"),
    [("blocks", 0.5), (0.5, 0.25), (["layers.[01]"], 0.25), (["layers.*.mlp"], 0.1), (1, 0.5)],
    ids=str,
)
def test_20_steps_are_bit_equal_and_smaller(recompute: Any, least: float, kept: tuple[Values, Any]) -> None:
    values, step = train({"recompute": recompute})
    assert first_difference(kept[0], values) == ""
    assert activations(step) <= (1 - least) * activations(kept[1])


def test_with_checkpoints_of_the_model_itself(kept: tuple[Values, Any]) -> None:
    values, step = train({}, checkpointed=True)
    again, both = train({"recompute": "blocks"}, checkpointed=True)
    assert first_difference(kept[0], values) == first_difference(kept[0], again) == ""
    assert activations(both) <= activations(step) * 1.01


def test_only_what_enters_a_block_and_masks_are_kept() -> None:
    step = train({"recompute": "blocks"}, steps=1)[1].graph
    for layer in range(LAYERS):
        inside = [n for n in step.phase("forward") if n.meta["module"].startswith(f"layers.{layer}")]
        held = [n for n in inside if any(user.meta.get("phase") == "backward" for user in n.users)]
        floats = [n for n in held if n.meta["val"].is_floating_point() and n.meta["val"].numel() >= 4 * 32 * WIDTH]
        assert len(floats) <= 1, [n.name for n in floats]  # what the next block begins with
        assert sum(n.meta["val"].dtype is torch.bool for n in held) >= 2
    assert len([n for n in step.calls() if is_random(n)]) == LAYERS * 3


def rewritten(zero: int, recompute: str) -> StepGraph:
    model = Reader()
    plan = fxzero.Plan(zero=zero, recompute=recompute, bucket_bytes=0).resolve(4)
    inventory = rehearse(Inventory.of(model, torch.optim.SGD(model.parameters(), lr=0.1)))[0]
    step = capture_step(inventory, None, (batch(0),), {}, options=captured_as(plan)).step
    step.mesh = dict(plan.axes)
    return recipe(plan, backend="nccl").run(step)


def test_backward_gathers_anew_what_it_recomputes_with() -> None:
    """Under ZeRO-3: as many gathers as without, and no recomputed call reads what forward gathered."""
    with_, without = rewritten(3, "blocks"), rewritten(3, "none")
    # the biases that backward did not read before are gathered once more
    extra = len(with_.calls(c10d.all_gather)) - len(without.calls(c10d.all_gather))
    assert 0 <= extra <= 6 * LAYERS
    for node in with_.phase("backward"):
        for source in node.all_input_nodes:
            assert not (c10d.is_wait(source) and source.meta["phase"] == "forward" and "param" in source.meta)
    forward_weights = {n for n in with_.calls(c10d.wait) if n.meta["phase"] == "forward"}
    gradients = ancestors(n for n in with_.phase("backward") if n.meta["module"].startswith("layers.3"))
    assert forward_weights & gradients, "the twin of this check: gradients do follow from forward"


def test_a_dropout_that_is_drawn_again_is_found() -> None:
    with mock.patch.object(chosen, "is_random", lambda node: False), pytest.raises(VerifyError, match="'random'"):
        train({"recompute": "blocks"}, steps=1)


def test_another_mask_changes_the_losses(kept: tuple[Values, Any]) -> None:
    """A mutation twin: backward's masks are negated."""

    def negated(step: StepGraph, **options: Any) -> int:
        edits = recompute_blocks.run(step, **options)
        for node in step.phase("forward"):
            if node.target is torch.ops.aten._to_copy.default and node.meta["val"].dtype is torch.bool:
                with step.graph.inserting_after(node):
                    other = step.graph.call_function(torch.ops.aten.logical_not.default, (node,))
                other.meta = dict(node.meta)
                node.replace_all_uses_with(other, delete_user_cb=lambda user, other=other: user is not other)
        return edits

    with mock.patch.object(fxzero.recipe, "recompute_blocks", replace(recompute_blocks, run=negated)):
        values, _ = train({"recompute": "blocks"}, steps=3)
    first = ("loss 0", "loss 1", "loss 2")
    difference = first_difference({key: kept[0][key] for key in first}, {key: values[key] for key in first})
    assert difference.startswith("loss 1")


def test_what_cannot_be_recomputed_is_refused() -> None:
    says = (
        r"Plan.recompute: expected patterns of module paths that run in forward, got 'layer.0'; nearest are: layers.0"
    )
    with pytest.raises(PlanError, match=says):
        train({"recompute": ["layer.0"]}, steps=1)
    model = nn.Linear(4, 4)
    step = fxzero.compile(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        fxzero.Plan(recompute="blocks"),
        loss=lambda m, x: m(x).mean(),
    )
    with pytest.raises(PlanError, match=r"expected a model with repeated blocks, such as layers\.0, layers\.1, got"):
        step(torch.ones(2, 4))
