"""fxzero.shard in one process: what becomes of a model, what its programs hold, what is refused."""

import copy
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fxzero
from fxzero import compat_distributed
from fxzero.backend import programs
from fxzero.backend.rows import _TakeRows
from fxzero.backend.sharded import padded_rows
from fxzero.errors import CaptureError, PlanError
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.parse import from_text
from fxzero.graph.verify import verify
from fxzero.runtime.agreement import Agreement
from tests.backend.models import Decoder, tokens
from tests.backend.reference import compiled


@pytest.fixture
def two_ranks() -> Iterator[list[str]]:
    """This process is rank 0 of two, of which the other never speaks; yields what it would have agreed on."""
    compat_distributed.fake_process_group(2)
    texts: list[str] = []

    def settle(self: Agreement, text: str, *, changed: bool = False) -> bool:
        texts.append(text)
        return changed

    with mock.patch.object(Agreement, "settle", settle), mock.patch.object(Agreement, "fail"):
        yield texts


def of_decoder(sharding: dict[str, Any], **options: Any) -> tuple[StepGraph, StepGraph]:
    """Forward and backward of a sharded decoder."""
    compiled(fxzero.shard(Decoder(2), sharding), **options)(*tokens(0)).backward()
    forward, backward = programs()[-2:]
    return forward, backward


def gathered(step: StepGraph) -> list[str]:
    """Names of the parameters that are gathered, in order."""
    found = []
    for launch in step.calls(c10d.all_gather, c10d.all_gather_coalesced):
        found += [c10d.parameter_sent(source).meta["entry"].name for source in c10d.sent(launch)]
    return found


def test_modules_own_rows_and_read_whole_tensors(two_ranks: list[str]) -> None:
    plain = Decoder(1)
    model = fxzero.shard(copy.deepcopy(plain))
    assert two_ranks and "parameter embed.weight [50, 24]" in two_ranks[0]
    owned = dict(model.named_parameters())
    assert list(owned) == list(dict(plain.named_parameters()))
    for name, parameter in owned.items():
        assert isinstance(parameter, nn.Parameter) and isinstance(parameter.data, DTensor)
        rows = parameter.shape[0] // 2
        assert torch.equal(parameter.to_local(), dict(plain.named_parameters())[name][:rows])
    assert model.head.weight.shape == (50, 24) and not isinstance(model.head.weight, DTensor)
    assert model.head._parameters["weight"] is model.embed._parameters["weight"], "ties are kept"
    assert isinstance(model.layers[0].qkv, nn.Linear)


def test_printing_a_model_gathers_nothing(two_ranks: list[str]) -> None:
    model = fxzero.shard(Decoder(1))
    with mock.patch("fxzero.backend.sharded.Sharded.gather", side_effect=AssertionError):
        assert "ShardedLinear(in_features=24, out_features=24, bias=True)" in str(model)


def test_gathers_and_reductions_are_in_the_programs(two_ranks: list[str]) -> None:
    forward, backward = of_decoder({"bucket_bytes": "16 KiB", "bucket_form": "coalesced", "all_gather": "native"})
    names = {node.meta["entry"].name for node in forward.inputs("parameter")}
    assert set(gathered(forward)) == names and len(gathered(forward)) == len(names) == 26
    assert len(gathered(backward)) == len(set(gathered(backward))) > 15
    assert any(len(c10d.sent(launch)) > 4 for launch in forward.calls(c10d.all_gather_coalesced)), "buckets"
    released = [len(node.args[0]) for node in forward.calls() if c10d.is_release(node)]
    assert sum(released) == len(names), "nothing stays gathered for backward"
    assert not [node for node in backward.inputs("saved") if re.search("_full|_gather", node.name)]
    assert {node.meta["entry"].name for node in backward.inputs("parameter")} == set(gathered(backward))
    reduced = backward.calls(c10d.reduce_scatter, c10d.reduce_scatter_coalesced)
    assert sum(len(c10d.sent(launch)) for launch in reduced) == len(names), "a tied one once"
    assert all("avg" in launch.args for launch in reduced)
    for step in (forward, backward):
        again = from_text(str(step))
        assert str(again) == str(step)
        verify(again)


def test_gathers_go_ahead_and_reductions_travel_under_compute(two_ranks: list[str]) -> None:
    forward, backward = of_decoder({"bucket_bytes": 0})
    position = forward.positions()
    ahead = [
        position[wait] - position[c10d.launched_by(wait)] for wait in forward.calls(c10d.wait) if c10d.ends_gather(wait)
    ]
    assert sum(distance > 2 for distance in ahead) > 10
    calls = backward.calls()
    travelling = [
        any(not c10d.is_collective(n) and not c10d.is_wait(n) for n in calls[calls.index(launch) : calls.index(wait)])
        for launch in calls
        if launch.target is c10d.reduce_scatter
        for wait in launch.users
    ]
    assert sum(travelling) > 10


def test_what_stays_gathered_is_saved(two_ranks: list[str]) -> None:
    forward, backward = of_decoder({"regather": False})
    assert not gathered(backward) and not backward.inputs("parameter")
    assert sum(node.name.endswith("_full") for node in backward.inputs("saved")) > 10
    assert not [node for node in backward.calls() if c10d.is_release(node)]
    assert len(gathered(forward)) == 26


def test_blocks_are_gathered_once_for_recomputation_and_backward(two_ranks: list[str]) -> None:
    _, backward = of_decoder({"recompute": "blocks"})
    assert len(gathered(backward)) == len(set(gathered(backward)))
    assert [n for n in backward.calls() if "flash_attention_for_cpu.default" in str(n.target)], "done again"


def test_without_gradients_nothing_is_reduced(two_ranks: list[str]) -> None:
    model = fxzero.shard(Decoder(1))
    with torch.no_grad():
        assert not compiled(model)(*tokens(0)).requires_grad
    (step,) = programs()[-1:]
    assert len(gathered(step)) == 14 and not step.calls(c10d.reduce_scatter)
    assert sum(c10d.is_release(node) for node in step.calls()) == 14


def test_ranks_agree_before_each_program(two_ranks: list[str]) -> None:
    called = compiled(fxzero.shard(Decoder(1), {"bucket_bytes": 0}))
    two_ranks.clear()
    called(*tokens(0)).backward()
    called(*tokens(1)).backward()
    assert [text.split(" ", 1)[0] for text in two_ranks] == ["forward", "backward"] * 2
    assert "all_gather of norm.weight" in two_ranks[0] and "reduce_scatter of norm.weight" in two_ranks[1]


def test_options_add_to_the_plan(two_ranks: list[str]) -> None:
    _, backward = of_decoder({"prefetch": 2}, plan=fxzero.Plan(recompute="blocks", zero=3))
    assert [n for n in backward.calls() if "flash_attention_for_cpu.default" in str(n.target)]


CONTRADICTIONS = [
    ({"prefetch": 2}, {"prefetch": 1}, r"Plan.prefetch: expected 2, as fxzero.shard was given, got 1 from torch.com"),
    ({}, {"zero": 0}, r"Plan.zero: expected 3, as fxzero.shard was given, got 0"),
    ({}, {"mesh": {"dp_replicate": 2}}, r"Plan.mesh: expected \{'dp': 2\}, .* got \{'dp_replicate': 2, 'dp': 1\}"),
    ({}, {"persist_below": 5}, r"Plan.persist_below: expected 0, .* got 5"),
    ({"recompute": "blocks"}, {"recompute": 0.5}, r"Plan.recompute: expected 'blocks', .* got 0.5"),
    ({}, {"precision": "bf16"}, r"Plan.precision: expected 'fp32' .*torch.autocast"),
]


@pytest.mark.parametrize(("plan", "options", "message"), CONTRADICTIONS, ids=str)
def test_a_contradiction_names_both(plan: Any, options: Any, message: str, two_ranks: list[str]) -> None:
    called = compiled(fxzero.shard(nn.Linear(4, 4), plan), **options)
    with pytest.raises(PlanError, match=message):
        called(torch.ones(1, 4))


REFUSED = [
    ({"zero": 2}, r"Plan.zero: expected 3 with fxzero.shard, got 2; .*regather=False"),
    ({"zero": 1}, r"Plan.zero: expected 3 with fxzero.shard, got 1"),
    ({"bucket_bytes": "auto"}, r"Plan.bucket_bytes: expected a value with fxzero.shard, got 'auto'"),
    ({"regather": "auto"}, r"Plan.regather: expected a value"),
    ({"compress_gathers": "int8"}, r"Plan.compress_gathers: expected 'none'"),
    ({"accumulate": 2}, r"Plan.accumulate: expected 1"),
    ({"cross_step": True}, r"Plan.cross_step"),
    ({"node_size": 2}, r"Plan.node_size"),
    ({"mesh": {"tp": 2}}, r"Plan.mesh\['tp'\]: expected 1 with fxzero.shard, got 2; put these ranks on dp"),
    ({"mesh": {"dp": 3}}, r"Plan.mesh: expected axis sizes that multiply to the world size 2"),
]


@pytest.mark.parametrize(("plan", "message"), REFUSED, ids=str)
def test_what_cannot_be_sharded_so_is_an_error(plan: Any, message: str, two_ranks: list[str]) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(PlanError, match=message):
        fxzero.shard(model, plan)
    assert type(model) is nn.Linear and type(model.weight) is nn.Parameter


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


MODELS = [
    (lambda: fxzero.shard(nn.Linear(4, 4)), CaptureError, "expected a model that is not sharded, got one that is"),
    (lambda: fully_shard(nn.Linear(4, 4)), CaptureError, "expected a plain module, got one wrapped by FSDPLinear"),
    (lambda: nn.parallel.DistributedDataParallel(nn.Linear(4, 4)), CaptureError, "wrapped by DistributedDataParallel"),
    (lambda: torch.compile(nn.Linear(4, 4)), CaptureError, "got one from torch.compile"),
    (lambda: nn.GRU(3, 4), CaptureError, r"module '' of class GRU: .* in its attribute '_flat_weights'"),
    (on_meta, PlanError, "parameter weight: expected one with values, got the meta device; .*to_empty"),
    (lambda: 3, CaptureError, "expected a torch Module, got int"),
]


@pytest.mark.parametrize(("build", "error", "message"), MODELS, ids=[message[:40] for *_, message in MODELS])
def test_a_model_that_does_not_fit_is_an_error(build: Any, error: Any, message: str, two_ranks: list[str]) -> None:
    model = build()
    with pytest.raises(error, match=message):
        fxzero.shard(model)


def test_a_parameter_that_was_replaced_is_an_error(two_ranks: list[str]) -> None:
    model = fxzero.shard(nn.Linear(4, 4))
    model.weight = nn.Parameter(torch.ones(4, 4))
    for called in (model, compiled(model)):
        with pytest.raises(CaptureError, match=r"parameter 'weight' of ShardedLinear: .* got Parameter; write into it"):
            called(torch.ones(1, 4))


def test_rows_that_are_read_as_rows_are_an_error(two_ranks: list[str]) -> None:
    model = fxzero.shard(nn.Linear(4, 4))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"_parameters\['weight'\].*that to_local reads"):
        compiled(lambda x: model(x) + dict(model.named_parameters())["weight"].to_local().sum())(torch.ones(1, 4))


def test_a_collective_of_the_models_own_is_an_error(two_ranks: list[str]) -> None:
    def summed(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.distributed.all_reduce(y)
        return y

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"CaptureError: .*a collective of the model's"):
        compiled(summed)(torch.ones(3))


def test_other_compilers_call_the_ops(two_ranks: list[str]) -> None:
    model = fxzero.shard(nn.Linear(4, 5))
    torch.compile(model, backend="aot_eager")(torch.ones(1, 4)).sum().backward()
    assert model._parameters["weight"].grad.to_local().shape == (3, 4)


@pytest.mark.parametrize("dist", [False, True])
def test_one_rank_trains_as_alone(dist: bool) -> None:
    if dist:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = Decoder(2)
        if sharded:
            model = fxzero.shard(model, {"recompute": "blocks"})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        called = compiled(model) if sharded else model
        losses = []
        for step in range(3):
            loss = called(*tokens(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == found[1]
    assert [n for n in programs()[-1].calls() if "flash_attention_for_cpu.default" in str(n.target)], "the plan counts"
    assert all(isinstance(p, DTensor) == dist for p in model.parameters())


def test_padding_is_memory_behind_the_rows_where_there_is_room() -> None:
    memory = torch.arange(12.0).view(4, 3)
    for count in range(5):
        rows = padded_rows(memory[:count], 4)
        assert rows.data_ptr() == memory.data_ptr() and torch.equal(rows, memory)
    alone = padded_rows(memory[2:].clone(), 3)
    assert torch.equal(alone[:2], memory[2:]) and alone.shape == (3, 3)
    assert torch.equal(padded_rows(memory.t(), 4)[:3], memory.t())


def test_frozen_rows_take_no_gradient(two_ranks: list[str]) -> None:
    model = fxzero.shard(nn.Linear(5, 5))
    model._parameters["weight"].requires_grad_(False)
    rows = _TakeRows.apply([3, 3], *model.parameters())
    assert [value.requires_grad for value in rows] == [False, True]
    compiled(model)(torch.ones(1, 5)).sum().backward()
    assert model._parameters["weight"].grad is None and model._parameters["bias"].grad.to_local().shape == (3,)
