"""What each of two ranks runs: every case as a compiled step, then under DDP, in one start of the processes.

Before it joins the others each rank takes its part of the cases alone, as a step of one process; with the others it
goes on from the captures of these. A case that fails on all ranks alike does not end the loop. Rank 0 writes one JSON
object a case, a list with what each rank found.
"""

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fxzero
from fxzero.errors import CaptureError
from tests.hf.models import CASES, HFCase
from tests.numerics.reference import double_gradient, num_programs, planted, tensors_of
from tests.numerics.sparing import sharing_first_capture, verifying_less

STEPS = 5
FAULT = "llama doubled gradient"


def build(case: HFCase, *, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer; each rank draws other values, those of rank 0 must win.

    SGD, because Adam does not see a gradient that is wrong by a factor.
    """
    torch.manual_seed(rank)
    model = case.model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(trainable, lr=0.1, momentum=0.9)


def run_ddp(case: HFCase, *, rank: int) -> tuple[list[float], nn.Module]:
    """The losses of the loop that everybody writes, and the trained model."""
    model, optimizer = build(case, rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has no successor yet
        replicated = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    generator = start(rank)
    losses = []
    for _ in range(STEPS):
        loss = case.train(replicated, case.batch(generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def run_compiled(case: HFCase, *, rank: int) -> tuple[list[float], fxzero.TrainStep]:
    """The losses of the same job under ZeRO-3."""
    model, optimizer = build(case, rank=rank)
    step = fxzero.compile(model, optimizer, fxzero.Plan(zero=3), loss=case.loss)
    generator = start(rank)
    return [step(**case.batch(generator)).item() for _ in range(STEPS)], step


def run_alone(case: HFCase, *, rank: int) -> dict[str, Any]:
    """What a step of one process finds: `difference` is that of its loss to the plain loop's."""
    model, optimizer = build(case, rank=rank)
    batch = case.batch(start(rank))
    expected = case.train(model, batch).item()
    step = fxzero.compile(model, optimizer, fxzero.Plan(), loss=case.loss)
    start(rank)
    try:
        with verifying_less({"zero": 0}):
            loss = step(**batch).item()
    except CaptureError as error:
        return {"error": "", "refused": str(error)}
    except Exception:
        return {"error": traceback.format_exc(), "refused": ""}
    return {"error": "", "refused": "", "difference": abs(loss - expected), "programs": num_programs(step)}


def start(rank: int) -> torch.Generator:
    """Seed dropout; returns the source of this rank's batches."""
    torch.manual_seed(100 + rank)
    return torch.Generator().manual_seed(5 + 1000 * rank)


def run(case: HFCase, *, rank: int, broken: bool) -> dict[str, Any]:
    """What one rank finds: `difference` is the largest between two losses of one step.

    After the steps the whole parameters and buffers are compared too.
    """
    found: dict[str, Any] = {"error": "", "refused": ""}
    started = time.perf_counter()
    try:
        if broken:
            with planted(double_gradient):
                losses, step = run_compiled(case, rank=rank)
        else:
            with verifying_less({"zero": 3}):
                losses, step = run_compiled(case, rank=rank)
    except CaptureError as error:
        return found | {"refused": str(error)}
    except Exception:
        return found | {"error": traceback.format_exc()}
    seconds = time.perf_counter() - started
    got = tensors_of(step.model)
    expected, model = run_ddp(case, rank=rank)
    return found | {
        "difference": max(abs(a - b) for a, b in zip(expected, losses, strict=True)),
        "parameter_difference": max((v - got[k]).abs().max().item() for k, v in tensors_of(model).items()),
        "losses": losses,
        "nodes": len(step.captured.graph.nodes),
        "nodes_sharded": len(step.graph.graph.nodes),
        "capture_s": step._require_last()[-1].capture.seconds,
        "seconds": seconds,
        "programs": num_programs(step),
        "sharded": sum(any(place.is_shard() for place in p.placements) for p in step.model.parameters()),
    }


def main(path: str, *names: str) -> None:
    """Run the named cases, or all and one with a planted fault, on this rank."""
    rank, world_size = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE"))
    names = names or (*CASES, FAULT)
    captures: dict[str, Any] = {}
    alone = {}
    for name in [name for name in names if name in CASES and not CASES[name].refused][rank::world_size]:
        with sharing_first_capture(captures, name):
            alone[name] = run_alone(CASES[name], rank=rank)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = {}
    for name in names:
        known_as = name.partition(" ")[0]
        with sharing_first_capture(captures, known_as):
            mine = run(CASES[known_as], rank=rank, broken=name == FAULT) | {"alone": alone.get(name)}
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, mine)
        results[name] = found
        if rank == 0:
            Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
