"""What products in pieces are predicted to gain: a step of Llama 70B's widths over tp, whole and in 2, 4, 8 pieces.

    python -m tests.benchmarks.chunked_products                  # two blocks, 1 and 4 rows of 4096 tokens, tp=8

Nothing is allocated: the model is on the meta device, times are those of the simulator for H100s.
"""

import argparse

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

from fxzero import Plan
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.hardware import known_hardware
from fxzero.recipe import recipe
from fxzero.simulate.prediction import predict
from tests.benchmarks.split_plans import LLAMA_70B

TOKENS = 4096
COUNTS = (1, 2, 4, 8, "auto")


def captured(layers, rows):
    """A step in bfloat16 with AdamW."""
    config = transformers.LlamaConfig(**LLAMA_70B, num_hidden_layers=layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.zeros(rows, TOKENS, dtype=torch.long)
    inventory = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters())))[0]
    return capture_step(inventory, None, (), {"input_ids": ids, "labels": ids}).step


def predicted(step, *, tp, schedule, chunks):
    """Milliseconds of a step, and of it those for which compute stands still."""
    keys = {"zero": 0, "hardware": "h100", "lowering": "eager", "memory_budget": "60 GiB"}
    plan = Plan(mesh={"dp": 1, "tp": tp}, schedule=schedule, tp_chunks=chunks, **keys)
    step = step.copy()
    step.mesh = dict(plan.axes)
    found = predict([recipe(plan, backend="nccl").run(step, check=False)], known_hardware("h100"))
    return f"{found.seconds * 1e3:.2f} ({found.timeline.exposed_s * 1e3:.2f})"


def main():
    """The table has been printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tp", type=int, default=8)
    args = parser.parse_args()
    table = []
    for rows in tqdm(args.rows):
        step = captured(args.layers, rows)
        for schedule in ("fixed", "cost"):
            times = [predicted(step, tp=args.tp, schedule=schedule, chunks=chunks) for chunks in COUNTS]
            table.append([f"{rows} x {TOKENS}", schedule, *times])
    print(f"{args.layers} blocks of Llama 70B, tp={args.tp}, bfloat16, H100, torch {torch.__version__}: ms (exposed)")
    headers = ["rows x tokens", "order", "whole", *map(str, COUNTS[1:])]
    print(tabulate(table, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
