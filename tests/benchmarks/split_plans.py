"""What is found for a mesh axis: cost beside its bound, bytes, and how long it takes, for models of real widths.

    python -m tests.benchmarks.split_plans                      # eight architectures, two blocks of each
    python -m tests.benchmarks.split_plans --depths 8 32 80     # Llama 70B at several depths: the solver's time

Nothing is allocated: models are on the meta device, costs those of H100s in nodes of eight. For Llama the bytes stand
beside those of Megatron-LM with sequence parallelism, by its formulas (tests/sharding/test_solve.py has the source).
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import known_hardware
from fxzero.graph import collectives as c10d
from fxzero.passes.split_tensors import rewrite
from fxzero.sharding.problem import problem_of
from fxzero.sharding.rules import Rules
from fxzero.sharding.solve import solve
from tests.sharding.test_solve import megatron_bytes

TOKENS = 4096
LLAMA_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "use_cache": False,
}
# class, config, sizes of a published model (Llama 2 70B, GPT-3 1.3B as a GPT-2, Qwen3 8B, Gemma 2 9B, T5 3B, BERT
# large, ViT huge, Mixtral 8x7B); the number of blocks is set below
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_70B),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 2048, "n_head": 32, "n_positions": TOKENS, "vocab_size": 50304},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 151936, "head_dim": 128, "use_cache": False},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"vocab_size": 256000, "head_dim": 256, "use_cache": False},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32, "vocab_size": 32128, "use_cache": False}
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 30592}
        | {"max_position_embeddings": TOKENS},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 1280, "num_attention_heads": 16, "intermediate_size": 5120, "patch_size": 14},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "use_cache": False},
    ),
}
DEPTH_KEYS = {"n_layer", "num_hidden_layers", "num_layers"}


def captured(name, layers):
    """A step of a model in bfloat16 with AdamW."""
    model_class, config_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**sizes)
    for key in DEPTH_KEYS & set(vars(config) | type(config).attribute_map):
        setattr(config, key, layers)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config).to(torch.bfloat16)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    batch, loss = {"input_ids": ids, "labels": ids}, None
    if name == "vit":
        batch, loss = {"pixels": torch.zeros(32, 3, 224, 224, dtype=torch.bfloat16)}, vit_loss
    inventory = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters())))[0]
    return capture_step(inventory, loss, (), batch).step


def vit_loss(model, pixels):
    """Any loss of a classifier."""
    return model(pixel_values=pixels).logits.float().logsumexp(-1).mean()


def measured(name, layers, *, tp, dp):
    """What is found for a model: figures by name."""
    began = time.perf_counter()
    step = captured(name, layers)
    capture_s = time.perf_counter() - began
    step.mesh, calls = {"dp": dp, "tp": tp}, len(step.calls())
    began = time.perf_counter()
    problem = problem_of(step, "tp", Rules(tp), known_hardware("h100"))
    build_s = time.perf_counter() - began
    began = time.perf_counter()
    answer = solve(problem)
    solve_s = time.perf_counter() - began
    began = time.perf_counter()
    rewrite(step, axis="tp", ways={node: answer.strategy(node) for node in problem.of_node})
    rewrite_s = time.perf_counter() - began
    alone_s = sum(unit.count * unit.seconds[0] for unit in problem.units)
    sent = sum(c10d.wire_bytes(node, step.mesh) for node in step.calls() if c10d.is_collective(node))
    by_hand = megatron_bytes(layers, tokens=TOKENS, width=LLAMA_70B["hidden_size"], tp=tp)
    return {
        "model": name,
        "layers": layers,
        "calls": calls,
        "units": len(problem.units),
        "one_rank_ms": alone_s * 1e3,
        "answer_ms": answer.seconds * 1e3,
        "relaxed_ms": answer.relaxed_s * 1e3,
        "bound_ms": answer.bound_s * 1e3,
        "gap": answer.gap,
        "sent_mb": sent / 1e6,
        "megatron_mb": by_hand / 1e6 if name == "llama" else math.nan,
        "capture_s": capture_s,
        "build_s": build_s,
        "solve_s": solve_s,
        "rewrite_s": rewrite_s,
    }


def table(rows):
    """The figures as people read them."""
    shown = []
    for row in rows:
        megatron = "" if math.isnan(row["megatron_mb"]) else f"{row['megatron_mb']:,.1f}"
        milliseconds = (f"{row[key]:.2f}" for key in ("one_rank_ms", "answer_ms", "relaxed_ms", "bound_ms"))
        seconds = (f"{row[key]:.2f}" for key in ("capture_s", "build_s", "solve_s", "rewrite_s"))
        sizes = (row["model"], row["layers"], f"{row['calls']:,}", row["units"])
        shown.append([*sizes, *milliseconds, f"{row['gap']:.2%}", f"{row['sent_mb']:,.1f}", megatron, *seconds])
    headers = [
        "model",
        "blocks",
        "calls",
        "units",
        "one rank ms",
        "answer ms",
        "LP bound ms",
        "proven bound ms",
        "gap",
        "sent MB a rank",
    ]
    headers += ["Megatron MB", "capture s", "build s", "solve s", "rewrite s"]
    return tabulate(shown, headers=headers, disable_numparse=True)


def main():
    """The table has been printed, and the figures written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--depths", nargs="+", type=int, help="of Llama 70B, instead of the models")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--dp", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    asked = [("llama", depth) for depth in args.depths] if args.depths else [(name, 2) for name in args.models]
    rows = [measured(name, depth, tp=args.tp, dp=args.dp) for name, depth in tqdm(asked)]
    print(f"mesh dp={args.dp} tp={args.tp}, bfloat16, {TOKENS} tokens, costs of H100, torch {torch.__version__}")
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
