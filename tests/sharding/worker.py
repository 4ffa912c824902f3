"""What each of several ranks runs: models split over tp, beside ZeRO over dp, from the same weights as one rank has.

    torchrun --nproc-per-node 4 -m tests.sharding.worker out.json machine.toml all

Rank 0 writes, by case, the losses of each step (their mean over ranks) and the greatest difference of a parameter to
those that one rank has after the same steps, on all batches of dp at once.
"""

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fxzero
from tests.hf.models import CASES, HFCase
from tests.numerics.sparing import sharing_first_capture, verifying_less

STEPS = {"all": 10, "few": 4}
MODELS = ("llama", "gpt2", "qwen3", "gemma2", "t5", "bert", "vit", "mixtral")


def build(case: HFCase) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer: SGD, because Adam does not see a gradient that is wrong by a factor."""
    torch.manual_seed(0)
    model = case.model()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(case: HFCase, parts: int, *, steps: int) -> list[list[dict[str, Any]]]:
    """Of each step, a batch for each rank of dp."""
    generator = torch.Generator().manual_seed(5)
    return [[case.batch(generator) for _ in range(parts)] for _ in range(steps)]


def seed(step: int, part: int) -> None:
    """What a batch draws depends on it alone."""
    torch.manual_seed(1000 * step + part)


def on_one_rank(case: HFCase, parts: int, *, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Mean losses and the trained parameters of the loop that everybody writes."""
    model, optimizer = build(case)
    losses = []
    for index, step in enumerate(batches(case, parts, steps=steps)):
        found = []
        for part, batch in enumerate(step):
            seed(index, part)
            loss = case.train(model, batch)
            (loss / parts).backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(found) / parts)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def on_all_ranks(case: HFCase, plan: dict[str, Any], *, steps: int) -> tuple[list[float], fxzero.TrainStep]:
    """The same under a plan."""
    model, optimizer = build(case)
    step = fxzero.compile(model, optimizer, fxzero.Plan(**plan), loss=case.loss)
    parts = plan["mesh"]["dp"]
    part = dist.get_rank() // plan["mesh"]["tp"]
    losses = []
    for index, batch in enumerate(batches(case, parts, steps=steps)):
        seed(index, part)
        loss = step(**batch[part]).clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses, step


def cases(machine: str, *, everything: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> model and plan, for as many ranks as run."""
    world_size = dist.get_world_size()
    found = {}
    if world_size == 2:
        chosen = [(name, {"dp": 1, "tp": 2}, 0) for name in (MODELS if everything else ("llama",))]
    else:
        pairs = [(name, zero) for name in MODELS for zero in range(4)]
        few = [("gpt2", 1), ("mixtral", 2), ("llama", 3)]
        chosen = [(name, {"dp": 2, "tp": 2}, zero) for name, zero in (pairs if everything else few)]
        chosen += [(name, {"dp": 1, "tp": 4}, 0) for name in (MODELS if everything else ("qwen3",))]
    for name, mesh, zero in chosen:
        label = f"{name} {' '.join(f'{axis}={size}' for axis, size in mesh.items())} zero={zero}"
        found[label] = name, {"mesh": mesh, "zero": zero, "hardware": machine, "lowering": "eager"}
    return found


def main(path: str, machine: str, which: str = "few") -> None:
    """Run all cases on this rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results, captures = {}, {}  # type: ignore[var-annotated]
    expected: dict[tuple[str, int], Any] = {}
    for label, (name, plan) in cases(machine, everything=which == "all").items():
        case, parts = CASES[name], plan["mesh"]["dp"]
        with sharing_first_capture(captures, name), verifying_less(plan):
            losses, step = on_all_ranks(case, plan, steps=STEPS[which])
        split = sum(any(p.is_shard() for p in parameter.placements[:1]) for parameter in step.model.parameters())
        with step.unsharded() as whole:
            got = {name: parameter.detach() for name, parameter in whole.named_parameters()}
        if dist.get_rank():
            continue
        if (name, parts) not in expected:
            expected[(name, parts)] = on_one_rank(case, parts, steps=STEPS[which])
        right, parameters = expected[(name, parts)]
        results[label] = {
            "losses": losses,
            "loss_difference": max(abs(a - b) for a, b in zip(right, losses, strict=True)),
            "difference": max((got[key] - value).abs().max().item() for key, value in parameters.items()),
            "split": split,
            "parameters": len(got),
        }
        print(label, {key: value for key, value in results[label].items() if key != "losses"}, flush=True)
    if not dist.get_rank():
        Path(path).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ, "run under torchrun"
    main(*sys.argv[1:])
