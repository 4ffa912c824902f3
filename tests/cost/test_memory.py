"""Lives, kinds and sizes of a program's storages, and what allocators make of them."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost import memory_kinds
from fxzero.cost.allocator import CPU, CUDA, MIB, allocator_of
from fxzero.cost.memory import MemoryTimeline, Standing, highest_profile, memory_profile, memory_timeline
from fxzero.cost.memory_kinds import (
    ACTIVATIONS,
    COMMUNICATION,
    GATHERED,
    GRADIENTS,
    INPUTS,
    KINDS,
    OPTIMIZER,
    PARAMETERS,
    WORKSPACE,
)
from fxzero.errors import RewriteError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.compression_ops import dequantize_reduce
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import CARRIED_KINDS, num_bytes
from fxzero.graph.swap_ops import swap_in
from fxzero.graph.swaps import store, take_in
from fxzero.plan import Plan
from fxzero.recipe import captured_as, recipe

WIDTH, ROWS = 64, 128


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.down, self.drop = nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    """Two layers and a norm; the loss is that of an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for layer in self.layers:
            hidden = layer(hidden)
        return F.mse_loss(self.norm(hidden), x)


PLANS: list[dict[str, Any]] = [
    {"zero": 0, "recompute": "blocks"},
    {"zero": 1, "clip_grad_norm": 1.0},
    {"zero": 2, "precision": "bf16"},
    {"zero": 3, "precision": "fp16", "loss_scale": "dynamic"},
    {"zero": 3, "compress_gathers": "int8", "compress_reductions": "int8"},
    {"zero": 2, "compress_reductions": "powersgd"},
    {"zero": 3, "compress_reductions": "topk", "topk_fraction": 0.1},
    {"zero": 3, "mesh": {"dp_replicate": 2, "dp": 2}, "recompute": ["layers.*"]},
    {"zero": 3, "node_size": 2, "bucket_bytes": 0},
    {"zero": 2, "accumulate": 2, "accumulate_in": "unsharded"},
]


@functools.cache
def captured(plan: Plan, *, index: int = 0, carried: tuple[str, ...] = ()) -> StepGraph:
    model = Tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = captured_as(plan)
    options = type(options)(
        options.precision, options.clipping, options.scaling, options.accumulation.at(index, carried=carried)
    )
    inventory = rehearse(Inventory.of(model, optimizer))[0]
    step = capture_step(inventory, None, (torch.randn(ROWS, WIDTH),), {}, options=options).step
    step.mesh = dict(plan.axes)
    return step


def rewritten(*, backend: str = "gloo", world: int = 4, **keys: Any) -> StepGraph:
    plan = Plan(**keys).resolve(world)
    return recipe(plan, backend=backend).run(captured(plan), check=False)


def kind_of(timeline: MemoryTimeline, name: str) -> str:
    (found,) = {kind for storage, kind in timeline.kinds.items() if name in [m.name for m in storage.members]}
    return found


# ---- kinds


@pytest.mark.parametrize("keys", PLANS, ids=str)
def test_kinds_part_the_total_at_every_node_after_every_pass(keys: dict[str, Any]) -> None:
    plan = Plan(**keys).resolve(4)
    checked = []

    def check(name: str, step: StepGraph) -> None:
        timeline = memory_timeline(step)
        assert set(timeline.bytes_by_kind) == set(KINDS)
        alive = [0] * len(timeline.nodes)
        for storage in timeline.storages:
            for position in range(storage.start, storage.end + 1):
                alive[position] += storage.num_bytes
        assert alive == timeline.total.tolist()
        assert all((line >= 0).all() for line in timeline.bytes_by_kind.values())
        checked.append(name)

    pipeline = recipe(plan, backend="gloo")
    pipeline.run(captured(plan), check=False, snapshot=check)
    assert len(checked) == 1 + len(pipeline.passes)


@pytest.mark.parametrize("keys", PLANS, ids=str)
def test_what_rests_is_of_its_kind_and_always_there(keys: dict[str, Any]) -> None:
    step = rewritten(**keys)
    timeline = memory_timeline(step)
    for kind, entries in ((PARAMETERS, ["parameter"]), (OPTIMIZER, ["optimizer"])):
        resting = sum(num_bytes(node.meta["val"]) for node in step.inputs(*entries))
        assert set(timeline.bytes_by_kind[kind].tolist()) == {resting}
    inputs = sum(num_bytes(n.meta["val"]) for n in step.inputs("buffer", "auxiliary", "batch", "constant"))
    assert set(timeline.bytes_by_kind[INPUTS].tolist()) == {inputs}


def test_kinds_of_a_sharded_step() -> None:
    step = rewritten(zero=3, bucket_bytes=0)
    timeline = memory_timeline(step)
    kinds = {node.name: kind for storage, kind in timeline.kinds.items() for node in storage.members}
    stem = "layers_0_up_weight"
    assert kinds[f"{stem}_full"] == GATHERED and kinds[f"{stem}_grad_shard"] == GRADIENTS
    launches = [n.name for n in step.calls(c10d.reduce_scatter)]
    assert {kinds[name] for name in launches} == {COMMUNICATION}, "rows that messages bring"
    products = [n for n in step.phase("forward") if "addmm" in n.name and n.meta["module"].endswith("up")]
    assert [kinds[node.name] for node in products] == [ACTIVATIONS, ACTIVATIONS]
    for gradient in step.gradients().values():
        assert kinds[gradient.name] == GRADIENTS
    assert {kinds[n.name] for n in step.phase("update") if n.name in kinds} <= {
        *(PARAMETERS, OPTIMIZER, GRADIENTS, WORKSPACE, COMMUNICATION)
    }


def test_twins_of_forward_values_are_activations_and_gradients_of_activations_are_not() -> None:
    step = rewritten(zero=3, recompute="blocks", world=2)
    timeline = memory_timeline(step)
    forward = {node.target for node in step.phase("forward")}
    of_loss = [n for n in step.phase("backward") if "backward" in str(n.target)]
    twins = [n for n in step.phase("backward") if n.target in forward and "gelu" in str(n.target)]
    kinds = {node: kind for storage, kind in timeline.kinds.items() for node in storage.members}
    assert twins and {kinds[node] for node in twins} == {ACTIVATIONS}
    assert {kinds[n] for n in of_loss if n in kinds and "grad_of" not in n.meta} == {WORKSPACE}


def test_packed_messages_are_communication_and_what_is_read_from_them_is_not() -> None:
    step = rewritten(zero=3, compress_gathers="int8", compress_reductions="int8", bucket_bytes=0)
    timeline = memory_timeline(step)
    stem = "layers_0_up_weight"
    assert kind_of(timeline, f"{stem}_quantized") == kind_of(timeline, f"{stem}_packed") == COMMUNICATION
    assert kind_of(timeline, f"{stem}_dequantized") == GATHERED
    assert kind_of(timeline, f"{stem}_grad_packed") == COMMUNICATION
    means = [n.name for n in step.calls(dequantize_reduce)]
    assert {kind_of(timeline, name) for name in means} == {GRADIENTS}


def test_parameters_in_low_precision_are_copies_that_rows_are_cast_for() -> None:
    timeline = memory_timeline(rewritten(zero=3, precision="bf16", bucket_bytes=0))
    assert kind_of(timeline, "layers_0_up_weight_cast") == COMMUNICATION
    assert kind_of(timeline, "layers_0_up_weight_full") == GATHERED


def test_sums_that_microbatches_hand_on_are_gradients() -> None:
    plan = Plan(zero=2, accumulate=2).resolve(4)
    first = captured(plan)
    last = captured(plan, index=1, carried=tuple(name for kind, name in first.results if kind in CARRIED_KINDS))
    steps = [recipe(plan, backend="gloo").run(step, check=False) for step in (first, last)]
    timeline = memory_timeline(steps[1])
    handed = steps[1].inputs(*CARRIED_KINDS)
    assert handed and {kind_of(timeline, node.name) for node in handed} == {GRADIENTS}
    results = {node for (kind, _), node in steps[0].results.items() if kind in CARRIED_KINDS}
    assert {kind_of(memory_timeline(steps[0]), node.name) for node in results} == {GRADIENTS}
    alone, beside = (memory_profile(steps[0], beside=others) for others in ((), steps[1:]))
    state = sum(num_bytes(node.meta["val"]) for node in steps[1].inputs("optimizer"))
    assert beside.by_kind[OPTIMIZER] == state > alone.by_kind[OPTIMIZER] == 0
    assert beside.by_kind[INPUTS] == alone.by_kind[INPUTS] + ROWS * WIDTH * 4, "the other microbatch's part"
    assert highest_profile(steps)[1].peak_bytes >= beside.peak_bytes


OFFLOADING: list[dict[str, Any]] = [
    {"offload_optimizer": "host", "offload_parameters": "nvme", "offload_activations": "host"},
    {"offload_optimizer": "host", "update_on_host": 1.0, "recompute": "blocks"},
]


@pytest.mark.parametrize("keys", OFFLOADING, ids=str)
def test_what_swaps_bring_in_is_what_it_was(keys: dict[str, Any]) -> None:
    step = rewritten(zero=3, bucket_bytes=0, offload_below=0, **keys)
    timeline = memory_timeline(step)
    assert (timeline.total == sum(timeline.bytes_by_kind.values())).all()
    kinds = {storage.node: kind for storage, kind in timeline.kinds.items() if storage.node.target is swap_in}
    expected = {"parameter": PARAMETERS, "optimizer": OPTIMIZER}
    seen = set()
    for node, kind in kinds.items():
        origin = node.all_input_nodes[0]
        if origin.op == "placeholder":
            assert kind == expected[origin.meta["entry"].kind]
        elif node.meta["phase"] == "backward":
            assert kind == ACTIVATIONS
            launch = origin.all_input_nodes[0]
            assert kind_of(timeline, launch.all_input_nodes[0].name) == ACTIVATIONS, "before it leaves, too"
        else:
            assert kind == PARAMETERS, "the value that the host has updated"
        seen.add(kind)
    assert seen == ({PARAMETERS} if "update_on_host" in keys else {PARAMETERS, OPTIMIZER, ACTIVATIONS})
    assert {kind_of(timeline, n.name) for n in step.calls(c10d.wait) if n.name.endswith("weight_full")} == {GATHERED}


def test_a_gradient_that_comes_back_is_one() -> None:
    step = rewritten(zero=2, bucket_bytes=0)
    (gradient,) = (n for n in step.calls() if n.name == "layers_0_up_weight_grad_shard")
    readers = [user for user in gradient.users if user.op == "call_function"]
    with Editor(step, phase="update", module="", param="layers.0.up.weight").before(readers[0]) as editor:
        here = take_in(editor, store(editor, gradient, "host", stem="gradient"), stem="gradient")
    for reader in readers:
        reader.replace_input_with(gradient, here)
    timeline = memory_timeline(step)
    assert kind_of(timeline, here.name) == GRADIENTS


def test_a_wrong_kind_of_swaps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above reads what `kinds_of` says of moves."""
    monkeypatch.setattr(memory_kinds.swap_ops, "OPS", ())
    with pytest.raises(AssertionError):
        test_what_swaps_bring_in_is_what_it_was(OFFLOADING[0])


def test_a_wrong_kind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above read what `kinds_of` says."""
    monkeypatch.setattr(memory_kinds, "_GATHERS", set())
    with pytest.raises(AssertionError):
        test_kinds_of_a_sharded_step()


# ---- lives


def test_outputs_of_one_call_live_apart(capture: Any) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    wrapped = Sum(model)
    step = capture(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), torch.randn(ROWS, WIDTH))
    (norm,) = (n for n in step.calls() if "native_batch_norm" in str(n.target) and n.meta["phase"] == "forward")
    timeline = memory_timeline(step)
    parts = {s.members[0].args[1]: s for s in timeline.storages if s.node is norm and s.members}
    assert all(part.members[0].target is operator.getitem for part in parts.values())
    assert parts[0].num_bytes == ROWS * WIDTH * 4 and parts[1].num_bytes == WIDTH * 4
    order = step.positions()
    first_of_backward = min(order[node] for node in step.phase("backward"))
    assert parts[0].end < first_of_backward < parts[1].end, "backward reads the statistics, not the normalized value"


class Sum(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().sum()


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_values_in_other_tiers_count_there(tier: str) -> None:
    step = rewritten(zero=3)
    before = memory_profile(step)
    moments = step.inputs("optimizer")
    for node in moments:
        node.meta["tier"] = tier
    after = memory_profile(step)
    moved = sum(num_bytes(node.meta["val"]) for node in moments)
    assert getattr(after, f"{tier}_bytes") == moved == before.by_kind[OPTIMIZER] > after.by_kind[OPTIMIZER] == 0
    assert after.peak_bytes < before.peak_bytes and after.state_bytes == before.state_bytes - moved
    moments[0].meta["tier"] = "attic"
    with pytest.raises(RewriteError, match=r"meta\['tier'\]: expected one of device, host, nvme, got 'attic'"):
        memory_profile(step)


# ---- what stands there


def test_groups_leave_out_the_numbers_of_modules() -> None:
    profile = memory_profile(rewritten(zero=3))
    assert sum(item.num_bytes for item in profile.standing) == profile.peak_bytes == sum(profile.by_kind.values())
    groups = profile.grouped()
    assert sum(group.num_bytes for group in groups) == profile.peak_bytes
    assert [g.num_bytes for g in groups] == sorted((g.num_bytes for g in groups), reverse=True)
    (weights,) = (g for g in groups if (g.kind, g.module) == (OPTIMIZER, "layers.*.up"))
    rows = 2 * 4 * WIDTH * (WIDTH + 1) * 4 * 2 // 4 + 4 * 4  # two layers, two moments, a quarter; four steps
    assert (weights.num_bytes, weights.count) == (rows, 12)
    assert weights.what.startswith("weight:exp_avg, weight:exp_avg_sq") and weights.what.endswith(", ..")
    assert Standing(PARAMETERS, "norm", "weight", WIDTH // 4 * 4) in profile.standing


# ---- allocators


def test_allocated_bytes_are_whole_blocks() -> None:
    assert [CUDA.allocated(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert CPU.allocated(513) == 513
    assert [allocator_of(device) for device in ("cpu", "cuda", "xpu")] == [CPU, CUDA, CUDA]


@pytest.mark.parametrize(
    ("events", "reserved"),
    [
        ([(0, 1)], 2 * MIB),
        ([(0, MIB), (1, MIB)], 2 * MIB),
        ([(0, MIB), (1, MIB), (2, 512)], 4 * MIB),
        ([(0, MIB + 1)], 20 * MIB),
        ([(0, 9 * MIB), (1, 9 * MIB)], 20 * MIB),
        ([(0, 10 * MIB + 1)], 12 * MIB),
        ([(0, 30 * MIB), (0, 0), (1, 20 * MIB), (2, 10 * MIB)], 30 * MIB),
        ([(0, 30 * MIB), (0, 0), (1, 31 * MIB)], 62 * MIB),  # segments are kept, and the first is too small
        ([(0, 8 * MIB), (1, 8 * MIB), (0, 0), (1, 0), (2, 20 * MIB)], 20 * MIB),  # neighbours become one block
        ([(0, 8 * MIB), (1, 8 * MIB), (0, 0), (2, 9 * MIB)], 40 * MIB),  # nothing is moved
    ],
)
def test_segments_of_the_caching_allocator(events: list[tuple[int, int]], reserved: int) -> None:
    assert CUDA.reserved(events) == reserved


def test_the_cpu_reserves_lines() -> None:
    assert CPU.reserved([(0, 1), (1, 65), (0, 0), (2, 64)]) == 192


@pytest.mark.parametrize("keys", PLANS[:4], ids=str)
def test_cuda_reserves_what_it_allocates_and_not_much_more(keys: dict[str, Any]) -> None:
    step = rewritten(**keys, backend="nccl")
    cuda, cpu = (memory_profile(step, allocator=allocator) for allocator in (CUDA, CPU))
    assert cuda.peak_bytes % 512 == 0
    assert cuda.peak_bytes <= cuda.reserved_bytes <= cuda.peak_bytes + 24 * MIB
    assert cpu.reserved_bytes >= cpu.peak_bytes
