"""Training a Llama of 1.2B parameters in bf16 on one GPU: tokens a second and peak memory, fxzero beside torch.compile.

    python -m tests.benchmarks.llama --json out/llama.json
    python -m tests.benchmarks.llama --variants fxzero fxzero+graph            # with a CUDA graph and without
    python -m tests.benchmarks.llama --device cpu --size tiny --rounds 2       # everything but the figures

The model is transformers' LlamaForCausalLM with the shape of Llama 3.2 1B (16 layers of 2048, vocabulary 128,256, tied
head) and random weights, its text the standard library's sources by bytes. All variants keep weights and AdamW's state
in fp32 and multiply in bf16: the peer under torch.autocast, fxzero with precision="bf16". Each holds 19 GiB at rest,
all at a time. They run in turns, each round a few steps. Columns:

    step ms     median of the rounds (least..greatest)
    tokens/s    of the median
    / first     tokens/s over those of the first variant, medians
    peak GiB    what a variant holds at rest, and the most that its steps add to it (torch's allocator; GPU only)
    / first     the same
    loss        after the last step: variants differ by how bf16 rounds
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxzero

SIZES: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
PLAN: dict[str, Any] = {"zero": 0, "precision": "bf16", "lowering": "inductor"}
# name -> further keys of fxzero's plan; None: the peer
VARIANTS: dict[str, dict[str, Any] | None] = {
    "compile": None,
    "fxzero": {},
    "fxzero+kernels": {"kernels": True},
    "fxzero+kernels+chunks": {"kernels": True, "chunk_loss": "auto"},
    "fxzero+graph": {"cuda_graph": True},
}
STEPS = 4  # of a round
WARM_UP = 4
GIB = 2**30

Step = Callable[[torch.Tensor], torch.Tensor]


def model_of(size: str, device: str) -> nn.Module:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=True, use_cache=False, max_position_embeddings=8192)
    with torch.device(device):
        return LlamaForCausalLM(config)


def compiled_step(model: nn.Module, device: str) -> Step:
    """The loop that a user writes: the model compiled as a whole, autocast, torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)

    def step(text: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def fxzero_step(model: nn.Module, keys: dict[str, Any]) -> Step:
    """The same by one compiled program."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    compiled = fxzero.compile(model, optimizer, fxzero.Plan(**{**PLAN, **keys}))
    return lambda text: compiled(input_ids=text, labels=text)


def corpus() -> torch.Tensor:
    """The standard library's top-level sources, a token a byte."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray().join(file.read_bytes() for file in files), dtype=torch.uint8)


class Variant:
    """One way to train, warm, and what was seen of it.

    Args:
        name: of VARIANTS.
        args: the command line's.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device, self.rows, self.columns = args.device, args.rows, args.columns
        self.text, self.count, self.loss = corpus(), 0, 0.0
        self.step_s: list[float] = []
        self.added = 0
        before = self._held()
        model, keys = model_of(args.size, args.device), VARIANTS[name]
        self.step = compiled_step(model, args.device) if keys is None else fxzero_step(model, keys)
        for _ in range(WARM_UP):
            self.loss = float(self.step(self.batch()))
        self.at_rest = self._held() - before

    @property
    def peak_bytes(self) -> int:
        """At rest, and what steps add."""
        return self.at_rest + self.added

    def batch(self) -> torch.Tensor:
        """The next rows of text, the same for every variant."""
        generator = torch.Generator().manual_seed(self.count)
        self.count += 1
        starts = torch.randint(len(self.text) - self.columns, (self.rows,), generator=generator)
        rows = torch.stack([self.text[start : start + self.columns] for start in starts.tolist()])
        return rows.long().to(self.device)

    def round(self) -> None:
        """Some steps, timed together."""
        batches = [self.batch() for _ in range(STEPS)]
        held = self._held()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        for text in batches:
            loss = self.step(text)
        self.loss = float(loss)  # waits for the device
        self.step_s.append((time.perf_counter() - began) / STEPS)
        if self.device == "cuda":
            self.added = max(self.added, torch.cuda.max_memory_allocated() - held)

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0


def rows_of(variants: dict[str, Variant], tokens: int) -> list[dict[str, Any]]:
    """The table."""
    first = next(iter(variants.values()))
    out = []
    for name, variant in variants.items():
        median = statistics.median(variant.step_s)
        out.append(
            {
                "variant": name,
                "step ms": f"{median * 1e3:.1f} ({min(variant.step_s) * 1e3:.1f}..{max(variant.step_s) * 1e3:.1f})",
                "tokens/s": tokens / median,
                "/ first": statistics.median(a / b for a, b in zip(first.step_s, variant.step_s, strict=True)),
                "peak GiB": variant.peak_bytes / GIB,
                "peak / first": variant.peak_bytes / first.peak_bytes if first.peak_bytes else 0.0,
                "loss": variant.loss,
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="the first one is what others are held against")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--columns", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device on this machine: there is nothing to time\n")
    names = args.variants or [name for name in VARIANTS if name != "fxzero+graph"]
    variants = {name: Variant(name, args) for name in names}
    for _ in range(args.rounds):
        for variant in variants.values():
            variant.round()
    rows = rows_of(variants, args.rows * args.columns)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {args.rows} x {args.columns} tokens a step, {args.rounds} rounds")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
