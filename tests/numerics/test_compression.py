"""Compressed collectives: a step is the stated arithmetic, ranks stay equal, training converges, the wire ratio holds.

Four ranks in one process against a plain reference (with planted faults), then two real ranks over gloo. Run as a
module, this file is what each of those does.
"""

import contextlib
import copy
import functools
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero import Plan, StepGraph
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.compression_ops import (
    dequantize_blockwise,
    dequantize_reduce,
    packed_bytes,
    quantize_blockwise,
    wire_ratio,
)
from fxzero.graph.ops import local_shard
from fxzero.passes.quantize_all_gathers import check_dtype
from fxzero.runtime.topology import node_ranks
from tests.numerics.local_ranks import compile_for, run_ranks, train_ranks
from tests.numerics.reference import planted
from tests.numerics.sparing import sharing_first_capture, verifying_less
from tests.numerics.worker import launch

WORLD, WORDS, WIDTH = 4, 62, 32
BELOW = 500  # the matrices of Tied, not its vectors


class Tied(nn.Module):
    """62 rows over 4 ranks do not divide; the head shares the embedding, so products are not all that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        hidden = hidden + self.down(self.norm(F.gelu(self.up(hidden))))
        return F.cross_entropy(self.head(hidden), y)


MATRICES = ("embed.weight", "up.weight", "down.weight")


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and what follows them: by a fixed rule, but for one in five."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, noise = torch.randint(WORDS, (2, 64), generator=generator)
    kept = torch.rand(64, generator=generator) > 0.2
    return x, torch.where(kept, (7 * x + 3) % WORDS, noise)


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def compiled(**keys: Any) -> StepGraph:
    """A copy of the graph of a plan."""
    return _compiled(json.dumps(keys)).copy()


@functools.cache
def _compiled(keys: str) -> StepGraph:
    return compile_for(*make(), batch(0, 0), plan_of(**json.loads(keys)))


def plan_of(**keys: Any) -> Plan:
    below = {"compress_below": BELOW} if any(key.startswith("compress") for key in keys) else {}
    return Plan(mesh={"dp": WORLD}, **{"zero": 3, **below, **keys})


# ---- one step, against a reference that knows nothing of graphs


def rounded(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    """A tensor as it arrives: cut into parts by (padded) rows, and each part into blocks."""
    each = -(-x.shape[0] // parts) * x[0].numel()
    out = []
    for part in x.flatten().split(each):
        for values in part.split(block):
            if form == "int8":
                scale = values.abs().max() / 127
                out.append((values / scale).round() * scale)
            else:
                scale = values.abs().max() / 448
                out.append((values / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(out).view_as(x)


def reference(keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters after one step, from the weights and gradients as they arrive."""
    model, optimizer = make()
    gathers, reductions = keys.get("compress_gathers", "none"), keys.get("compress_reductions", "none")
    block = keys.get("compress_block", 256)
    seen = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in seen.named_parameters():
            if gathers == "fp8_rows" and name in ("up.weight", "down.weight"):
                p.copy_(rounded(p, "fp8", p.shape[1], WORLD))
            elif gathers in ("int8", "fp8") and name in MATRICES:
                p.copy_(rounded(p, gathers, block, WORLD))
    for name, p in model.named_parameters():
        total = torch.zeros_like(p)
        for rank in range(WORLD):
            (gradient,) = torch.autograd.grad(seen(*batch(0, rank)), [seen.get_parameter(name)])
            sends = reductions != "none" and name in MATRICES
            total += rounded(gradient, reductions, block, WORLD) if sends else gradient
        p.grad = total / WORLD
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def differences(keys: dict[str, Any], step: StepGraph) -> list[str]:
    """Names of the parameters that one step of a graph leaves elsewhere than the reference does."""
    outcome = run_ranks(*make(), [batch(0, rank) for rank in range(WORLD)], plan_of(**keys), step=step)
    expected = reference(keys)
    return [
        name
        for name, value in expected.items()
        if not torch.allclose(outcome.state[("parameter", name)], value, rtol=1e-5, atol=1e-7)
    ]


CASES: list[dict[str, Any]] = [
    {"compress_gathers": "int8"},
    {"compress_gathers": "fp8", "compress_block": 48},
    {"compress_gathers": "fp8_rows"},
    {"compress_reductions": "int8", "compress_block": 48},
    {"compress_reductions": "fp8", "zero": 2},
    {"compress_gathers": "int8", "compress_reductions": "int8"},
]
WAYS: list[dict[str, Any]] = [
    {"bucket_bytes": 0, "prefetch": 0},
    {"bucket_form": "coalesced", "prefetch": 2},
    {"bucket_form": "separate", "bucket_bytes": 3000, "reduce_scatter": "all_to_all"},
    {"disable": ["delay_weight_gradients", "place_updates"]},
]


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_one_step_is_the_stated_arithmetic(keys: dict[str, Any]) -> None:
    assert differences(keys, compiled(**keys)) == []


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_so_it_is_wherever_and_whenever_messages_are_sent(way: dict[str, Any]) -> None:
    keys = {"compress_gathers": "int8", "compress_reductions": "fp8"}
    assert differences(keys, compiled(**keys, **way)) == []


def swap_messages(step: StepGraph) -> None:
    """Two weights of one size are read from each other's message: values and scales."""
    inputs = [step.input("parameter", name) for name in ("up.weight", "down.weight")]
    for node in step.calls(quantize_blockwise):
        if node.args[0] in inputs:
            node.args = (inputs[1 - inputs.index(node.args[0])], *node.args[1:])


def read_other_scales(step: StepGraph) -> None:
    """Elements behind the 256th of a part are read with the scale of the block before."""
    for node in step.calls(dequantize_blockwise, dequantize_reduce):
        node.args = (*node.args[:3], 300, *node.args[4:])


def sum_instead_of_mean(step: StepGraph) -> None:
    """Gradients are added up."""
    for node in step.calls(dequantize_reduce):
        node.args = (*node.args[:5], "sum", *node.args[6:])


def round_nothing(step: StepGraph) -> None:
    """Gathered is what rests, as if nothing had been asked for."""
    other = compiled()
    step.graph, step.facts = other.graph, other.facts


FAULTS: list[tuple[Callable[[StepGraph], None], dict[str, Any]]] = [
    (swap_messages, {"compress_gathers": "int8"}),
    (read_other_scales, {"compress_gathers": "int8"}),
    (read_other_scales, {"compress_reductions": "fp8"}),
    (sum_instead_of_mean, {"compress_reductions": "int8"}),
    *((round_nothing, keys) for keys in CASES[2:5]),
]


@pytest.mark.parametrize(("fault", "keys"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_step_that_does_otherwise_is_seen(fault: Callable[[StepGraph], None], keys: dict[str, Any]) -> None:
    step = compiled(**keys)
    fault(step)
    assert differences(keys, step) != []


# ---- what is compressed, and what it costs


def sent(step: StepGraph, *, gathers: bool) -> int:
    """Bytes that a rank sends in a step to gather parameters, or to reduce gradients."""
    launches = [n for n in step.calls() if c10d.is_collective(n) and n.meta["phase"] != "update"]
    return sum(c10d.wire_bytes(n, step.mesh) for n in launches if c10d.gathers_parameters(n) is gathers)


def expected_bytes(reads: dict[str, int], *, form: str, block: int) -> int:
    """Bytes that a rank sends for the weights of Tied, each read so many times; vectors travel in fp32."""
    total = 0
    for name, p in Tied().named_parameters():
        each = -(-p.shape[0] // WORLD) * p[0].numel()
        by_rows = form == "fp8_rows" and name != "embed.weight"
        is_packed = name in MATRICES and (form in ("int8", "fp8") or by_rows)
        message = packed_bytes(each, p.shape[1] if by_rows else block) if is_packed else 4 * each
        total += reads.get(name, 0) * message * (WORLD - 1)
    return total


GATHERED = {name: 2 for name in (*MATRICES, "norm.weight", "norm.bias")} | {"up.bias": 1}
REDUCED = {name: 1 for name in GATHERED}


@pytest.mark.parametrize("form", ["none", "int8", "fp8", "fp8_rows"])
def test_bytes_on_the_wire(form: str) -> None:
    step = compiled(compress_gathers=form) if form != "none" else compiled()
    assert sent(step, gathers=True) == expected_bytes(GATHERED, form=form, block=256)
    assert sent(step, gathers=False) == expected_bytes(REDUCED, form="none", block=256)
    if form not in ("none", "fp8_rows"):
        step = compiled(compress_reductions=form, compress_block=32)
        assert sent(step, gathers=False) == expected_bytes(REDUCED, form=form, block=32)


def test_the_ratio_of_whole_blocks_is_the_stated_one() -> None:
    """docs/plan.md: 0.254 of fp32, and 0.508 of bf16."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    whole = nn.Module()
    whole.layers = model
    whole.forward = lambda x: model(x).square().mean()  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    plain = compile_for(whole, optimizer, (torch.ones(2, 256),), plan_of())
    keys = {"compress_gathers": "int8", "compress_reductions": "fp8"}
    packed = compile_for(whole, optimizer, (torch.ones(2, 256),), plan_of(**keys))
    assert wire_ratio(256 * 64, 256, 4) == 0.25390625
    for gathers in (True, False):
        assert sent(packed, gathers=gathers) == 0.25390625 * sent(plain, gathers=gathers)


def test_forward_and_backward_read_the_same_values() -> None:
    step = compiled(compress_gathers="int8")
    forms: dict[str, set[Any]] = {}
    for node in step.calls(dequantize_blockwise):
        forms.setdefault(node.meta["param"], set()).add((node.meta["phase"], *map(str, node.args[1:])))
    assert forms.keys() == set(MATRICES)
    assert all(len(found) == 2 and len({args[1:] for args in found}) == 1 for found in forms.values())


def test_rows_are_for_weights_that_only_products_read() -> None:
    step = compiled(compress_gathers="fp8_rows")
    assert {n.meta["param"] for n in step.calls(dequantize_blockwise)} == {"up.weight", "down.weight"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"compress_gathers": "int8", "compress_below": 5000},
            "a gathered parameter of 5000 elements",
        ),
        ({"compress_gathers": "fp8_rows", "compress_below": 2049}, "a weight that only matrix products read, of 2049"),
        ({"compress_reductions": "int8", "compress_below": 5000}, "a sharded gradient of 5000 .* largest has 2048"),
    ],
)
def test_a_plan_that_compresses_nothing_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compiled(**keys)


class Turns(nn.Module):
    """A complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 16, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).abs().mean()


@pytest.mark.parametrize("keys", [{"compress_gathers": "int8"}, {"compress_reductions": "fp8"}])
def test_a_dtype_that_cannot_be_quantized_is_refused(keys: dict[str, Any]) -> None:
    model = Turns()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    where = "parameter 'weight'" if "compress_gathers" in keys else "gradient of 'weight'"
    with pytest.raises(PlanError, match=f"{where}: expected a real floating-point dtype, got complex64"):
        compile_for(model, optimizer, (torch.ones(2, 64, dtype=torch.complex64),), plan_of(**keys))
    with pytest.raises(PlanError, match="gradient of 'x': expected a real floating-point dtype, got int32"):
        check_dtype(torch.int32, "gradient of 'x'")


# ---- backward gathers inside nodes

NODES: list[dict[str, Any]] = [
    {},
    {"compress_gathers": "int8"},
    {"compress_gathers": "fp8_rows", "bucket_form": "coalesced", "prefetch": 2},
    {"bucket_bytes": 0, "persist_below": 500},
]


@pytest.mark.parametrize("keys", NODES, ids=str)
def test_gathering_inside_nodes_changes_no_bit(keys: dict[str, Any]) -> None:
    over_all, inside = (train({**keys, **nodes}, 2) for nodes in ({}, {"node_size": 2}))
    assert over_all.losses == inside.losses
    assert all(torch.equal(inside.state[key], value) for key, value in over_all.state.items())


def test_neighbours_on_dp_share_a_node() -> None:
    ranks = torch.arange(8)
    assert node_ranks(ranks.view(2, 4), ("dp_replicate", "dp"), 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert node_ranks(ranks.view(4, 2), ("dp", "dp_replicate"), 2) == [[0, 2], [4, 6], [1, 3], [5, 7]]


def keep_parts_of_first(step: StepGraph) -> None:
    """Every rank of a node keeps the part of its first one."""
    for node in step.calls(local_shard):
        if c10d.gathered_before(node) is not None:
            node.args = (*node.args[:2], 0)


def test_a_rank_that_keeps_the_wrong_part_is_seen() -> None:
    over_all, inside = train({}, 2), train({"node_size": 2}, 2, fault=keep_parts_of_first)
    assert not all(torch.equal(inside.state[key], value) for key, value in over_all.state.items())


def test_bytes_between_nodes() -> None:
    """What backward gathers stays inside a node; each rank keeps a half of what forward gathered."""
    for keys in ({}, {"compress_gathers": "int8"}):
        plain, step = compiled(**keys), compiled(**keys, node_size=2, bucket_bytes=0)
        gathers = [n for n in step.calls() if c10d.gathers_parameters(n)]
        axes = {(n.meta["phase"], c10d.axis_of(n)) for n in gathers}
        assert axes == {("forward", "dp"), ("backward", "dp_node")}
        forward = [n for n in gathers if n.meta["phase"] == "forward"]
        sent_over = sum(c10d.wire_bytes(n, step.mesh) for n in forward)
        backward = sum(c10d.wire_bytes(n, step.mesh) for n in gathers if n not in forward)
        bias = c10d.wire_bytes(next(n for n in forward if n.meta["param"] == "up.bias"), step.mesh)
        # half of a message instead of three quarters; the bias is gathered once in both
        assert (sent_over, backward) == ((sent(plain, gathers=True) + bias) // 2, (sent_over - bias) * 2 // 3)


# ---- several steps


def train(keys: dict[str, Any], steps: int, *, fault: Callable[[StepGraph], None] | None = None) -> Any:
    """Losses of the last step, whose batch all ranks share, and the state after it; raises where ranks differ in it."""
    step = compiled(**keys)
    if fault is not None:
        fault(step)
    batches = [[batch(number, rank) for rank in range(WORLD)] for number in range(steps)]
    batches.append([batch(steps, 0)] * WORLD)
    return train_ranks(*make(), batches, plan_of(**keys), step=step)


def use_own_rows(step: StepGraph) -> None:
    """A rank computes with its own rows of a weight, as they rest, in the place of those that it quantized."""
    aten = torch.ops.aten
    node = next(n for n in step.calls(dequantize_blockwise) if n.meta["param"] == "down.weight")
    own = step.input("parameter", "down.weight")
    with step.graph.inserting_after(node):
        added = step.graph.call_function(aten.cat.default, ([own] * WORLD,))
    node.replace_all_uses_with(added)
    added.meta = dict(node.meta)


@pytest.mark.parametrize("keys", [*CASES, {"compress_reductions": "int8", "zero": 2, "persist_below": 2000}], ids=str)
def test_ranks_compute_with_equal_weights_after_several_steps(keys: dict[str, Any]) -> None:
    losses = train(keys, 5).losses
    assert len({loss.item() for loss in losses.values()}) == 1


def test_a_rank_that_computes_with_other_weights_is_seen() -> None:
    losses = train({"compress_gathers": "int8"}, 5, fault=use_own_rows).losses
    assert len({loss.item() for loss in losses.values()}) == WORLD


# ---- two real ranks: training converges, and ends with the same values everywhere

STEPS, TAIL = 80, 20
OVERFLOWING = {"precision": "fp16", "loss_scale": "dynamic", "loss_scale_init": 2.0**20}
UNSHARDED = {"accumulate_in": "unsharded"}
# plan keys -> the most by which the loss may exceed that of the uncompressed run, as a factor
CONVERGING: list[tuple[dict[str, Any], float]] = [
    ({"compress_gathers": "int8"}, 1.02),
    ({"compress_gathers": "fp8"}, 1.02),
    ({"compress_gathers": "fp8_rows"}, 1.02),
    ({"compress_reductions": "int8"}, 1.02),
    ({"compress_reductions": "fp8", "zero": 2}, 1.02),
    ({"compress_gathers": "int8", "compress_reductions": "int8", "bucket_form": "coalesced"}, 1.02),
    ({"compress_gathers": "int8", "compress_reductions": "int8", "precision": "bf16", "zero": 2}, 1.02),
    ({"compress_gathers": "int8", "compress_reductions": "int8", **OVERFLOWING}, 1.05),
    ({"compress_reductions": "powersgd"}, 1.05),
    ({"compress_reductions": "powersgd", "zero": 1, "accumulate": 2}, 1.05),
    ({"compress_reductions": "topk", "topk_fraction": 0.01}, 1.15),
    ({"compress_reductions": "topk", "topk_fraction": 0.01, "zero": 0, "accumulate": 2, **UNSHARDED}, 1.15),
]


RESUMED: list[dict[str, Any]] = [
    {"compress_reductions": "powersgd"},
    {"compress_reductions": "topk", "topk_fraction": 0.01},
]


def name_of(keys: dict[str, Any]) -> str:
    """A job's name in the results."""
    return " ".join(f"{key}={value}" for key, value in keys.items()) or "none"


def forget_what_was_kept(step: StepGraph) -> int:
    """Nothing is kept back: it stays as it was at the start, which is zero."""
    residuals = [n.meta["entry"].name for n in step.inputs("auxiliary") if ".residual." in n.meta["entry"].name]
    for name in residuals:
        before = step.input("auxiliary", name)
        assert before is not None
        step.set_result("auxiliary", name, before)
    return len(residuals)


def start(keys: dict[str, Any]) -> fxzero.TrainStep:
    """A step that has not run yet."""
    model = make()[0]
    with torch.no_grad():
        model.embed.weight *= 0.1  # the head too: the first losses are those of a guess
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    below = {"compress_below": BELOW} if keys else {}
    return fxzero.compile(model, optimizer, Plan(**{"zero": 3, **below, **keys}))


def resume(keys: dict[str, Any], rank: int) -> list[list[float]]:
    """Losses of three more steps: of a run that goes on, one resumed from its state, one that lost a part of it."""

    def steps(step: fxzero.TrainStep, numbers: range) -> list[float]:
        return [step(*batch(number, rank)).item() for number in numbers]

    step = start(keys)
    steps(step, range(4))
    saved = {name: value.clone() for name, value in step.state_dict().items()}
    found = [steps(step, range(4, 7))]
    for kept in (saved, {name: value for name, value in saved.items() if ".residual." not in name}):
        again = start(keys)
        again.load_state_dict(kept)
        found.append(steps(again, range(4, 7)))
    return found


def run_rank(keys: dict[str, Any], rank: int) -> dict[str, Any]:
    """What one rank finds of one job."""
    step = start(keys)
    losses = [step(*batch(number, rank)).item() for number in range(STEPS)]
    shared = step(*batch(STEPS, 0)).item()
    with step.unsharded() as whole:
        values = {name: p.detach().double().sum().item() for name, p in whole.named_parameters()}
    scale = step.metrics["loss_scale"].item() if "loss_scale" in keys else None
    resumed = resume(keys, rank) if keys in RESUMED and step.graph.title != "after planted_fault" else None
    return {"losses": losses, "shared": shared, "values": values, "resumed": resumed, "scale": scale}


def main(path: str) -> None:
    """Rank 0 writes what each rank found of each job."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, results = dist.get_rank(), {}
    captures: dict[str, Any] = {}
    for name, keys, fault in [
        ("none", {}, None),
        *((name_of(keys), keys, None) for keys, _ in CONVERGING),
        *((f"fault {name_of(keys)}", keys, forget_what_was_kept) for keys in RESUMED),
    ]:
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(planted(fault) if fault else sharing_first_capture(captures, ""))
                stack.enter_context(
                    verifying_less({"zero": 0}, broken=fault is not None)
                )  # the same graphs, but for their axes, are verified above
                mine: Any = run_rank(keys, rank)
        except Exception:
            mine = traceback.format_exc()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        results[name] = everyone
        if rank == 0:
            Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compression") / "results.json"
    launch("tests.numerics.test_compression", str(path), ranks=2, timeout_s=480)
    return json.loads(path.read_text())


def tail(found: list[dict[str, Any]]) -> float:
    """Mean loss of the last steps over ranks."""
    losses = [loss for rank in found for loss in rank["losses"][-TAIL:]]
    return sum(losses) / len(losses)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("keys", "factor"), CONVERGING, ids=lambda keys: name_of(keys) if isinstance(keys, dict) else ""
)
def test_training_converges(keys: dict[str, Any], factor: float, trained: dict[str, Any]) -> None:
    found, plain = trained[name_of(keys)], trained["none"]
    assert not isinstance(found[0], str), found[0]
    assert tail(plain) < 0.5 * plain[0]["losses"][0]
    assert tail(found) < factor * tail(plain)
    assert found[0]["losses"] != plain[0]["losses"]
    assert found[0]["shared"] == found[1]["shared"]
    assert found[0]["values"] == found[1]["values"]
    if found[0]["scale"] is not None:  # overflows are seen through the messages
        assert found[0]["scale"] < keys["loss_scale_init"]


@pytest.mark.multirank
@pytest.mark.parametrize("keys", RESUMED, ids=name_of)
def test_training_that_forgets_what_it_kept_back_does_not_converge_so(
    keys: dict[str, Any], trained: dict[str, Any]
) -> None:
    (factor,) = [factor for job, factor in CONVERGING if job == keys]
    assert tail(trained[f"fault {name_of(keys)}"]) > factor * tail(trained["none"])


@pytest.mark.multirank
@pytest.mark.parametrize("keys", RESUMED, ids=name_of)
def test_what_is_kept_back_is_in_a_checkpoint(keys: dict[str, Any], trained: dict[str, Any]) -> None:
    for found in trained[name_of(keys)]:
        assert not isinstance(found, str), found
        on, resumed, without = found["resumed"]
        assert resumed == on
        assert without != on


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
