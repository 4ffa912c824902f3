"""Every way that rules name for a call is run by all ranks, and gives together what one device has."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from fxzero.graph.axis_placement import REPLICATED, Placement, partial, shard
from fxzero.sharding.rules import Rules
from fxzero.sharding.strategy import Local, Strategy
from tests.sharding.by_execution import fault_of, named
from tests.sharding.further_calls import further_calls, made
from tests.sharding.recorded_calls import RecordedCall, adamw, calls_of_models, calls_of_step, distinct, muon, sgd

aten = torch.ops.aten

MODELS = ("llama", "qwen3", "gemma2", "t5", "bert", "vit", "mixtral", "gpt2")
CLIPPED = ("llama", "vit", "mixtral")


@pytest.fixture(scope="module")
def calls() -> list[RecordedCall]:
    """The distinct calls of all models' steps."""
    matrix = torch.nn.Linear(8, 16, bias=False)
    steps = (
        calls_of_models(*MODELS, optimizer=adamw),
        calls_of_models(*CLIPPED, optimizer=sgd, clipped=True),
        calls_of_step(matrix, {"x": torch.randn(4, 8)}, muon, loss=lambda model, x: model(x).square().mean()),
    )
    return list(distinct(itertools.chain(*steps)))


def faults(calls: list[RecordedCall], ranks: int, blocks: tuple[int, ...] = (1, 2, 3)) -> tuple[list[str], int]:
    """(what is wrong, how many ways were run): those in which every rank does all of it were not."""
    rules, found, count = Rules(ranks), [], 0
    for call in calls:
        for strategy in rules.of(call.node, blocks)[1:]:
            count += 1
            fault = fault_of(call, strategy, ranks)
            if fault is not None:
                found.append(f"{named(call, strategy, ranks)}: {fault}")
    return found, count


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_of_the_calls_of_models_is_right(calls: list[RecordedCall], ranks: int) -> None:
    found, count = faults(calls, ranks)
    assert not found, "\n".join(found)
    assert count > 2000


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_of_further_calls_is_right(ranks: int) -> None:
    found, count = faults(list(further_calls()), ranks)
    assert not found, "\n".join(found)
    assert count > 1000


def planted() -> Iterator[tuple[RecordedCall, tuple[Placement, ...], Placement]]:
    """Calls, with ways that are wrong: how inputs lie, and how the output is said to."""
    x = square()
    # a shard dim off by one
    yield (made(aten.mm.default, x, x.t().contiguous() + 1), (shard(0), REPLICATED), shard(1))
    yield (made(aten.mm.default, x, x.t().contiguous() + 1), (REPLICATED, shard(0)), shard(1))
    yield (made(aten.add.Tensor, x, x[0]), (shard(0), shard(0)), shard(0))
    yield (made(aten.transpose.int, x, 0, 1), (shard(0),), shard(0))
    yield (made(aten.sum.dim_IntList, x, [1]), (shard(1),), shard(0))
    yield (made(aten._softmax.default, x, -1, False), (shard(1),), shard(1))
    yield (made(aten.cumsum.default, x, -1), (shard(1),), shard(1))
    # the parts of a flattened dim taken for one part
    yield (made(aten.view.default, x, [64]), (shard(1),), shard(0))
    yield (made(aten.view.default, x, [64]), (shard(1),), shard(0, 4))
    # blocks of one tensor taken for one block, or for other ones, of another
    yield (made(aten.mm.default, x, x + 1), (shard(0, 2), REPLICATED), shard(0))
    yield (made(aten.mm.default, x, x + 1), (shard(1, 2), shard(0)), partial())
    yield (made(aten.add.Tensor, x, x + 1), (shard(0, 2), shard(0)), shard(0, 2))
    yield (made(aten.cat.default, [x, x + 1], 1), (shard(1), shard(1)), shard(1))
    yield (made(aten.cat.default, [x, x + 1], 1), (shard(1), shard(1)), shard(1, 4))
    # a sum that is still to be made said to be made, or the other way round
    yield (made(aten.mm.default, x, x + 1), (shard(1), shard(0)), REPLICATED)
    yield (made(aten.sum.default, x), (shard(0),), REPLICATED)
    yield (made(aten.mm.default, x, x + 1), (REPLICATED, REPLICATED), partial())
    # what is not linear
    yield (made(aten.exp.default, x), (partial(),), partial())
    yield (made(aten.mul.Tensor, x, x + 1), (partial(), partial()), partial())
    yield (made(aten.add.Tensor, x, 1.0), (partial(),), partial())
    yield (made(aten.add.Tensor, x, x + 1), (partial(), REPLICATED), partial())
    # another reduction
    yield (made(aten.linalg_vector_norm.default, x), (shard(0),), partial())
    yield (made(aten.linalg_vector_norm.default, x), (shard(0),), partial("max"))
    # what each rank draws for its part
    yield (made(aten.bernoulli.p, x, 0.5), (shard(0),), shard(0))
    # integers and truth values, of which one is another
    yield (made(aten.argsort.default, x.flip(0), 0), (shard(0),), shard(0))
    yield (made(aten.tril.default, x > 0), (shard(0),), shard(0))


def square() -> torch.Tensor:
    return torch.linspace(-1, 2, 64).view(8, 8)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_wrong_way_is_found(ranks: int) -> None:
    tried = [(call, Strategy(inputs, (output,))) for call, inputs, output in planted()]
    found = {named(call, strategy, ranks): fault_of(call, strategy, ranks) for call, strategy in tried}
    by_value = [fault for fault in found.values() if fault is not None and fault.startswith("output 0: ")]
    by_shape = [fault for fault in found.values() if fault is not None and fault.startswith("RewriteError: ")]
    assert len(by_value) + len(by_shape) == len(tried), found
    assert len(by_value) > len(by_shape)


def test_a_doubled_partial_is_found() -> None:
    call = made(aten.mm.default, square(), square() + 1)

    def doubled(local: Local) -> tuple[torch.fx.Node | None, ...]:
        part = local.editor.call(aten.mm.default, *local.args)
        return (local.editor.call(aten.mul.Tensor, part, 2.0),)

    right = Strategy((shard(1), shard(0)), (partial(),))
    assert fault_of(call, right, 2) is None
    assert fault_of(call, dataclasses.replace(right, form=doubled), 2) is not None


def test_a_rank_that_has_another_value_than_others_is_found() -> None:
    call = made(aten.neg.default, square())

    def own(local: Local) -> tuple[torch.fx.Node | None, ...]:
        return (local.editor.call(aten.mul.Tensor, *local.args, local.coordinate()),)

    assert fault_of(call, Strategy((REPLICATED,), (REPLICATED,), own), 2) is not None
