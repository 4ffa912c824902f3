"""Hints become placements of parameters, or one line that says why they cannot."""

import pytest
import torch
from torch import nn

from fxzero.errors import PlanError
from fxzero.graph.axis_placement import REPLICATED, shard
from fxzero.plan import Plan
from fxzero.sharding.hints import pinned


class Conv1D(nn.Module):
    """As that of transformers: the weight is [in, out]."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(into, out))
        self.bias = nn.Parameter(torch.zeros(out))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 6))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 16))
        self.down_proj = nn.Parameter(torch.zeros(3, 6, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.act, self.norm = nn.GELU(), nn.LayerNorm(6)
        self.turned, self.experts = Conv1D(8, 6), Experts()
        self.sinks, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(62, 6)
        self.model.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 62, bias=False)
        self.head.weight = self.model.embed.weight


LAYER = "model.layers.0."
WORDS = {
    "up by columns": ("layers.0.up", "colwise", {"up.weight": shard(0), "up.bias": shard(0)}),
    "up by rows": ("layers.0.up", "rowwise", {"up.weight": shard(1), "up.bias": REPLICATED}),
    "up in blocks": ("layers.0.up", "packed_colwise", {"up.weight": shard(0, 2), "up.bias": shard(0, 2)}),
    "down in blocks": ("layers.0.down", "packed_rowwise", {"down.weight": shard(1, 2), "down.bias": REPLICATED}),
    "turned, by columns": ("layers.0.turned", "colwise", {"turned.weight": shard(1), "turned.bias": shard(0)}),
    "turned, by rows": ("layers.0.turned", "rowwise", {"turned.weight": shard(0), "turned.bias": REPLICATED}),
    "a norm, whole": ("layers.0.norm", "replicate", {"norm.weight": REPLICATED, "norm.bias": REPLICATED}),
    "a weight alone": ("layers.0.up.weight", "rowwise", {"up.weight": shard(1)}),
    "a turned weight alone": ("layers.0.turned.weight", "rowwise", {"turned.weight": shard(0)}),
    "a vector": ("layers.0.sinks", "colwise", {"sinks": shard(0)}),
    "a vector by rows": ("layers.0.sinks", "rowwise", {"sinks": shard(0)}),
    "a norm's weight by name": ("layers.0.norm.weight", "colwise", {"norm.weight": shard(0)}),
    "gate and up of experts": (
        "layers.0.experts.gate_up_proj",
        "packed_colwise",
        {"experts.gate_up_proj": shard(1, 2)},
    ),
    "gate and up, turned": ("layers.0.experts.gate_up_proj", "packed_rowwise", {"experts.gate_up_proj": shard(2, 2)}),
    "down of experts": ("layers.0.experts.down_proj", "rowwise", {"experts.down_proj": shard(2)}),
    "nothing to split": ("layers.0.act", "replicate", {}),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_word_says_how_parameters_lie(name: str) -> None:
    pattern, word, expected = WORDS[name]
    assert pinned({pattern: word}, Model()) == {f"{LAYER}{path}": found for path, found in expected.items()}


def test_tied_parameters_have_the_first_ones_name() -> None:
    model = Model()
    assert pinned({"embed": "rowwise"}, model) == {"model.embed.weight": shard(0)}
    assert pinned({"head": "colwise"}, model) == {"model.embed.weight": shard(0)}
    assert pinned({"head": "rowwise"}, model) == pinned({"embed": "colwise"}, model) == {"model.embed.weight": shard(1)}
    assert pinned({"head": "colwise", "embed": "rowwise"}, model) == {"model.embed.weight": shard(0)}


def test_patterns_find_paths_from_any_dot() -> None:
    model = Model()
    both = {f"model.layers.{index}.up.{name}": shard(0) for index in range(2) for name in ("weight", "bias")}
    for pattern in ("layers.*.up", "model.layers.*.up", "up", "*.up", "layers.[01].up"):
        assert pinned({pattern: "colwise"}, model) == both
    assert list(pinned({"layers.1.up": "colwise", "layers.0.up": "colwise"}, model)) == list(both)
    assert len(pinned({"1.up": "colwise"}, model)) == 2


def test_hints_that_say_the_same_twice_are_taken() -> None:
    found = pinned({"layers.0.up": "colwise", "up.weight": "colwise", "up.bias": "colwise"}, Model())
    assert set(found.values()) == {shard(0)} and len(found) == 4


def message(hints: dict[str, str], ranks: int = 2) -> str:
    with pytest.raises(PlanError) as caught:
        pinned(hints, Model(), ranks=ranks)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        (
            {"layers.*.upp": "colwise"},
            "Plan.tp['layers.*.upp']: expected a module or a parameter, got none of that name; ",
        ),
        ({"layers.*.upp": "colwise"}, "did you mean 'layers.*.up'"),
        ({"blocks.0.xyz": "replicate"}, "none of that name; write a path as model.named_modules() has it"),
        ({"ayers.0.up": "colwise"}, "none of that name"),
        (
            {"layers.0": "colwise"},
            "Plan.tp['layers.0'], model.layers.0.sinks: expected a linear layer, an embedding or",
        ),
        (
            {"layers": "colwise"},
            "got ModuleList at 'model.layers', which has none; name what is in it, such as 'model.l",
        ),
        ({"act": "rowwise"}, "for 'rowwise', got GELU at 'model.layers.0.act', which has none; leave it out"),
        (
            {"norm": "colwise"},
            "got LayerNorm.weight of shape (6,); write 'replicate', or a hint for 'model.layers.0.norm",
        ),
        ({"experts": "colwise"}, "got Experts.gate_up_proj of shape (3, 16, 6)"),
        (
            {"embed": "packed_colwise"},
            "expected a linear layer or the name of a parameter, for 'packed_colwise', got an emb",
        ),
        ({"scale": "colwise"}, "got Block.scale of shape ()"),
        (
            {"up": "colwise", "layers.0.up.bias": "replicate"},
            "Plan.tp, parameter model.layers.0.up.bias: expected hints that say the same of it, got 'up': 'colwise' "
            "(S(0)) and 'layers.0.up.bias': 'replicate' (R); leave one",
        ),
        ({"embed": "colwise", "head": "colwise"}, "parameter model.embed.weight: expected hints that say the same"),
    ],
    ids=repr,
)
def test_a_hint_that_cannot_be_kept_is_refused(hints: dict[str, str], says: str) -> None:
    assert says in message(hints)


@pytest.mark.parametrize(
    ("hints", "ranks", "says"),
    [
        (
            {"embed": "rowwise"},
            4,
            "Plan.tp['embed'], parameter model.embed.weight: expected a size of dim 0 that tp=4 divides, such as 60 or "
            "64, got 62 of shape (62, 6); pad it, write 'replicate', or set tp=2 in the mesh",
        ),
        (
            {"layers.1.up": "rowwise"},
            4,
            "parameter model.layers.1.up.weight: expected a size of dim 1 that tp=4 divides, ",
        ),
        ({"down": "packed_rowwise"}, 8, "that tp=8 divides in 2 blocks, such as 16, got 8 of shape (6, 8); pad it, "),
        ({"down": "packed_rowwise"}, 8, "or set tp=4 in the mesh"),
        (
            {"sinks": "colwise"},
            3,
            "such as 3 or 6, got 4 of shape (4,); pad it, write 'replicate', or set tp=2 in the m",
        ),
        ({"norm.weight": "colwise"}, 5, "such as 5 or 10, got 6 of shape (6,); pad it, write 'replicate', or set tp=3"),
        ({"embed": "rowwise"}, 3, "or set tp=2 in the mesh"),
    ],
    ids=repr,
)
def test_a_size_that_ranks_do_not_divide_is_refused(hints: dict[str, str], ranks: int, says: str) -> None:
    assert says in message(hints, ranks)


def test_sizes_that_ranks_divide_are_taken() -> None:
    hints = {"embed": "rowwise", "up": "colwise", "down": "rowwise", "experts.gate_up_proj": "packed_colwise"}
    assert pinned(hints, Model(), ranks=2) == pinned(hints, Model())


def test_models_of_transformers_by_their_own_plan() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
    plan = Plan(tp={**llama.config.base_model_tp_plan, "lm_head": "colwise_gather_output"})
    found = pinned(plan.tp, llama, ranks=2)
    assert len(found) == 2 * 7 + 1 and found["lm_head.weight"] == shard(0)
    assert found["model.layers.1.self_attn.k_proj.weight"] == shard(0)
    assert found["model.layers.1.mlp.down_proj.weight"] == shard(1)
    found = pinned(Plan(tp=mixtral.config.base_model_tp_plan).tp, mixtral, ranks=2)
    assert len(found) == 2 * 6
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == shard(1, 2)
    assert found["model.layers.0.mlp.experts.down_proj"] == shard(2)


def test_the_turned_layers_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))
    found = pinned({"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise", "wte": "rowwise"}, model, ranks=4)
    assert found == {
        "transformer.wte.weight": shard(0),
        "transformer.h.0.mlp.c_fc.weight": shard(1),
        "transformer.h.0.mlp.c_fc.bias": shard(0),
        "transformer.h.0.mlp.c_proj.weight": shard(0),
        "transformer.h.0.mlp.c_proj.bias": REPLICATED,
    }
