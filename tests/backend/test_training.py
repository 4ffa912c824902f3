"""Loops of a user's own: losses and state are those of eager code, bit for bit where ops are called one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxzero import compat_inductor
from fxzero.backend import programs
from tests.backend.models import Broken, ConvNet, Decoder, Recurrent, images, tokens
from tests.backend.reference import assert_same, compiled, regions_interpreted, train
from tests.hf.models import CASES

PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "blocks": {"recompute": "blocks"},
    "half of the blocks": {"plan": {"recompute": 0.5}},
    "offload": {"offload_activations": "host", "offload_below": 0},
    "offload and recompute": {"offload_activations": "host", "offload_below": 0, "recompute": ["layers.1"]},
}


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = CASES["t5"].model()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=labels).loss


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "decoder": (lambda: Decoder(3, dropout=0.1), tokens),
    "convolutions": (ConvNet, images),
}
RECURRENT = ("GRU", "LSTM")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_a_model_trains_as_in_eager_code(name: str, options: dict[str, Any]) -> None:
    build, batch = MODELS[name]
    want = train(build, batch)
    assert_same(train(build, batch, lambda model: compiled(model, **options)), want)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model_which_dynamo_leaves_to_eager_code(kind: str) -> None:
    want = train(lambda: Recurrent(kind), tokens)
    assert_same(train(lambda: Recurrent(kind), tokens, lambda model: compiled(model, recompute="blocks")), want)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model_in_the_graph(kind: str) -> None:
    """torch itself takes a GRU apart while it traces, and that rounds otherwise than eager code: so do we."""

    def few(step: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[:, :4].contiguous() for part in tokens(step))

    with torch._dynamo.config.patch(allow_rnn=True):
        want = train(lambda: Recurrent(kind), few, lambda model: torch.compile(model, backend="aot_eager"), steps=3)
        torch.compiler.reset()
        assert_same(train(lambda: Recurrent(kind), few, compiled, steps=3), want)
    assert "rnn.weight_hh_l1" in {node.meta["entry"].name for node in programs()[-1].inputs("parameter")}


def test_an_encoder_and_decoder_trains_as_in_eager_code() -> None:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = torch.randint(4, 50, (2, 2, 9), generator=torch.Generator().manual_seed(step))
        return pair[0], pair[1, :, :7].contiguous()

    want = train(T5, batch)
    assert_same(train(T5, batch, lambda model: compiled(model, recompute="blocks")), want)


@pytest.mark.parametrize("dropout", [0.0, 0.15])
def test_a_loop_with_graph_breaks(dropout: float, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> nn.Module:
        return Broken(dropout=dropout)

    want = train(build, tokens, steps=10)
    printed = capsys.readouterr().out
    assert_same(train(build, tokens, compiled, steps=10), want)
    assert capsys.readouterr().out == printed and printed.count("norm") == 10


def test_the_parts_between_graph_breaks_are_programs() -> None:
    model = compiled(Broken())
    model(*tokens(0)).backward()
    assert [step.title.split()[0] for step in programs()[-4:]] == ["forward", "backward"] * 2


@pytest.mark.parametrize("name", ["decoder", "convolutions"])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_regions_train_as_eager_code(name: str, recompute: str) -> None:
    build, batch = MODELS[name]
    want = train(build, batch, steps=3)
    with regions_interpreted() as store:
        got = train(build, batch, lambda model: compiled(model, lowering="inductor", recompute=recompute), steps=3)
    assert_same(got, want)
    assert store.texts, "no region"


@pytest.mark.slow
@pytest.mark.skipif(compat_inductor.find_cpp_compiler() is None, reason="no C++ compiler")
def test_compiled_regions_in_a_loop_with_graph_breaks() -> None:
    want = train(Broken, tokens, steps=10)[0]
    got = train(Broken, tokens, lambda model: compiled(model, lowering="inductor"), steps=10)[0]
    regions = {node.meta["region"] for step in programs() for node in step.calls() if "region" in node.meta}
    assert regions and got != want, "nothing was compiled"
    assert max(abs(a - b) / b for a, b in zip(got, want, strict=True)) < 1e-5


def test_a_model_under_torch_checkpoint_keeps_what_it_says() -> None:
    class Checkpointed(Decoder):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(x)
            for layer in self.layers:
                hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
            return nn.functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())

    def build() -> nn.Module:
        return Checkpointed(2, dropout=0.15)

    want = train(build, tokens)
    assert_same(train(build, tokens, compiled), want)
    backward = programs()[-1]
    assert any(node.meta["module"].startswith("layers.0") and "addmm" in str(node.target) for node in backward.calls())
