"""Machines on which it pays to split even small tensors."""

import dataclasses
from pathlib import Path

from fxzero.cost.hardware import Hardware, Link, known_hardware


def free_network() -> Hardware:
    """A machine that computes slowly, and whose ranks exchange anything in no time."""
    machine = known_hardware("h100")
    return dataclasses.replace(
        machine,
        name="free network",
        op_overhead_s=0.0,
        launch_s=0.0,
        memory_bytes_s=1e15,
        matrix_flops=dict.fromkeys(machine.matrix_flops, 1e9),
        node_link=Link(0.0, 1e14),
        network_link=Link(0.0, 1e14),
        ops={
            name: dataclasses.replace(rate, overhead_s=0.0, bytes_s=tuple(1e9 for _ in rate.bytes_s))
            for name, rate in machine.ops.items()
        },
        collectives={name: dataclasses.replace(rate, overhead_s=0.0) for name, rate in machine.collectives.items()},
    )


def free_network_file(folder: Path) -> str:
    """Path of its description."""
    path = folder / "free_network.toml"
    path.write_text(free_network().to_toml())
    return str(path)
