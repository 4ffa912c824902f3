"""Steps of models of `transformers` and of single layers, run as graphs: before and after kernels are put in."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

import fxzero
from fxzero import Plan, StepGraph
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.graph.step_graph import is_view, iter_views, num_bytes, yields_tensor
from fxzero.recipe import captured_as, recipe
from tests.hf.models import CASES
from tests.lower.models import Decoder, tokens

Outcome = dict[tuple[str, str], torch.Tensor]
RATE = 0.5


@functools.cache
def hf_step(name: str, precision: str = "fp32") -> StepGraph:
    """A step of one of tests/hf/models.py; its next momenta are the gradients. Not to be changed."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model()
    batch = case.batch(torch.Generator().manual_seed(5))
    return captured(model, case.loss, (), batch, precision=precision)


def captured(
    model: nn.Module, loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **keys: Any
) -> StepGraph:
    """A step of SGD with momentum that begins at nothing, so that it ends at the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    inventory = rehearse(Inventory.of(model, optimizer))[0]
    return capture_step(inventory, loss, args, kwargs or {}, options=captured_as(Plan(**keys))).step


class Alone(nn.Module):
    """A function of two tensors, and nothing else: loss and gradients are as exact as it is.

    Args:
        function: of the two.
        shapes: of both.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = (nn.Parameter(torch.ones(shape)) for shape in shapes)
        self.register_buffer("given", torch.ones(shapes[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.function(self.first, self.second).float() * self.given).sum()


def is_no_less_accurate(
    fuse: Callable[[StepGraph], int], function: Callable[..., torch.Tensor], *shapes: tuple[int, ...], edits: int = 1
) -> tuple[float, float]:
    """Errors of loss and gradients in bf16, as captured and fused, against the same step in fp64; over some draws."""
    step, exact = (captured(Alone(function, *shapes), None, (torch.ones(1),), precision=p) for p in ("bf16", "fp32"))
    fused, exact = step.copy(), without_casts(exact)
    assert fuse(fused) == edits, fused.remarks
    errors = [0.0, 0.0]
    for seed in range(4):
        wide = outcome(exact, values_of(exact, seed=seed, wide=True))
        for place, graph in enumerate((step, fused)):
            errors[place] += difference(outcome(graph, values_of(graph, seed=seed)), wide)
    return errors[0], errors[1]


@functools.cache
def long_step(precision: str) -> StepGraph:
    """A Llama on rows so long that what backward reads is large. Not to be changed."""
    torch.manual_seed(0)
    ids = torch.randint(4, 100, (2, 1024))
    return captured(CASES["llama"].model(), None, (), {"input_ids": ids, "labels": ids}, precision=precision)


def kept_bytes(step: StepGraph, **keys: Any) -> int:
    """Bytes that forward leaves for backward where a plan runs on one rank."""
    made = step.copy()
    made.mesh = {"dp": 1}
    made = recipe(Plan(zero=0, chunk_loss=128, **keys).resolve(1), backend="gloo").run(made)
    own = [node for node in made.phase("forward") if yields_tensor(node) and not is_view(node)]
    return sum(num_bytes(node.meta["val"]) for node in own if _is_read_in_backward(node))


def _is_read_in_backward(node: fx.Node) -> bool:
    users = [*node.users, *(user for view in iter_views(node) for user in view.users)]
    return any(user.meta.get("phase") == "backward" for user in users)


def values_of(step: StepGraph, *, seed: int = 3, wide: bool = False) -> list[Any]:
    """Values for all inputs, which bf16 holds: momenta are zero, norms' weights about one, indices zero or one.

    Args:
        step: a graph.
        seed: of what is drawn.
        wide: floating ones in fp64.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Any] = []
    for node in step.placeholders:
        val, entry = node.meta["val"], node.meta["entry"]
        if not isinstance(val, torch.Tensor):
            found.append(val)
        elif not val.is_floating_point():
            found.append(torch.randint(0, 2, val.shape, generator=generator).to(val.dtype))
        elif entry.kind == "optimizer":
            found.append(torch.zeros(val.shape, dtype=torch.float64 if wide else val.dtype))
        else:
            drawn = 0.3 * torch.randn(val.shape, generator=generator).bfloat16() + ("norm" in entry.name)
            found.append(drawn.to(torch.float64 if wide else val.dtype))
    return found


def outcome(step: StepGraph, values: list[Any]) -> Outcome:
    """What a graph of one rank returns for these inputs, but for numbers."""
    torch.manual_seed(0)
    returned = fx.GraphModule({}, step.graph)(*values)
    pairs = zip(step.results, returned, strict=True)
    return {key: value for key, value in pairs if isinstance(value, torch.Tensor) and value.is_floating_point()}


def difference(found: Outcome, expected: Outcome) -> float:
    """The greatest relative error of loss and gradients; of a gradient near zero, relative to the largest ones."""
    assert found.keys() == expected.keys()
    kept = [key for key in expected if key[0] in ("loss", "optimizer")]
    largest = max(float(expected[key].norm()) / expected[key].numel() ** 0.5 for key in kept)
    errors = []
    for key in kept:
        scale = max(float(expected[key].norm()), 1e-2 * largest * expected[key].numel() ** 0.5)
        errors.append(float((found[key].double() - expected[key].double()).norm()) / scale)
    return max(errors)


def without_casts(step: StepGraph) -> StepGraph:
    """The graph for inputs in fp64."""
    wide = step.copy()
    for node in wide.calls(torch.ops.aten._to_copy.default):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    return wide


def fused_difference(step: StepGraph, fuse: Callable[[StepGraph], Any], *, seed: int = 3) -> tuple[float, StepGraph]:
    """How far a graph is from itself with kernels, and that one."""
    fused = step.copy()
    fuse(fused)
    fused.graph.lint()
    values = values_of(step, seed=seed)
    return difference(outcome(fused, values), outcome(step, values)), fused


def trained(model: Callable[[], nn.Module], *, steps: int = 2, rows: int = 4, **keys: Any) -> list[torch.Tensor]:
    """Losses of some steps of a plan, and the parameters behind them."""
    torch.manual_seed(0)
    made = model()
    step = fxzero.compile(made, torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9), Plan(**{"zero": 0, **keys}))
    torch.manual_seed(1)
    losses = [step(*tokens(i, rows=rows)).detach() for i in range(steps)]
    return [*losses, *(p.detach() for p in made.parameters())]


def far_apart(a: list[torch.Tensor], b: list[torch.Tensor], *, rtol: float) -> list[int]:
    """The places at which two lists of tensors differ by more than their largest element times `rtol`."""
    pairs = enumerate(zip(a, b, strict=True))
    return [i for i, (x, y) in pairs if not torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))]


def decoder(**settings: Any) -> Callable[[], nn.Module]:
    """A builder of two blocks, the same each time."""
    return functools.partial(copy.deepcopy, _decoder(**settings))


def _decoder(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(2, **settings)
