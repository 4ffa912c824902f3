"""Products in pieces on real ranks over gloo: losses of a step of tp are those of whole products.

Run as a module, this file is what each rank does.
"""

import dataclasses
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fxzero
from fxzero.cost.hardware import Link
from tests.numerics.sparing import verifying_less
from tests.numerics.worker import launch_for_results
from tests.passes.test_chunk_products import batch, made
from tests.sharding.machines import free_network

STEPS, ROWS, TOLERANCE = 4, 1, 1e-5
# of the plan: pieces, and what orders the step
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "pieces": {"tp_chunks": 4},
    "pieces, by cost": {"tp_chunks": 2, "schedule": "cost"},
}


def trained(machine: str, **keys: Any) -> dict[str, Any]:
    """Losses of some steps, and the pieces that the program sends."""
    plan = fxzero.Plan(mesh={"tp": 2}, zero=0, hardware=machine, lowering="eager", **keys)
    step = fxzero.compile(*made(), plan)
    losses = [float(step(*batch(ROWS, number))) for number in range(STEPS)]
    return {"losses": losses, "pieces": sum("piece" in node.meta for node in step.graphs[0].calls())}


def main(path: Path, machine: str) -> None:
    """One rank; rank 0 writes what it has found."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with verifying_less({}, broken=False):
        found = {name: trained(machine, **keys) for name, keys in CASES.items()}
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.multirank
@pytest.mark.timeout(180)
def test_ranks_lose_as_much_with_products_in_pieces(tmp_path: Path) -> None:
    link = Link(0.0, 1e9)
    machine = tmp_path / "machine.toml"
    machine.write_text(dataclasses.replace(free_network(), node_link=link, network_link=link).to_toml())
    module = "tests.numerics.test_chunked_products"
    found = launch_for_results(module, tmp_path, str(machine), ranks=2, timeout_s=120)
    model, optimizer = made()
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = model(*batch(ROWS, number))
        loss.backward()
        optimizer.step()
        for name, case in found.items():
            assert case["losses"][number] == pytest.approx(loss.item(), rel=TOLERANCE), (name, number)
    assert found["whole"]["pieces"] == 0 < found["pieces, by cost"]["pieces"] < found["pieces"]["pieces"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
