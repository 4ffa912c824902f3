"""Captured steps to be split: small models on the meta device."""

import functools

import torch
import transformers
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.graph import StepGraph


@functools.cache
def llama_step(layers: int, *, rows: int = 1, tokens: int = 4096, width: int = 4096) -> StepGraph:
    """A step of a Llama in bfloat16 with AdamW; nothing of it is allocated. Copy it before you change it."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=8,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    inventory = rehearse(Inventory.of(model, optimizer))[0]
    return capture_step(inventory, None, (), {"input_ids": ids, "labels": ids}).step


def step_on(layers: int, *, tp: int, dp: int = 1, **sizes: int) -> StepGraph:
    """The same, for a mesh."""
    step = llama_step(layers, **sizes).copy()
    step.mesh = {"dp": dp, "tp": tp}
    return step


def linears_step(*, width: int = 8192, tokens: int = 4096, tp: int) -> StepGraph:
    """A step of two square matrices in an `nn.Sequential`; nothing of it is allocated."""
    first, second = (nn.Linear(width, width, bias=False, device="meta", dtype=torch.bfloat16) for _ in range(2))
    model = nn.Sequential(first, nn.ReLU(), second)
    optimizer = torch.optim.SGD(model.parameters())
    x = torch.zeros(tokens, width, dtype=torch.bfloat16)
    step = capture_step(Inventory.of(model, optimizer), lambda model, x: model(x).square().mean(), (x,), {}).step
    step.mesh = {"dp": 1, "tp": tp}
    return step
