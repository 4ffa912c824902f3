"""Seconds of single calls: which of arithmetic and traffic counts, what takes none, and for which device."""

from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxzero.cost.compute as module
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.compute import compute_seconds, matrix_flops, traffic_bytes
from fxzero.cost.hardware import Hardware, hardware_of, known_hardware
from fxzero.cost.hardware_file import machine_names

aten = torch.ops.aten
# one operation, or one byte, a second
SLOW = Hardware("slow", MappingProxyType({torch.float32: 1.0, torch.bfloat16: 4.0}), 0.5, 1.0, 1.0, 1.0, 100.0)
NO_TRAFFIC = Hardware("cache", SLOW.matrix_flops, 0.5, 1e18, 1.0, 1.0, 100.0)


def calls(function: Any, *inputs: torch.Tensor) -> dict[Any, fx.Node]:
    """op -> the node of its call, from a trace."""
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return {node.target: node for node in graph.nodes if node.op == "call_function"}


def test_a_matrix_product_is_two_operations_a_multiply_and_its_dtype_counts() -> None:
    node = calls(torch.mm, torch.empty(4, 8), torch.empty(8, 16))[aten.mm.default]
    assert matrix_flops(node) == 2 * 4 * 8 * 16
    assert compute_seconds(node, NO_TRAFFIC) == 1024 + 100
    low = calls(torch.mm, torch.empty(4, 8).bfloat16(), torch.empty(8, 16).bfloat16())[aten.mm.default]
    assert compute_seconds(low, NO_TRAFFIC) == 1024 / 4 + 100


def test_the_longer_of_arithmetic_and_traffic_counts() -> None:
    node = calls(torch.mm, torch.empty(1, 64), torch.empty(64, 2))[aten.mm.default]
    assert traffic_bytes(node) == 4 * (64 + 128 + 2)
    assert compute_seconds(node, SLOW) == max(2 * 64 * 2, 4 * 194) + 100


def test_a_pointwise_op_reads_and_writes() -> None:
    node = calls(lambda x, y: x + y, torch.empty(10, 10), torch.empty(10, 10))[aten.add.Tensor]
    assert matrix_flops(node) == 0
    assert compute_seconds(node, SLOW) == 3 * 400 + 100
    assert compute_seconds(node, NO_TRAFFIC) == 100 / 0.5 + 100


def test_views_take_nothing() -> None:
    found = calls(lambda x: torch.unbind(x.t().reshape(2, 8), 0)[1].sum(), torch.empty(4, 4))
    views = {target: compute_seconds(node, SLOW) for target, node in found.items()}
    summed = views.pop(aten.sum.default)
    copied = views.pop(aten.clone.default)
    assert summed > 0 and copied > 0 and set(views.values()) == {0.0}


def test_attention_forward_and_backward_have_their_products() -> None:
    q, k, v = (torch.empty(2, 4, 32, 8, requires_grad=True) for _ in range(3))

    def trained(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out.sum(), (q, k, v))

    found = calls(trained, q, k, v)
    product = 2 * (2 * 4) * 32 * 32 * 8
    assert matrix_flops(found[aten._scaled_dot_product_flash_attention_for_cpu.default]) == 2 * product
    assert matrix_flops(found[aten._scaled_dot_product_flash_attention_for_cpu_backward.default]) == 5 * product
    with mock.patch.object(module, "SAME_FLOPS", {}):  # the twin: torch itself knows no formula for these
        assert matrix_flops(found[aten._scaled_dot_product_flash_attention_for_cpu.default]) == 0


@pytest.mark.parametrize("name", machine_names())
def test_descriptions_are_of_devices_that_could_be(name: str) -> None:
    hardware = known_hardware(name)
    assert hardware.matrix_rate(torch.float32) >= hardware.vector_flops
    assert hardware.matrix_rate(torch.int16) == hardware.matrix_rate(torch.float32)
    assert hardware.memory_bytes_s >= hardware.host_bytes_s >= hardware.disk_bytes_s
    assert hardware.device == "cpu" or hardware.memory_bytes_s > hardware.host_bytes_s  # a CPU's host is its own memory
    assert 0 < hardware.op_overhead_s < 1e-3


def test_the_device_of_a_graph_decides_what_describes_it() -> None:
    model = nn.Linear(4, 4)
    inventory = rehearse(Inventory.of(model, torch.optim.SGD(model.parameters(), lr=0.1)))[0]
    step = capture_step(inventory, lambda m, x: m(x).mean(), (torch.ones(2, 4),), {}).step
    assert hardware_of(step) is known_hardware("cpu")
    val = mock.Mock(spec=torch.Tensor)
    val.device = torch.device("cuda")
    step.placeholders[0].meta["val"] = val
    assert hardware_of(step) is known_hardware("h100")
    named = mock.patch.object(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    with mock.patch.object(torch.cuda, "is_available", lambda: True), named:
        assert hardware_of(step) is known_hardware("h200")
