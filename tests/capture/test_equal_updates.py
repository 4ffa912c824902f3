"""Updates of parameters alike are traced once; the capture is the one that tracing each of them gives."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxzero import Plan
from fxzero.capture import Capture, CaptureOptions, Inventory, capture_step, equal_calls, equal_updates, trace
from fxzero.capture.equal_calls import EqualCalls
from fxzero.capture.inventory import hyperparameters, state_name
from fxzero.capture.rehearsal import rehearse
from fxzero.capture.scalars import ScalarReader
from fxzero.capture.symbolic import SymbolicStep
from fxzero.graph.edit import describe
from fxzero.graph.text import to_text
from fxzero.recipe import captured_as
from tests.numerics.models import OPTIMIZERS

WIDTH = 6
Step = Callable[[], tuple[Inventory, bool]]


class Kinds(nn.Module):
    """Parameters of several kinds, with at least two of each that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.turned = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH).t()) for _ in range(2))
        self.from_left = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.low = nn.ParameterList(nn.Parameter(torch.randn(WIDTH).bfloat16()) for _ in range(2))
        self.added = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(2))  # whose gradient is one node
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.5)) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embed(x))
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        for weight in (*self.turned, *self.from_left):
            hidden = hidden @ weight
        hidden = hidden + self.added[0] + self.added[1]
        for low, scale in zip(self.low, self.scales, strict=True):
            hidden = hidden * low.to(hidden.dtype) * scale
        return F.cross_entropy(self.head(hidden), y)


class Matrices(nn.Module):
    """What Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH + 2, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(WIDTH + 2, WIDTH, bias=False) for _ in range(3))
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH + 2).t())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = F.one_hot(x % WIDTH, WIDTH).to(self.turned.dtype)
        for up, down in zip(self.up, self.down, strict=True):
            hidden = down(up(hidden))
        return F.cross_entropy(F.linear(hidden, self.turned), y % WIDTH)


def two_groups(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of that name over two groups; parameters of each kind are in both."""
    optimizer = OPTIMIZERS[name](model)
    (group,) = optimizer.param_groups
    every = group["params"]
    group["params"] = every[::2]
    decay = 0.0 if group.get("weight_decay") else 0.1
    others = {"weight_decay": decay} if "weight_decay" in group else {}
    optimizer.add_param_group({**group, **others, "lr": 3 * group["lr"], "params": every[1::2]})
    return optimizer


def job(name: str, *, stepped: bool = False) -> tuple[Inventory, bool]:
    """A model of several kinds of parameters with an optimizer, before its first step or after a few."""
    torch.manual_seed(0)
    model = Matrices() if name == "muon" else Kinds()
    optimizer = two_groups(name, model)
    if not stepped:
        return rehearse(Inventory.of(model, optimizer))
    for _ in range(2):
        model(*example()).backward()
        optimizer.step()
    return rehearse(Inventory.of(model, optimizer))


def example() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(4) % 5
    return x, x + 1


def options(inventory: Inventory, **plan: Any) -> CaptureOptions:
    """How a plan's step is captured; of several microbatches the last, which updates."""
    how = captured_as(Plan(**plan))
    if how.accumulation.number == 1:
        return how
    carried = [name for name in inventory.optimized if name != "unused"]
    return replace(how, accumulation=how.accumulation.at(how.accumulation.number - 1, carried=carried))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was called for each copy that is made."""
    copied: list[Any] = []
    copy = EqualCalls._copy
    monkeypatch.setattr(EqualCalls, "_copy", lambda self, *args: copied.append(args) or copy(self, *args))
    return copied


def both(
    inventory: Inventory, fresh: bool, how: CaptureOptions, *, batch: tuple[torch.Tensor, ...] | None = None
) -> tuple[Capture, Capture]:
    """The capture with copies, and the one that traces everything."""
    captures = []
    for copies in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace, "StepTracer", functools.partial(trace.StepTracer, copies=copies))
            captures.append(capture_step(inventory, None, batch or example(), {}, options=how, fresh=fresh))
    return captures[0], captures[1]


def looked_up(inventory: Inventory) -> Callable[[str, str], Any]:
    """The present value of each hyperparameter and state."""
    values = {("optimizer", state_name(p, key)): value for p, key, value in inventory.optimizer_state()}
    for index, group in enumerate(inventory.optimizer.param_groups):
        values |= {("hyperparameter", f"groups.{index}.{path}"): value for path, value in hyperparameters(group)}
    return lambda kind, name: values[(kind, name)]


def nodes_of(capture: Capture) -> Iterator[tuple[Any, ...]]:
    """All that a node is, in order."""
    for node in capture.step.graph.nodes:
        meta = {key: value for key, value in node.meta.items() if key != "val"}
        yield node.name, node.op, node.target, str(node.args), str(node.kwargs), meta, describe(node.meta.get("val"))


def difference(inventory: Inventory, got: Capture, expected: Capture) -> str | None:
    """Where two captures are not the same; None if they are."""
    if to_text(got.step) != to_text(expected.step):
        return "text"
    for one, other in zip(nodes_of(got), nodes_of(expected), strict=True):
        if one != other:
            return f"{one} is not {other}"
    guards = [(c.guards, c.guards.readers) for c in (got, expected)]
    if str(guards[0][0]) != str(guards[1][0]) or list(guards[0][1]) != list(guards[1][1]):
        return f"guards: {guards[0][0]} is not {guards[1][0]}"
    lookup = looked_up(inventory)
    read = [{name: reader(lookup) for name, reader in readers.items()} for _, readers in guards]
    if read[0] != read[1] or got.guards.frozen != expected.guards.frozen:
        return f"what guards read: {read[0]} is not {read[1]}"
    for _, test, names in got.guards.conditions:
        assert test(*(read[0][name] for name in names))
    return None if got.same_as(expected) and got.gradients == expected.gradients else "constants"


LATER = ("sgd_dampening", "nadam", "radam", "asgd")  # another program, or other numbers read
ALL = [*((name, False) for name in OPTIMIZERS), *((name, True) for name in LATER)]


@pytest.mark.parametrize(("name", "stepped"), ALL)
def test_the_capture_is_that_of_tracing_everything(name: str, stepped: bool, counted: list[Any]) -> None:
    inventory, fresh = job(name, stepped=stepped)
    got, expected = both(inventory, fresh, CaptureOptions())
    assert difference(inventory, got, expected) is None
    assert len(counted) in (
        (1,) if name == "muon" else (7, 8)
    )  # where common numbers are asked for, one is traced twice


@pytest.mark.parametrize("name", ["adamw", "asgd", "radam", "sgd_dampening"])
def test_it_is_where_the_loss_is_scaled(name: str, counted: list[Any]) -> None:
    inventory, fresh = job(name)
    got, expected = both(inventory, fresh, options(inventory, loss_scale="dynamic"))
    assert difference(inventory, got, expected) is None
    assert len(counted) > 20


PLANS: dict[str, dict[str, Any]] = {
    "clipped": {"clip_grad_norm": 1.0, "clip_grad_value": 0.1},
    "scaled_and_clipped": {"loss_scale": 8.0, "clip_grad_norm": 1.0},
    "microbatches": {"accumulate": 3},
    "unsharded_microbatches": {"accumulate": 2, "accumulate_in": "unsharded", "clip_grad_norm": 2.0},
    "bf16": {"precision": "bf16"},
    "everything": {"precision": "bf16", "accumulate": 2, "loss_scale": "dynamic", "clip_grad_norm": 1.0},
}


@pytest.mark.parametrize(
    ("name", "plan"),
    [*(("adamw", plan) for plan in PLANS.values()), ("muon", PLANS["everything"])],
    ids=[*PLANS, "everything, muon"],
)
def test_it_is_under_a_plan_too(name: str, plan: dict[str, Any], counted: list[Any]) -> None:
    inventory, fresh = job(name)
    got, expected = both(inventory, fresh, options(inventory, **plan))
    assert difference(inventory, got, expected) is None
    assert counted


def late() -> Inventory:
    """Two layers are beyond the step from which on RAdam rectifies."""
    inventory, _ = job("radam", stepped=True)
    for name in inventory.optimized:
        if name.startswith(("layers.0", "layers.2")):
            inventory.optimizer.state[inventory.parameters[name]]["step"].fill_(9.0)
    return inventory


def test_parameters_with_other_step_counts_take_their_own_branches(counted: list[Any]) -> None:
    inventory = late()
    got, expected = both(inventory, False, CaptureOptions())
    assert difference(inventory, got, expected) is None
    assert "sqrt" in to_text(got.step) and counted


def test_a_specialised_step_is_that_of_tracing_everything() -> None:
    inventory, fresh = job("adamw")
    how: Any = {"options": options(inventory, clip_grad_norm=1.0, loss_scale="dynamic"), "fresh": fresh}
    symbolic = SymbolicStep(inventory, None, example(), {}, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "StepTracer", functools.partial(trace.StepTracer, copies=False))
        longer = tuple(leaf.repeat(3) for leaf in example())
        direct = capture_step(inventory, None, longer, {}, **how)
    assert to_text(symbolic.at(batch=12)) == to_text(direct.step)


class Doubling(torch.optim.SGD):
    """Each parameter's gradient is added to what the one before it took."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        total = torch.zeros(())
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            total = total + parameter.grad.abs().sum()
            parameter.sub_(parameter.grad * total)


class Inheriting(torch.optim.SGD):
    """Has SGD's step, but another part of it."""

    def _init_group(self, *args: Any) -> bool:
        return super()._init_group(*args)  # type: ignore[misc]


def unknown(optimizer: torch.optim.Optimizer) -> None:
    optimizer.__class__ = Doubling


def subclassed(optimizer: torch.optim.Optimizer) -> None:
    optimizer.__class__ = Inheriting


def patched(optimizer: torch.optim.Optimizer) -> None:
    step = type(optimizer).step

    @functools.wraps(step)
    def twice(*args: Any) -> None:
        step(optimizer, *args)

    optimizer.step = twice  # type: ignore[method-assign]


def with_another_method(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad = lambda: None  # type: ignore[method-assign]


def with_tensor_rate(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor([0.1])


def with_a_number_in_its_state(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["note"] = 3


@pytest.mark.parametrize(
    "change", [unknown, subclassed, patched, with_another_method, with_tensor_rate, with_a_number_in_its_state]
)
def test_what_may_couple_parameters_is_traced_whole(
    change: Callable[[torch.optim.Optimizer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory, _ = job("sgd_dampening", stepped=True)
    change(inventory.optimizer)
    monkeypatch.setattr("fxzero.capture.update.step_alone", lambda *args: pytest.fail("stepped one by one"))
    got, expected = both(inventory, False, CaptureOptions())
    assert difference(inventory, got, expected) is None


def test_state_that_is_made_for_all_parameters_first_is_traced_so() -> None:
    model = Kinds()
    inventory = Inventory.of(model, torch.optim.Adam(model.parameters()))
    got, expected = both(inventory, True, CaptureOptions())
    assert difference(inventory, got, expected) is None


def test_hooks_around_every_optimizer_see_one_step() -> None:
    inventory, fresh = job("adamw")
    seen: list[Any] = []
    hook = register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    try:
        capture_step(inventory, None, example(), {}, fresh=fresh)
    finally:
        hook.remove()
    assert len(seen) == 1


def test_a_scheduler_leaves_an_optimizer_as_torch_made_it(counted: list[Any]) -> None:
    inventory, _ = job("adamw")
    scheduler = lr_scheduler.ExponentialLR(inventory.optimizer, 0.9)
    assert "step" in vars(inventory.optimizer) and scheduler.last_epoch == 0
    capture_step(inventory, None, example(), {})
    assert counted


class Peeking(torch.optim.SGD):
    """Reads another parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.sub_(parameter.grad * next(iter(self.state)).sum())


class Halving(torch.optim.SGD):
    """Writes to gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.sub_(parameter.grad.mul_(0.5))


@pytest.mark.parametrize("kind", [Peeking, Halving])
def test_only_calls_that_keep_to_their_arguments_are_copied(
    kind: type[torch.optim.SGD], counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(equal_updates.ALONE, kind, equal_updates.Alone("wrongly", makes_state=True))
    monkeypatch.setattr(equal_updates, "_is_as_torch_made_it", lambda *args: True)
    inventory, _ = job("sgd_dampening", stepped=True)
    inventory.optimizer.__class__ = kind
    got, expected = both(inventory, False, CaptureOptions())
    assert difference(inventory, got, expected) is None and not counted


def test_what_asks_for_common_numbers_is_traced_again(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, fresh = job("adam")
    capture_step(inventory, None, example(), {}, fresh=fresh)
    num_copies = len(counted)
    without_settling(monkeypatch)
    capture_step(inventory, None, example(), {}, fresh=fresh)
    assert len(counted) - num_copies == num_copies + 1


class Itself(torch.autograd.Function):
    """A sum whose gradient is the tensor, in the same memory."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return tensor.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return ctx.saved_tensors[0].detach()


class Growing(nn.Module):
    """Parameters whose gradients are views of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((Itself.apply(p) for p in self.own), x.sum())


class Rotating(nn.Module):
    """Complex parameters, whose real views are written."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.turns[0] * self.turns[1]).abs().mean()


@pytest.mark.parametrize("kind", [Rotating, Growing])
def test_what_shares_memory_or_is_complex_is_traced_each(kind: type[nn.Module], counted: list[Any]) -> None:
    model = kind()
    inventory, fresh = rehearse(Inventory.of(model, torch.optim.Adam(model.parameters(), weight_decay=0.1)))
    captures = both(inventory, fresh, CaptureOptions(), batch=(torch.ones(WIDTH),))
    assert difference(inventory, *captures) is None and not counted


# ---- the comparison finds planted faults


def without_strides(patch: pytest.MonkeyPatch) -> None:
    kind = EqualCalls._kind
    patch.setattr(EqualCalls, "_kind", lambda *args: (k := kind(*args)) and tuple((*a[:2], *a[3:]) for a in k))


def without_settling(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EqualCalls, "_num_common", lambda self: 0)


def without_group(patch: pytest.MonkeyPatch) -> None:
    call = EqualCalls.call
    other = {"kind": 0, "common": ()}
    without_settling(patch)
    patch.setattr(EqualCalls, "call", lambda self, *args, **how: call(self, *args, **(how | other)))
    patch.setattr(equal_calls._Recording, "can_be_copied", lambda *args: True)


def without_values(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ScalarReader, "present", lambda *args: None)


def without_common(patch: pytest.MonkeyPatch) -> None:
    call = EqualCalls.call
    patch.setattr(EqualCalls, "call", lambda self, *args, **how: call(self, *args, **(how | {"common": ()})))
    patch.setattr(equal_calls._Recording, "can_be_copied", lambda *args: True)


def kept_from_the_first(patch: pytest.MonkeyPatch, index: int, wanted: Callable[[Any], bool]) -> None:
    """Copies of some nodes read the first parameter's own argument."""
    copy = equal_calls._copy_of

    def kept(node: Any, nodes: dict[Any, Any]) -> Any:
        own = {argument: argument for argument in list(nodes)[index : index + 1] if wanted(node)}
        return copy(node, {**nodes, **own})

    patch.setattr(equal_calls, "_copy_of", kept)


def with_state_of_the_first(patch: pytest.MonkeyPatch) -> None:
    kept_from_the_first(patch, 3, lambda node: True)


def with_select_of_the_first(patch: pytest.MonkeyPatch) -> None:
    kept_from_the_first(patch, 1, lambda node: node.target is torch.ops.aten.where.self)


def with_guards_of_the_first(patch: pytest.MonkeyPatch) -> None:
    """What is asked while nodes are copied is forgotten."""
    copy = EqualCalls._copy

    def forgetful(self: EqualCalls, *args: Any) -> Any:
        before = list(self.reader.env.guards)
        out = copy(self, *args)
        self.reader.env.guards[:] = before
        return out

    patch.setattr(EqualCalls, "_copy", forgetful)


def with_reads_of_the_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ScalarReader, "read_again", lambda self, read, node: read.symbol)


def without_dead_nodes(patch: pytest.MonkeyPatch) -> None:
    after = equal_calls._nodes_after
    scalar = {operator.ne, operator.ge, operator.gt}
    patch.setattr(equal_calls, "_nodes_after", lambda last: tuple(n for n in after(last) if n.target not in scalar))


SCALED = {"loss_scale": "dynamic"}
FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, dict[str, Any], str]] = [
    (without_strides, "adamw", {}, "text"),
    (without_group, "adamw", {}, "text"),
    (without_values, "radam", {}, "text"),
    (without_common, "adamw", {"loss_scale": 8.0, "clip_grad_norm": 1.0}, "text"),
    (with_state_of_the_first, "adamw", {}, "text"),
    (with_select_of_the_first, "adamw", SCALED, "text"),
    (with_guards_of_the_first, "adamw", {}, "guards"),
    (with_reads_of_the_first, "adamw", {}, "guards"),
    (without_dead_nodes, "adamw", SCALED, "text"),
]


@pytest.mark.parametrize(("fault", "name", "plan", "said"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None],
    name: str,
    plan: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inventory = late() if name == "radam" else job(name)[0]
    fault(monkeypatch)
    got, expected = both(inventory, False, options(inventory, **plan))
    assert (difference(inventory, got, expected) or "none").startswith(said)
