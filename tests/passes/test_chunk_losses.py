"""Losses in chunks of rows: the same numbers but for the order of sums, in memory that knows no whole logits."""

from __future__ import annotations

import difflib
import functools
import itertools
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxzero
from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cost.memory import memory_profile
from fxzero.decide import decide
from fxzero.errors import PlanError
from fxzero.graph import collectives as c10d
from fxzero.graph.regions import regions
from fxzero.graph.step_graph import iter_views, num_bytes, tensor_val
from fxzero.graph.storage import InPlace
from fxzero.graph.text import to_text
from fxzero.graph.verify import verify
from fxzero.lower.region_text import region_text
from fxzero.passes.chunk_losses import chunk_losses
from fxzero.recipe import captured_as, recipe
from tests.lower.interpreted import interpreted
from tests.lower.models import Decoder, tokens
from tests.numerics.local_ranks import compile_for, run_ranks
from tests.numerics.sparing import sharing_first_capture

aten = torch.ops.aten
WORDS, WIDTH = 40, 12
RTOL = 1e-5
_captures: dict[str, Any] = {}


class Reader(nn.Module):
    """Words, a mix of them, logits and their cross entropy, in one of several forms.

    Args:
        form: one of FORMS.
        loss: further arguments of the cross entropy.
    """

    def __init__(self, form: str = "plain", **loss: Any) -> None:
        super().__init__()
        self.form, self.loss = form, loss
        self.embed, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=form in ("bias", "sliced"))
        self.across = nn.Parameter(torch.randn(WIDTH, WORDS) / 4) if form == "across" else None
        if form == "tied":
            self.head.weight = self.embed.weight
        if form == "frozen":
            self.head.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        hidden = torch.tanh(self.mix(self.embed(x)))
        logits = hidden @ self.across if self.across is not None else self.head(hidden)
        return FORMS[self.form](logits, y, functools.partial(F.cross_entropy, **self.loss))


def _plain(logits: torch.Tensor, y: torch.Tensor, loss: Callable[..., torch.Tensor]) -> Any:
    return loss(logits.flatten(0, 1), y.flatten())


def _sliced(logits: torch.Tensor, y: torch.Tensor, loss: Callable[..., torch.Tensor]) -> Any:
    return loss(logits.float()[..., :-1, :].contiguous().view(-1, WORDS), y[..., 1:].contiguous().view(-1))


def _soft(logits: torch.Tensor, y: torch.Tensor, loss: Callable[..., torch.Tensor]) -> Any:
    return loss((torch.tanh(logits / 3) * 3).flatten(0, 1), y.flatten())


def _both(logits: torch.Tensor, y: torch.Tensor, loss: Callable[..., torch.Tensor]) -> Any:
    # the last rows of one loss and the first ones of another, beside a third that has no logits
    first, second = logits.flatten(0, 1), logits.mul(0.5).flatten(0, 1)
    return loss(first, y.flatten()) + loss(second, y.flatten())


FORMS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("plain", "bias", "across", "tied", "frozen"), _plain),
    "sliced": _sliced,
    "soft": _soft,
    "both": _both,
    "z": lambda logits, y, loss: _plain(logits, y, loss) + 1e-3 * torch.logsumexp(logits, -1).square().mean(),
    "squared": lambda logits, y, loss: _plain(logits, y, loss).square(),
    "told": lambda logits, y, loss: (_plain(logits, y, loss), {"mean": logits.mean()}),
    "of_pixels": lambda logits, y, loss: loss(logits.transpose(1, 2), y),
    "no_product": lambda logits, y, loss: loss((logits + logits.roll(1, 1)).flatten(0, 1), y.flatten()),
    "words_left_out": lambda logits, y, loss: loss(logits[..., :30].flatten(0, 1), y.flatten() % 30),
}


def batch(step: int, *, rows: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(WORDS, (2, rows, length), generator=generator)
    return x, y.masked_fill(torch.rand(y.shape, generator=generator) < 0.3, -100)


def captured(model: nn.Module, *args: torch.Tensor, optimizer: Any = torch.optim.SGD, **keys: Any) -> StepGraph:
    inventory = rehearse(Inventory.of(model, optimizer(model.parameters(), lr=0.1)))[0]
    return capture_step(inventory, lambda m, *xs: m(*xs), args, {}, options=captured_as(Plan(**keys))).step


def trained(model: Callable[[], Reader], *, steps: int = 3, **keys: Any) -> list[torch.Tensor]:
    """Losses of some steps and the parameters behind them."""
    torch.manual_seed(0)
    made = model()
    plan = Plan(**{"zero": 0, **keys})
    step = fxzero.compile(made, torch.optim.SGD(made.parameters(), lr=0.3, momentum=0.9), plan)
    torch.manual_seed(1)
    with sharing_first_capture(_captures, f"{made.form}"):
        return [step(*batch(i, rows=4)).detach() for i in range(steps)] + [p.detach() for p in made.parameters()]


def differences(a: list[torch.Tensor], b: list[torch.Tensor], *, rtol: float) -> list[int]:
    """The places at which two lists of tensors are further apart than their largest element times `rtol`."""
    pairs = enumerate(zip(a, b, strict=True))
    return [i for i, (x, y) in pairs if not torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))]


# ---- numerics


@pytest.mark.parametrize("form", ["plain", "bias", "across", "tied", "frozen", "sliced", "soft"])
def test_steps_are_those_of_whole_logits(form: str) -> None:
    whole = trained(lambda: Reader(form))
    assert differences(trained(lambda: Reader(form), chunk_loss=5), whole, rtol=RTOL) == []
    one = trained(lambda: Reader(form), chunk_loss=1000)
    assert all(map(torch.equal, one, whole)) or form == "sliced", "one chunk is made of the same ops"


PLANS: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"precision": "bf16"}, 2**-7),
    "autocast": ({"precision": "autocast:bf16"}, 2**-7),
    "fp16": ({"precision": "fp16", "loss_scale": 1024.0}, 2**-9),
    "scaled": ({"loss_scale": "dynamic", "clip_grad_norm": 0.5}, RTOL),
    "accumulated": ({"accumulate": 2, "clip_grad_value": 0.01}, RTOL),
    "unsharded": ({"accumulate": 4, "accumulate_in": "unsharded"}, RTOL),
}


@pytest.mark.parametrize(("keys", "rtol"), PLANS.values(), ids=PLANS)
def test_with_other_keys_of_a_plan(keys: dict[str, Any], rtol: float) -> None:
    whole = trained(lambda: Reader("tied"), **keys)
    assert differences(trained(lambda: Reader("tied"), chunk_loss=6, **keys), whole, rtol=rtol) == []


@pytest.mark.parametrize(
    "keys", [{"recompute": "blocks", "lowering": "inductor"}, {"recompute": "auto", "memory_budget": 250_000}], ids=str
)
def test_with_recomputation_and_regions(keys: dict[str, Any]) -> None:
    def run(**more: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Decoder(2)
        step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), Plan(zero=0, **keys, **more))
        return [step(*tokens(i, rows=8)).detach() for i in range(2)] + [p.detach() for p in model.parameters()]

    with interpreted():
        assert differences(run(chunk_loss=48), run(), rtol=RTOL) == []


def test_what_is_decided_knows_of_no_whole_logits() -> None:
    """At a budget that nothing meets every answer is tried, also those that would name logits of the captured step."""
    step = captured(Decoder(2), *tokens(0, rows=8))
    step.mesh = {"dp": 1}
    plan = Plan(zero=0, mesh={"dp": 1}, recompute="auto", memory_budget=240_000, chunk_loss=48)
    with pytest.raises(PlanError, match=r"Plan.memory_budget: expected at least"):
        decide(step, plan=plan, backend="gloo")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_four_ranks_take_the_same_step(zero: int) -> None:
    torch.manual_seed(0)
    model = Reader("tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = []
    for keys in ({}, {"chunk_loss": 5}):
        plan = Plan(zero=zero, mesh={"dp": 4}, **keys)
        step = compile_for(model, optimizer, batch(0), plan)
        outcome = run_ranks(model, optimizer, [batch(i) for i in range(4)], plan, step=step)
        found.append([*outcome.losses.values(), *outcome.state.values()])
    assert differences(found[1], found[0], rtol=RTOL) == []


def gradients(step: StepGraph, *args: torch.Tensor) -> list[torch.Tensor]:
    """Loss, unreduced gradients of parameters and the parameters behind an update by SGD, of any graph of one rank."""
    module = fx.GraphModule({}, step.graph)
    return [value for value in module(*args) if isinstance(value, torch.Tensor)]


@functools.cache
def whole_step(rows: int, ignored: int, reduction: str) -> StepGraph:
    torch.manual_seed(0)
    x, y = torch.zeros(2, 1, rows, dtype=torch.long)
    return captured(Reader("bias", ignore_index=ignored, reduction=reduction), x, y)


def inputs_of(step: StepGraph, x: torch.Tensor, y: torch.Tensor, *, dtype: torch.dtype) -> list[Any]:
    """Random state, and the batch."""
    torch.manual_seed(3)
    values: list[Any] = []
    for node in step.placeholders:
        entry, val = node.meta["entry"], node.meta["val"]
        if entry.kind == "batch":
            values.append(x if entry.name.endswith("0") else y)
        else:
            values.append(torch.randn(val.shape).to(dtype) if isinstance(val, torch.Tensor) else val)
    return values


@given(
    rows=st.sampled_from([1, 2, 7, 13]),
    chunk=st.integers(1, 14),
    ignored=st.sampled_from([-100, 3]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 9),
    counted=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=25)
def test_any_rows_and_chunks(rows: int, chunk: int, ignored: int, reduction: str, seed: int, counted: float) -> None:
    """Whole chunks may count no label, and so may all: NaN is where it was."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(WORDS, (2, 1, rows), generator=generator)
    y = torch.where(torch.rand(y.shape, generator=generator) < counted, y, ignored)
    before = whole_step(rows, ignored, reduction)
    after = before.copy()
    assert chunk_losses.run(after, rows=chunk) == -(-rows // chunk)
    found, expected = (gradients(s, *inputs_of(s, x, y, dtype=torch.float32)) for s in (after, before))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert differences([a.nan_to_num()], [b.nan_to_num()], rtol=RTOL) == []


def test_chunks_are_as_near_to_fp64_as_whole_logits() -> None:
    def step(rows: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, (x, y) = Reader("bias").to(dtype), batch(0, rows=16, length=64)
        graph = captured(model, x, y)
        if rows is not None:
            chunk_losses.run(graph, rows=rows)
        return gradients(graph, *inputs_of(graph, x, y, dtype=dtype))

    exact = step(None, torch.float64)
    errors = [
        [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
        for found in (step(None, torch.float32), step(64, torch.float32))
    ]
    assert all(chunked < max(2 * whole, 1e-6) for whole, chunked in zip(*errors, strict=True)), errors
    assert differences(step(64, torch.float64), exact, rtol=1e-13) == []


def test_short_gradients_add_up_in_fp32() -> None:
    graph = captured(Reader("plain"), *batch(0), precision="bf16")
    chunk_losses.run(graph, rows=3)
    sums = [tensor_val(node).dtype for node in graph.calls(aten.add.Tensor) if "chunk" in node.meta]
    assert sums == [torch.float32] * 6


# ---- planted faults


def dropped_chunk(step: StepGraph) -> None:
    (joined,) = (node for node in step.calls(aten.cat.default))
    joined.args = ([joined.args[0][1], *joined.args[0][1:]],)  # type: ignore[index, misc]


def divisor_of_chunk(step: StepGraph) -> None:
    """Each chunk divides by its own number of labels, not by that of all."""
    for node in step.calls(aten.nll_loss_backward.default):
        (forward,) = (u for u in node.args[1].users if u.target is aten.nll_loss_forward.default)  # type: ignore[union-attr]
        with step.graph.inserting_before(node):
            own = step.graph.call_function(operator.getitem, (forward, 1))
        own.meta = {**node.meta, "val": node.args[-1].meta["val"]}  # type: ignore[union-attr]
        node.args = (*node.args[:-1], own)


def overwritten_sum(step: StepGraph) -> None:
    last = [node for node in step.calls(aten.addmm.default) if "chunk" in node.meta][-1]
    with step.graph.inserting_before(last):
        alone = step.graph.call_function(aten.mm.default, last.args[1:])
    alone.meta = dict(last.meta)
    last.replace_all_uses_with(alone)


@pytest.mark.parametrize("fault", [dropped_chunk, divisor_of_chunk, overwritten_sum])
def test_a_fault_is_seen(fault: Callable[[StepGraph], None]) -> None:
    x, y = batch(0)
    before = captured(Reader("plain"), x, y)
    after = before.copy()
    chunk_losses.run(after, rows=7)
    values = inputs_of(before, x, y, dtype=torch.float32)
    assert differences(gradients(after, *values), gradients(before, *values), rtol=RTOL) == []
    fault(after)
    assert differences(gradients(after, *values), gradients(before, *values), rtol=RTOL) != []


# ---- memory, order, regions


def long_step(form: str = "plain") -> StepGraph:
    class Wide(Reader):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.form, self.loss, self.across = form, {}, None
            self.embed, self.mix = nn.Embedding(512, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 512, bias=False)

    return captured(Wide(), *batch(0, rows=8, length=256), optimizer=torch.optim.AdamW)


PROGRAMS: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 3},
    {"zero": 3, "regather": False},
    {"zero": 1, "precision": "bf16"},
    {"zero": 3, "schedule": "cost", "hardware": "h100"},
    {"zero": 3, "lowering": "inductor"},
]


@pytest.mark.parametrize("keys", PROGRAMS, ids=str)
def test_no_program_holds_two_chunks_of_logits(keys: dict[str, Any]) -> None:
    plan = Plan(mesh={"dp": 4}, chunk_loss=128, **keys)
    step = long_step()
    step.mesh = dict(plan.axes)
    whole, chunked = (recipe(p, backend="gloo").run(step) for p in (plan.replace(chunk_loss=None), plan))
    logits = 2048 * 512 * 4
    saved = memory_profile(whole).peak_bytes - memory_profile(chunked).peak_bytes
    assert saved > 1.5 * logits
    assert _most_logits(chunked) <= 3 * logits / 16 < logits <= _most_logits(whole)
    verify(chunked)


def _most_logits(step: StepGraph) -> int:
    """The most bytes of values with a column a word, and a row a token or some of them, at any place."""
    alive = [0] * (len(step.graph.nodes) + 1)
    position, in_place = step.positions(), InPlace(step)
    for root, members in in_place.members.items():
        val = root.meta.get("val")
        if root.op == "call_function" and isinstance(val, torch.Tensor) and val.shape[-1:] == (512,):
            if "update" in (member.meta["phase"] for member in members) or root.meta.get("grad_of"):
                continue
            alive[position[root]] += num_bytes(val)
            alive[in_place.last_reading(root) + 1] -= num_bytes(val)
    return max(itertools.accumulate(alive))


def test_later_chunks_made_too_early_are_seen() -> None:
    """The twin of the check above: products of all chunks first."""
    step = long_step()
    chunk_losses.run(step, rows=128)
    anchor = next(node for node in step.calls(aten.mm.default) if "chunk" in node.meta)
    for node in step.calls(aten.mm.default):
        if node.meta.get("chunk", -1) > 0 and node.meta["val"].shape[1] == 512:
            anchor.append(node)
    assert _most_logits(step) > 2048 * 512 * 4


def test_a_sharded_weight_is_gathered_once_for_all_chunks() -> None:
    plan = Plan(zero=3, mesh={"dp": 4}, chunk_loss=128, bucket_bytes=0)
    step = long_step()
    step.mesh = dict(plan.axes)
    after = recipe(plan, backend="nccl").run(step)
    (wait,) = (
        n
        for n in after.calls(c10d.wait)
        if n.meta.get("param") == "head.weight" and c10d.gathers_parameters(c10d.launched_by(n))
    )
    readers = [user for alias in (wait, *iter_views(wait)) for user in alias.users if user.target is aten.mm.default]
    assert wait.meta["phase"] == "backward" and {n.meta["chunk"] for n in readers} == set(range(16))
    (end,) = (user for user in wait.users if c10d.is_release(user))
    position = after.positions()
    assert position[end] > max(position[n] for n in readers)


def test_sums_are_added_where_they_stand() -> None:
    step = long_step()
    chunk_losses.run(step, rows=128)
    in_place = InPlace(step)
    sums = [node for node in step.calls(aten.addmm.default) if "chunk" in node.meta]
    assert len(sums) == 15 and {in_place.forms[node] for node in sums} == {aten.addmm_.default}


def test_equal_chunks_are_one_region() -> None:
    plan = Plan(zero=0, mesh={"dp": 1}, chunk_loss=300, lowering="inductor")
    step = recipe(plan, backend="gloo").run(long_step())
    in_place = InPlace(step)
    found = [region for region in regions(step) if "chunk" in region.calls[0].meta]
    assert len(found) == 7 and len({region_text(region, in_place).text for region in found}) == 2
    assert all(node.meta["chunk"] == found[i].calls[0].meta["chunk"] for i in range(7) for node in found[i].calls)


# ---- what is decided, and told


@pytest.mark.parametrize(
    ("rows", "length", "words", "expected"),
    [(8, 256, 512, 16), (8, 256, 60, 0), (8, 8, 512, 0), (8, 250, 512, 16)],
)
def test_auto_takes_rows_by_size(rows: int, length: int, words: int, expected: int) -> None:
    class Wide(Reader):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.form, self.loss, self.across = "plain", {}, None
            self.embed, self.mix, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, words)

    step = captured(Wide(), *batch(0, rows=rows, length=length))
    assert chunk_losses.run(step) == expected
    told = step.remarks["chunk_losses"]
    assert told.startswith(f"logits of the loss [{rows * length}, {words}], ")
    assert ("in 16 chunks of 128 rows" if expected else "stay whole: too small beside the hidden") in told


REASONS = {
    "z": "%logsumexp = aten.logsumexp.default works on its logits, too",
    "squared": "its gradient depends on its value",
    "told": "%mean = aten.mean.default works on its logits, too",
    "of_pixels": "no cross entropy of labels",
    "no_product": "no matrix product makes its logits, but %add",
    "words_left_out": "works on its logits, too",
}


@pytest.mark.parametrize("form", REASONS)
def test_whole_logits_stay_and_the_report_says_why(form: str) -> None:
    step = captured(Reader(form), *batch(0))
    text = to_text(step)
    assert chunk_losses.run(step) == 0
    assert to_text(step) == text and REASONS[form] in step.remarks["chunk_losses"]
    with pytest.raises(PlanError, match=r"Plan.chunk_loss: expected a cross entropy of a matrix product .*stay whole"):
        chunk_losses.run(step, rows=8)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({"weight": torch.ones(WORDS)}, "its classes have weights"),
        ({"label_smoothing": 0.1}, "works on its logits, too"),
    ],
    ids=["weights", "smoothing"],
)
def test_losses_of_other_kinds_stay(loss: dict[str, Any], reason: str) -> None:
    step = captured(Reader("plain", **loss), *batch(0))
    assert chunk_losses.run(step) == 0 and reason in step.remarks["chunk_losses"]


def test_two_losses_are_told_apart() -> None:
    step = captured(Reader("both"), *batch(0))
    assert chunk_losses.run(step) == 0
    assert [line.partition(" stay")[0] for line in step.remarks["chunk_losses"].splitlines()] == [
        "logits of loss 1 of 2",
        "logits of loss 2 of 2",
    ]


def test_the_report_tells_it() -> None:
    model = Reader()
    step = fxzero.compile(model, torch.optim.SGD(model.parameters(), lr=0.1), Plan(chunk_loss=8))
    step(*batch(0))
    assert "logits of the loss [21, 40], 3.3 KiB: in 3 chunks of 8 rows, 1.2 KiB each" in step.report()


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    step = captured(Reader("sliced"), *batch(0))
    old = to_text(step)
    chunk_losses.run(step, rows=8)
    sides = [re.sub(r"(?<=\S) {2,}", "  ", text).splitlines() for text in (old, to_text(step))]
    diff = difflib.unified_diff(*sides, "capture", "chunk_losses", n=0, lineterm="")
    golden("chunk_losses", "\n".join(line for line in diff if not line.startswith("@@")) + "\n")
