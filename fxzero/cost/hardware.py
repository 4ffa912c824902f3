"""What a device does in a second, as an argument of every estimate: figures of data sheets, not of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from fxzero.graph import StepGraph

_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Hardware:
    """One device with its host.

    Args:
        name: as people call it.
        matrix_flops: floating point operations a second of matrix products, by dtype; other dtypes go as float32.
        vector_flops: of everything else, a second.
        memory_bytes_s: bytes a second between the device and its own memory.
        host_bytes_s: bytes a second between the device and the host's memory, one way.
        disk_bytes_s: bytes a second between the host and its disk.
        op_overhead_s: seconds that any op takes, however small.
    """

    name: str
    matrix_flops: Mapping[torch.dtype, float]
    vector_flops: float
    memory_bytes_s: float
    host_bytes_s: float
    disk_bytes_s: float
    op_overhead_s: float

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating point operations a second of matrix products in `dtype`."""
        return self.matrix_flops.get(dtype, self.matrix_flops[torch.float32])

    def tier_bytes_s(self, tier: str) -> float:
        """Bytes a second between the device and "host" or "nvme", one way."""
        return self.host_bytes_s if tier == "host" else min(self.host_bytes_s, self.disk_bytes_s)

    def slowdown(self, resource: str) -> float:
        """By what factor compute takes longer while a lane of this name is busy; 1.0: it does not."""
        return 1.0


def _rates(*, single: float, low: float) -> Mapping[torch.dtype, float]:
    return MappingProxyType({torch.float32: single, **dict.fromkeys(_LOW, low)})


# Dense rates. float32 products as torch runs them by default: on the vector units, without TF32.
# A core or two of a server CPU: AVX-512, two memory channels; the rates are those that one process commonly sees.
CPU = Hardware("cpu", _rates(single=1e11, low=5e10), 2e10, 1.2e10, 1e10, 1e9, 4e-6)
# NVIDIA A100 80GB SXM data sheet (2021): FP32 19.5, BF16 312 TFLOP/s, 2,039 GB/s, PCIe 4.0 x16 (31.5 GB/s a way).
A100 = Hardware("A100", _rates(single=19.5e12, low=312e12), 19.5e12, 2.039e12, 3.15e10, 5e9, 5e-6)
# NVIDIA H100 SXM data sheet (2023): FP32 67, BF16 989 TFLOP/s without sparsity, 3.35 TB/s, PCIe 5.0 x16 (63 GB/s).
H100 = Hardware("H100", _rates(single=67e12, low=989e12), 67e12, 3.35e12, 6.3e10, 5e9, 5e-6)
# NVIDIA H200 SXM data sheet (2024): as H100, but 4.8 TB/s.
H200 = Hardware("H200", _rates(single=67e12, low=989e12), 67e12, 4.8e12, 6.3e10, 5e9, 5e-6)


def hardware_of(step: StepGraph, *, backend: str = "") -> Hardware:
    """The description for the device that a graph's tensors lie on.

    A GPU is known by its name; one of another name, or of a machine that is not this one, counts as an H100.

    Args:
        step: the graph.
        backend: what carries collectives; "nccl" stands for GPUs, though a meta model is traced on the CPU.
    """
    kinds = {val.device.type for node in step.placeholders if isinstance(val := node.meta.get("val"), torch.Tensor)}
    if "cuda" not in kinds and backend != "nccl":
        return CPU
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((known for known in (A100, H200) if known.name in name), H100)
