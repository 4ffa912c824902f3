"""The peak predicted from the graph beside the peak that torch's allocator saw: within 3%, models by plans."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

import fxzero
from fxzero.cost import lifetimes
from fxzero.cost.memory import highest_profile
from fxzero.graph import StepGraph
from fxzero.recipe import recipe
from tests.hf.models import _build
from tests.numerics.allocations import Counter, benchmarks_importable, build_counter
from tests.numerics.sparing import verifying_less
from tests.numerics.worker import launch

MIB = 2**20
TOLERANCE = 0.03
STEPS = 3
WORDS, TOKENS = 1024, 64


class Block(nn.Module):
    """Attention and a perceptron, with norms before and dropout behind them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norms[1](x)))


class GPT(nn.Module):
    """Learned positions, dropout everywhere, a head tied to the embedding."""

    def __init__(self, width: int = 384, layers: int = 1) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(WORDS, width), nn.Embedding(TOKENS, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x) + self.positions.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())


class Residual(nn.Module):
    """Two convolutions with batch norm, the first ReLU in place, around them the sum of a residual network."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(F.relu(self.first(x), inplace=True)) + self.skip(x))


class ResNet(nn.Module):
    """A small one, for images of 3 channels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Residual(width, width), Residual(width, 2 * width), Residual(2 * width, 4 * width))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.layers(self.pool(self.stem(x))).mean((2, 3))), y)


def llama(*, layers: int = 1) -> nn.Module:
    """That of the benchmark."""
    with benchmarks_importable():
        import job
    return job.Llama(job.Size(dim=384, layers=layers, heads=4, vocab=WORDS, seq=TOKENS))


hf_llama = _build(
    "LlamaForCausalLM",
    "LlamaConfig",
    vocab_size=WORDS,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=TOKENS,
    use_cache=False,
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": GPT,
    "llama": llama,
    "llama_of_2": lambda: llama(layers=2),
    "hf_llama": hf_llama,
    "resnet": ResNet,
}


@dataclass(frozen=True)
class Job:
    """One comparison.

    Args:
        model: one of MODELS.
        plan: keys of the plan.
        adam: AdamW rather than SGD with momentum.
        rows: of this rank's batch.
        on_meta: the model has no values until `init` fills them.
        world: ranks.
    """

    model: str
    plan: dict[str, Any] = field(default_factory=dict)
    adam: bool = True
    rows: int = 12
    on_meta: bool = False
    world: int = 1

    @property
    def is_rewritten(self) -> bool:
        """Whether the plan asks for less memory."""
        return "recompute" in self.plan or "chunk_loss" in self.plan

    @property
    def name(self) -> str:
        """A test's id."""
        keys = [f"{key}={value}" for key, value in self.plan.items()]
        extra = ["meta"] * self.on_meta + [f"{self.rows} rows"] * (self.rows != 12)
        return " ".join([self.model, "adamw" if self.adam else "sgd", f"world {self.world}", *keys, *extra])


ALONE = [
    Job("gpt"),
    Job("gpt", {"accumulate": 2}, adam=False),
    Job("llama_of_2", {"recompute": "blocks"}),
    Job("llama", {"precision": "bf16"}, adam=False),
    Job("llama", {"clip_grad_norm": 1.0}, rows=1, on_meta=True),
    Job("hf_llama", {"chunk_loss": 64}, adam=False, rows=24),
    Job("resnet", adam=False),
]
TOGETHER = [
    Job("llama", {"zero": 0}),
    Job("llama", {"zero": 1}, adam=False, rows=1),
    Job("gpt", {"zero": 2}, rows=1),
    Job("gpt", {"zero": 3, "precision": "bf16", "accumulate": 2, "cross_step": True}, adam=False),
    Job("hf_llama", {"zero": 3, "recompute": "blocks"}),
    Job("resnet", {"zero": 3}, rows=16),
    Job("llama", {"zero": 3, "cross_step": True}, on_meta=True),
    Job("gpt", {"zero": 3, "schedule": "cost", "hardware": "h100_ethernet", "memory_budget": "64 MiB"}),
    Job("llama_of_2", {"zero": 3, "schedule": "cost", "hardware": "h100", "recompute": "blocks"}),
]
TOGETHER = [replace(job, world=2) for job in TOGETHER]
JOBS = {1: ALONE, 2: TOGETHER}
BESIDE = "the last of those alone, beside 2 MiB that are none of its step's"


def batch(job: Job) -> dict[str, torch.Tensor]:
    if job.model == "resnet":
        return {"x": torch.randn(job.rows, 3, 96, 96), "y": torch.randint(10, (job.rows,))}
    names = {"hf_llama": ("input_ids", "labels"), "llama": ("x_BT", "y_BT"), "llama_of_2": ("x_BT", "y_BT")}.get(
        job.model, ("x", "y")
    )
    return {name: torch.randint(WORDS, (job.rows, TOKENS)) for name in names}


def fill(module: nn.Module) -> None:
    """Every parameter and buffer that a module owns itself, with something."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        nn.init.normal_(tensor, std=0.02)


def prepared(job: Job) -> tuple[fxzero.TrainStep, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    with torch.device("meta" if job.on_meta else "cpu"):
        model = MODELS[job.model]()
    make = torch.optim.AdamW if job.adam else torch.optim.SGD
    optimizer = make(model.parameters(), lr=1e-3, **({} if job.adam else {"momentum": 0.9}))
    return fxzero.compile(model, optimizer, fxzero.Plan(**job.plan), init=fill if job.on_meta else None), batch(job)


@dataclass
class Found:
    """Bytes: predicted, measured in a later step, and before the first program ran; those of a wrong program."""

    predicted: int
    measured: int
    setup: int
    wrong: int = 0

    @property
    def error(self) -> float:
        """Of the prediction, as a fraction."""
        return self.predicted / self.measured - 1


def measure(job: Job, counter: Counter, *, extra: int = 0) -> Found:
    with verifying_less({"zero": 0}), counter.account() as account:
        kept = torch.empty(extra, dtype=torch.uint8)
        step, inputs = prepared(job)
        for _ in range(STEPS):
            step(**inputs)
    programs = len(step.graphs)
    predicted = highest_profile(step.graphs)[1].peak_bytes
    wrong = _of_another_program(step) if job.is_rewritten else 0
    del kept
    rows = step.shared_bytes.rows  # which the allocator does not see
    return Found(predicted, max(account.peaks[-programs:]) + rows, account.setup_bytes, wrong)


def _of_another_program(step: fxzero.TrainStep) -> int:
    """The peak of one that keeps what this one computes again, and has whole logits."""
    plan = step.plan.replace(recompute="none", chunk_loss=None)
    other: StepGraph = recipe(plan, backend="gloo").run(step.captured, check=False)
    return highest_profile([other])[1].peak_bytes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """Job -> what each rank found; both worlds, and a table of them on stdout."""
    folder = tmp_path_factory.mktemp("memory")
    library, why_not = build_counter(folder)
    if library is None:
        pytest.skip(f"tests/benchmarks/memory_counter.cpp was not built: {why_not}")
    out = {}
    for ranks in JOBS:
        path = folder / f"{ranks}.json"
        launch("tests.numerics.test_memory", str(path), str(library), ranks=ranks, timeout_s=480)
        out |= {name: [Found(**f) for f in found] for name, found in json.loads(path.read_text()).items()}
    rows = [
        [name, f"{f.predicted / MIB:.2f}", f"{f.measured / MIB:.2f}", f"{f.error:+.2%}", f"{f.setup / MIB:.2f}"]
        for name, ranks in out.items()
        for f in ranks[:1]
    ]
    print("\n" + tabulate(rows, headers=["job", "predicted MiB", "measured MiB", "error", "set-up MiB"]))
    return out


@pytest.mark.multirank
@pytest.mark.parametrize("job", [*ALONE, *TOGETHER], ids=lambda job: job.name)
def test_the_peak_is_known_before_the_run(job: Job, found: dict[str, list[Found]]) -> None:
    for rank in found[job.name]:
        assert rank.measured > 20 * MIB, "constants must not matter"
        assert abs(rank.error) <= TOLERANCE, rank


@pytest.mark.multirank
@pytest.mark.parametrize("job", [*ALONE, *TOGETHER], ids=lambda job: job.name)
def test_setting_up_takes_less_than_training(job: Job, found: dict[str, list[Found]]) -> None:
    """Capture, compilation, and the first binding of state, which shards a model that was whole."""
    for rank in found[job.name]:
        assert rank.setup < rank.measured


@pytest.mark.multirank
@pytest.mark.parametrize(
    "job",
    [j for j in (*ALONE, *TOGETHER) if j.is_rewritten and "schedule" not in j.plan],
    ids=lambda job: job.name,
)
def test_the_prediction_for_another_program_is_not_taken_for_it(job: Job, found: dict[str, list[Found]]) -> None:
    for rank in found[job.name]:
        assert rank.wrong / rank.measured - 1 > TOLERANCE


def without_workspace() -> Any:
    return mock.patch.object(lifetimes, "workspace_bytes", lambda node, *, device: 0)


def without_in_place() -> Any:
    return mock.patch.object(lifetimes, "InPlace", lambda step: _never_in_place(step))


def _never_in_place(step: StepGraph) -> Any:
    with mock.patch("fxzero.graph.storage._in_place_form", lambda node: None):
        return lifetimes_in_place(step)


lifetimes_in_place = lifetimes.InPlace


@pytest.mark.multirank
@pytest.mark.parametrize(("fault", "job"), [(without_workspace, ALONE[-1]), (without_in_place, ALONE[4])])
def test_a_model_that_forgets_something_is_seen(fault: Any, job: Job, found: dict[str, list[Found]]) -> None:
    with verifying_less({"zero": 0}):
        step, inputs = prepared(job)
        step(**inputs)
    right = highest_profile(step.graphs)[1].peak_bytes
    with fault():
        wrong = highest_profile(step.graphs)[1].peak_bytes
    (rank,) = found[job.name]
    assert right == rank.predicted
    assert abs(wrong / rank.measured - 1) > TOLERANCE


@pytest.mark.multirank
def test_what_is_not_of_a_step_is_measured(found: dict[str, list[Found]]) -> None:
    """A tensor that the caller keeps is in the account, and is not predicted."""
    (rank,), (beside,) = found[ALONE[-1].name], found[BESIDE]
    assert beside.predicted == rank.predicted
    assert beside.error < -TOLERANCE


def main(path: str, library: str) -> None:
    """Every job of as many ranks as there are; rank 0 writes what all found.

    Args:
        path: of the JSON file.
        library: the built memory_counter.cpp.
    """
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    counter = Counter(library)
    results = {}
    for job in JOBS[ranks]:
        everywhere: list[Any] = [vars(measure(job, counter))]
        if ranks > 1:
            mine, everywhere = everywhere[0], [None] * ranks
            dist.all_gather_object(everywhere, mine)
        results[job.name] = everywhere
    if ranks == 1:
        results[BESIDE] = [vars(measure(ALONE[-1], counter, extra=2 * MIB))]
    if os.environ["RANK"] == "0":
        Path(path).write_text(json.dumps(results))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
