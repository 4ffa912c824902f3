"""A rank of tests/runtime/test_recorder.py: the same steps with recording and without, and what was seen of them."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero.profile import timeline_of
from fxzero.runtime import recorder as recorder_module
from fxzero.runtime.recording import Recording
from fxzero.simulate.trace import trace_of
from tests.numerics.sparing import sharing_first_capture, verifying_less
from tests.runtime.recorded_faults import faults
from tests.simulate.trace_format import trace_faults

PLANS: dict[str, dict[str, Any]] = {
    "messages": {"zero": 3},
    "native": {"zero": 3, "all_gather": "native", "reduce_scatter": "native"},
    "coalesced": {"zero": 2, "all_gather": "native", "reduce_scatter": "native", "bucket_form": "coalesced"},
    "all_to_all": {"zero": 2, "all_gather": "native", "reduce_scatter": "all_to_all"},
    "replicated": {"zero": 0, "clip_grad_norm": 1.0},
    "microbatches": {"zero": 3, "accumulate": 3},
    "on the host": {"zero": 3, "offload_optimizer": "host", "offload_activations": "host", "offload_below": 64},
}
CAPTURES: dict[str, Any] = {}
FAULTY = "a value that is changed only when recording"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(51, 16), nn.Linear(16, 33), nn.GELU(), nn.Dropout(0.1), nn.Linear(33, 51))


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def losses(plan: dict[str, Any], *, recorded: bool) -> tuple[list[float], Recording | None]:
    """Losses of six steps, of which the middle ones are recorded, or not."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    step = fxzero.compile(module, optimizer, fxzero.Plan(**plan), loss=loss_fn)
    torch.manual_seed(dist.get_rank())
    x = torch.randint(51, (6, 5))
    with sharing_first_capture(CAPTURES, ""):
        found = [step(x).item() for _ in range(2)]
    recording = None
    if recorded:
        recording = step.record(x, steps=3)
    else:
        for _ in range(3):
            step(x)
    return [*found, step(x).item()], recording


def main(path: str) -> None:
    """All plans, then the planted fault; rank 0 writes what the ranks found."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, plan in PLANS.items():
        with verifying_less(plan):
            results[name] = gathered(plan)
    call = recorder_module.RecordingEmitter.call

    def faulty(self: Any, node: Any) -> None:
        call(self, node)
        if node.target is torch.ops.aten.gelu.default:
            self.lines.append(f"    {node.name}.mul_(1.5)")

    recorder_module.RecordingEmitter.call = faulty  # type: ignore[method-assign]
    results[FAULTY] = gathered(PLANS["messages"])
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


def gathered(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank finds under a plan."""
    plain, _ = losses(plan, recorded=False)
    seen, recording = losses(plan, recorded=True)
    assert recording is not None
    sample = recording.typical
    mine = {
        "plain": plain,
        "recorded": seen,
        "samples": len(recording.samples),
        "faults": list(faults(recording)),
        "trace_faults": list(trace_faults(trace_of({"measured": timeline_of(sample)}))),
        "lanes": sorted({event.lane for event in sample.events}),
        "programs": len(sample.steps),
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
