"""What each call of a real program occupies: lanes, classes, one estimate for equal calls, recorded times first."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxzero.cost.tasks as module
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.compute import compute_seconds
from fxzero.cost.hardware import Hardware, OpRate, known_hardware
from fxzero.cost.op_classes import MATRIX_CLASSES, MEMORY_CLASSES, op_class
from fxzero.cost.recorded import costs_from
from fxzero.cost.signature import signature
from fxzero.cost.tasks import FREE, Task, step_tasks
from fxzero.graph import StepGraph, swap_ops
from fxzero.graph import collectives as c10d
from fxzero.graph.step_graph import yields_scalar
from fxzero.graph.storage import InPlace
from fxzero.plan import Plan
from fxzero.recipe import captured_as, recipe

aten = torch.ops.aten
H100 = known_hardware("h100")


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return F.cross_entropy(hidden.flatten(0, 1) @ self.embed.weight.t(), x.flatten())


@functools.cache
def program(layers: int = 2, backend: str = "gloo", world: int = 2, **keys: Any) -> StepGraph:
    plan = Plan(**keys).resolve(world)
    model = Tower(layers)
    inventory = rehearse(Inventory.of(model, torch.optim.AdamW(model.parameters(), lr=1e-3)))[0]
    x = torch.zeros(4, 16, dtype=torch.int64)
    step = capture_step(inventory, None, (x,), {}, options=captured_as(plan)).step
    step.mesh = dict(plan.axes)
    return recipe(plan, backend=backend).run(step, check=False)


@pytest.mark.parametrize("name", ["cpu", "h100"])
@pytest.mark.parametrize(
    "keys",
    [
        {"zero": 3},
        {"zero": 2, "precision": "bf16"},
        {"zero": 3, "compress_gathers": "int8", "compress_reductions": "int8"},
        {"zero": 1, "offload_optimizer": "host", "offload_below": 0, "update_on_host": 1.0},
        {"zero": 3, "offload_parameters": "nvme", "offload_below": 0},
    ],
    ids=str,
)
def test_every_node_has_a_task_on_the_lane_of_its_kind(name: str, keys: dict[str, Any]) -> None:
    step, hardware = program(**keys), known_hardware(name)
    tasks = step_tasks(step, hardware)
    assert list(tasks) == list(step.graph.nodes)
    for node, task in tasks.items():
        assert task.seconds >= 0 and task.launch_s >= 0
        lane = task.resource.partition(":")[0]
        if c10d.is_collective(node):
            assert task.resource == "net:dp" and task.seconds > 0 and task.launch_s > 0
        elif swap_ops.is_launch(node):
            assert lane in ("d2h", "h2d", "nvme") and task.seconds > 0
        elif node.op != "call_function" or c10d.is_release(node):
            assert task == FREE
        else:
            assert lane in ("", "compute", "host")
            assert (lane == "host") <= (hardware.device == "cuda" and swap_ops.is_off_device(node))
    lanes = {task.resource for task in tasks.values()}
    if "update_on_host" in keys:
        assert ("host" in lanes) == (name == "h100")
    if "offload_parameters" in keys:
        assert "nvme" in lanes


def test_one_copy_engine_has_one_lane() -> None:
    step = program(zero=1, offload_optimizer="host", offload_below=0)
    swaps = step.calls(swap_ops.swap_in, swap_ops.swap_out)
    assert {step_tasks(step, H100)[node].resource for node in swaps} == {"d2h", "h2d"}
    assert {step_tasks(step, replace(H100, copy_engines=1))[node].resource for node in swaps} == {"d2h"}


def test_equal_calls_are_estimated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[fx.Node] = []

    def counted(node: fx.Node, hardware: Hardware, **how: Any) -> float:
        asked.append(node)
        return compute_seconds(node, hardware, **how)

    monkeypatch.setattr(module, "compute_seconds", counted)
    counts = []
    for layers in (2, 4):
        asked.clear()
        step = program(layers, zero=3)
        tasks = step_tasks(step, H100)
        counts.append((len(asked), sum(task.resource == "compute" for task in tasks.values())))
    assert counts[0][0] == counts[1][0] < counts[0][1] < counts[1][1]


def test_equal_signatures_take_equal_times() -> None:
    step = program(zero=3)
    forms = InPlace(step).forms
    tasks = step_tasks(step, H100)
    found: dict[str, Task] = {}
    for node, task in tasks.items():
        if node.op == "call_function":
            text = signature(node, step.mesh, form=forms.get(node))
            assert found.setdefault(text, task) == task


def test_signatures_tell_apart_what_takes_other_times() -> None:
    step = program(zero=3)
    (product, *_) = step.calls(aten.mm.default)
    text = signature(product, step.mesh)
    assert text.startswith("aten.mm.default(f32[")
    val = product.args[0].meta["val"]  # type: ignore[union-attr]
    shapes = [torch.empty(val.shape, dtype=torch.bfloat16, device="meta"), val.new_empty((1, *val.shape))[0].t()]
    for other in shapes:
        source: Any = product.args[0]
        before, source.meta["val"] = source.meta["val"], other
        assert signature(product, step.mesh) != text
        source.meta["val"] = before
    (launch, *_) = step.calls(c10d.all_gather)
    (wait,) = launch.users
    assert signature(launch, step.mesh) != signature(launch, {"dp": 4})
    assert signature(wait, step.mesh) == f"wait for {signature(launch, step.mesh)}"
    assert signature(product, step.mesh, form=aten.mm.out) != text


def test_recorded_launches_hold_compute_as_long_as_they_did() -> None:
    step = program(zero=3)
    launches = [node for node in step.calls() if node.target is c10d.all_gather]
    found = costs_from(step, dict.fromkeys(launches, 2.0), launch_s={launches[0].name: 0.5, "mm": 1.0})
    tasks = step_tasks(step, H100, recorded=found)
    form = signature(launches[0], step.mesh)
    for node in launches:
        alike = signature(node, step.mesh) == form
        assert tasks[node] == Task("net:dp", 2.0, 0.5 if alike else step_tasks(step, H100)[node].launch_s)
    assert step_tasks(step, H100, recorded=costs_from(step, dict.fromkeys(launches, 2.0)))[launches[0]].launch_s != 0.5


def test_what_a_launch_hands_over_holds_compute() -> None:
    step = program(zero=3)
    launch = next(node for node in step.calls() if node.target is c10d.all_gather)
    by_bytes = replace(H100, launch_s=1e-3, launch_bytes_s=1e6)
    size = launch.meta["val"].numel() * launch.meta["val"].element_size()
    assert step_tasks(step, by_bytes)[launch].launch_s == pytest.approx(1e-3 + size / 1e6)
    assert step_tasks(step, replace(by_bytes, launch_bytes_s=0.0))[launch].launch_s < 1e-3 + size / 1e6  # the twin


def test_recorded_times_come_first() -> None:
    step = program(zero=3)
    plain = step_tasks(step, H100)
    (product, *_), (launch, *_) = step.calls(aten.mm.default), step.calls(c10d.all_gather)
    recorded = costs_from(step, {product.name: 1.0, launch.name: 2.0})
    assert len(recorded) == 2
    tasks = step_tasks(step, H100, recorded=recorded)
    assert tasks[product] == Task("compute", 1.0)
    assert tasks[launch] == replace(plain[launch], seconds=2.0)
    changed = {node for node in tasks if tasks[node] != plain[node]}
    forms = InPlace(step).forms
    assert {signature(node, step.mesh, form=forms.get(node)) for node in changed} == set(recorded)


def test_what_runs_in_place_takes_no_new_memory_and_has_a_class_of_its_own() -> None:
    hardware = replace(
        H100,
        fresh_bytes_s=1.0,
        ops={"pointwise": OpRate(0.0, (1.0,), (1.0,)), "in_place": OpRate(0.0, (1.0,), (2.0,))},
        vector_flops=1e18,
    )
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(10, device="meta")
    node = graph.call_function(aten.add.Tensor, (x, x))
    node.meta["val"] = x.meta["val"]
    assert compute_seconds(node, hardware) == 40 + 40 + 40
    assert compute_seconds(node, hardware, in_place=True) == (40 + 40) / 2


def test_a_view_takes_a_moment_where_the_host_does_not_run_ahead() -> None:
    step = program(zero=3)
    views = step.calls(aten.view.default)
    assert views
    cpu = replace(H100, device="cpu", view_overhead_s=1e-6)
    assert {step_tasks(step, cpu)[node] for node in views} == {Task("compute", 1e-6)}
    assert {step_tasks(step, H100)[node] for node in views} == {FREE}


def test_a_python_number_takes_no_time() -> None:
    step = program(zero=3)
    numbers = [node for node in step.calls() if yields_scalar(node)]
    assert numbers
    tasks = step_tasks(step, replace(H100, device="cpu", view_overhead_s=1e-6))
    assert {tasks[node] for node in numbers} == {FREE}


def test_compute_takes_longer_on_one_of_several_ranks() -> None:
    step = program(zero=3)
    among = replace(H100, contention={"ranks": 1.5})
    for mesh, factor in (({"dp": 2}, 1.5), ({"dp": 1}, 1.0)):
        step.mesh = mesh
        for (node, alone), task in zip(step_tasks(step, H100).items(), step_tasks(step, among).values(), strict=True):
            assert task.launch_s == alone.launch_s and task.resource == alone.resource, node
            on_compute = alone.resource == "compute"
            assert task.seconds == pytest.approx(alone.seconds * (factor if on_compute else 1.0)), node


def test_every_call_of_a_step_has_a_class_that_descriptions_know() -> None:
    step = program(zero=3, precision="bf16")
    classes = {op_class(node) for node in step.calls()}
    assert classes <= {*MEMORY_CLASSES, *MATRIX_CLASSES}
    assert {"pointwise", "transcendental", "normalization", "softmax", "index", "matmul"} <= classes
