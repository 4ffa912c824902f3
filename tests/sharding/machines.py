"""Machines on which it pays to split even small tensors."""

import dataclasses
from pathlib import Path

from fxzero.cost.hardware import Hardware, Link, known_hardware


def without_latencies() -> Hardware:
    """A machine that is to small tensors what an H100 is to large ones: each message and call takes its bytes' time."""
    machine = known_hardware("h100")
    return dataclasses.replace(
        machine,
        name="h100 without latencies",
        op_overhead_s=0.0,
        launch_s=0.0,
        node_link=dataclasses.replace(machine.node_link, latency_s=0.0),
        network_link=dataclasses.replace(machine.network_link, latency_s=0.0),
        ops={name: dataclasses.replace(rate, overhead_s=0.0) for name, rate in machine.ops.items()},
        collectives={name: dataclasses.replace(rate, overhead_s=0.0) for name, rate in machine.collectives.items()},
    )


def free_network() -> Hardware:
    """A machine that computes slowly, and whose ranks exchange anything in no time."""
    machine = without_latencies()
    return dataclasses.replace(
        machine,
        name="free network",
        memory_bytes_s=1e15,
        matrix_flops=dict.fromkeys(machine.matrix_flops, 1e9),
        node_link=Link(0.0, 1e14),
        network_link=Link(0.0, 1e14),
        ops={
            name: dataclasses.replace(rate, bytes_s=tuple(1e9 for _ in rate.bytes_s))
            for name, rate in machine.ops.items()
        },
    )


def free_network_file(folder: Path) -> str:
    """Path of its description."""
    return _described(free_network(), folder)


def without_latencies_file(folder: Path) -> str:
    """Path of its description."""
    return _described(without_latencies(), folder)


def _described(machine: Hardware, folder: Path) -> str:
    path = folder / f"{machine.name.replace(' ', '_')}.toml"
    path.write_text(machine.to_toml())
    return str(path)
