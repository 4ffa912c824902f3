"""What each of two ranks runs: the decoder under ZeRO-3, compiled and eager; rank 0 writes what they found."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fxzero
from tests.lower.models import Decoder, tokens

STEPS = 6
PLANS = {
    "zero3 across steps": {"zero": 3, "cross_step": True},
    "zero1 clipped, two microbatches": {"zero": 1, "clip_grad_norm": 0.5, "accumulate": 2},
}


def train(lowering: str, **keys: object) -> tuple[list[float], list[torch.Tensor], fxzero.TrainStep]:
    """Losses, whole parameters, and the step."""
    torch.manual_seed(dist.get_rank())
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = fxzero.compile(model, optimizer, fxzero.Plan(lowering=lowering, **keys))
    losses = [step(*tokens(2 * index + dist.get_rank(), rows=4)).item() for index in range(STEPS)]
    with step.unsharded() as whole:
        parameters = [parameter.detach().clone() for parameter in whole.parameters()]
    return losses, parameters, step


def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, keys in PLANS.items():
        losses, parameters, step = train("inductor", **keys)
        expected, wanted, _ = train("eager", **keys)
        lowered = step._last[-1].program.lowered
        assert lowered is not None
        own = {
            "loss": max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)),
            "parameters": max((a - b).abs().max().item() for a, b in zip(parameters, wanted, strict=True)),
            "equal": losses == expected,
            "distinct": lowered.num_distinct,
            "compiled": lowered.num_compiled,
        }
        ranks: list[dict[str, float] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        found[name] = ranks
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
