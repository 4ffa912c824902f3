"""transformers' Trainer with torch_compile_backend="fxzero": the losses of eager code."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fxzero.backend import allow_in_accelerate, fxzero_backend, programs
from tests.hf.models import CASES

STEPS = 8
LENGTH = 16


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the entry point of an installed fxzero; and nothing is looked for on the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "fxzero" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(fxzero_backend, name="fxzero")
    known = importlib.import_module("accelerate.utils").DynamoBackend
    monkeypatch.setattr(known, "_missing_", known._missing_)  # as it was, when the test is over
    for variable in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{variable}", "no" if variable == "BACKEND" else "default")
    allow_in_accelerate()


def rows(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of a source file of the standard library, byte by byte."""
    text = torch.tensor(list(Path(importlib.import_module("argparse").__file__).read_bytes()[: 64 * LENGTH]))
    return [{"input_ids": piece, "labels": piece} for piece in (text % (vocabulary - 4) + 4).split(LENGTH)]


def losses(name: str, folder: Path, options: dict[str, Any] | None = None, **arguments: Any) -> list[float]:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = CASES[name].model()
    if options is not None:
        model.compile(backend=fxzero_backend, options=options)
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        logging_steps=1,
        learning_rate=1e-2,
        seed=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows(model.config.vocab_size))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt2_checkpointed"])
def test_trainer_trains_as_in_eager_code(name: str, tmp_path: Path) -> None:
    """GPT-2 with its dropout; with layers that the model itself has computed again in backward, too."""
    want = losses(name, tmp_path)
    got = losses(name, tmp_path, torch_compile=True, torch_compile_backend="fxzero")
    assert got == want and len(got) == STEPS and got[-1] < got[0]
    assert any(step.title.startswith("backward") for step in programs())


def test_trainer_with_accumulation_and_clipping(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    want = losses("llama", tmp_path, **settings)
    assert losses("llama", tmp_path, torch_compile=True, torch_compile_backend="fxzero", **settings) == want


def test_a_compiled_model_goes_to_trainer_with_options(tmp_path: Path) -> None:
    want = losses("gpt2", tmp_path)
    assert losses("gpt2", tmp_path, {"recompute": "blocks"}) == want
    assert any(step.title.startswith("backward") for step in programs())


def test_accelerate_knows_other_names_as_before() -> None:
    known = importlib.import_module("accelerate.utils").DynamoBackend
    assert known("INDUCTOR") is known.INDUCTOR and known("FXZERO").value.lower() == "fxzero"
    with pytest.raises(ValueError, match="'FXZER' is not a valid DynamoBackend"):
        known("FXZER")
