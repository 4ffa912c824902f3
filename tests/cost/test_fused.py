"""What calls of compiled regions cost: traffic at their edges, arithmetic inside, products as alone."""

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.cost.compute import compute_seconds
from fxzero.cost.fused import fused_seconds
from fxzero.cost.hardware import Hardware, known_hardware
from fxzero.cost.tasks import step_tasks
from fxzero.graph import StepGraph
from fxzero.graph.regions import mark
from tests.cost.test_tasks import program

aten = torch.ops.aten
# a byte a second, arithmetic for nothing, a call 100 seconds
MEMORY = Hardware("memory", MappingProxyType({torch.float32: 1.0}), 1e18, 1.0, 1.0, 1.0, 100.0)
ARITHMETIC = Hardware("cache", MEMORY.matrix_flops, 0.5, 1e18, 1.0, 1.0, 100.0)
TENSOR_BYTES = 4 * 8 * 8


def region(function: Any, inputs: int = 2) -> StepGraph:
    """A step whose calls are one region."""
    graph = make_fx(function, tracing_mode="fake")(*(torch.empty(8, 8) for _ in range(inputs))).graph
    step = StepGraph(graph)
    mark(0, step.calls())
    return step


def seconds(step: StepGraph, hardware: Hardware = MEMORY) -> dict[Any, float]:
    return {node.target: value for node, value in fused_seconds(step, hardware).items()}


def test_what_stays_inside_does_not_go_through_memory() -> None:
    found = seconds(region(lambda x, y: torch.tanh((x + y).exp())))
    assert found == {
        aten.add.Tensor: 2 * TENSOR_BYTES,
        aten.exp.default: pytest.approx(0.0),
        aten.tanh.default: TENSOR_BYTES + 100,
    }


def test_what_several_calls_read_is_read_once() -> None:
    found = seconds(region(lambda x, y: ((x + y) * x) - y.t()))
    assert found[aten.mul.Tensor] == pytest.approx(0.0)
    assert found[aten.sub.Tensor] == TENSOR_BYTES + 100


def test_arithmetic_is_not_saved() -> None:
    found = seconds(region(lambda x, y: torch.tanh((x + y).exp())), ARITHMETIC)
    assert found[aten.exp.default] == pytest.approx(64 / 0.5)


def test_products_cost_what_they_cost_alone_and_are_given_what_they_read() -> None:
    step = region(lambda x, y: ((x + 1) @ y).exp())
    found = seconds(step)
    assert found == {aten.add.Tensor: 2 * TENSOR_BYTES + 100, aten.exp.default: 2 * TENSOR_BYTES + 100}
    product = next(node for node in step.calls() if node.target is aten.mm.default)
    assert compute_seconds(product, MEMORY) > 0


def test_a_view_of_a_value_is_that_value() -> None:
    found = seconds(region(lambda x, y: (x + y).view(64).exp()))
    assert found[aten.add.Tensor] == 2 * TENSOR_BYTES
    assert found[aten.exp.default] == TENSOR_BYTES + 100


def test_calls_outside_of_regions_cost_what_they_did() -> None:
    step = region(lambda x, y: torch.tanh((x + y).exp()))
    for node in step.calls():
        del node.meta["region"]
    assert fused_seconds(step, MEMORY) == {}


def test_a_program_of_regions_is_predicted_to_be_faster_by_its_memory_alone() -> None:
    def compute(lowering: str) -> tuple[float, float]:
        step, hardware = program(lowering=lowering), known_hardware("cpu")
        found = {node: task.seconds for node, task in step_tasks(step, hardware).items() if task.resource == "compute"}
        products = sum(value for node, value in found.items() if _is_product(node))
        return sum(found.values()) - products, products

    eager, regions = compute("eager"), compute("inductor")
    assert regions[0] < 0.8 * eager[0]
    assert regions[1] == pytest.approx(eager[1])


def _is_product(node: fx.Node) -> bool:
    return node.target in (aten.mm.default, aten.addmm.default)
