"""The plain PyTorch loop (or DDP) beside fxzero: run one job with both, name the first tensor that differs.

Also the faults that a comparison must find: each is planted into the compiled graph, as a bug in a pass would be.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

import fxzero
from fxzero.capture.loss_scaling import METRICS
from fxzero.graph import StepGraph, ops
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor, coordinate, erase_dead, replace_uses
from fxzero.graph.randomness import is_random
from fxzero.pass_manager import Pipeline
from tests.numerics.models import Batch, Case

aten = torch.ops.aten


@dataclass
class Outcome:
    """All that a run leaves, in the order in which a person would look at it.

    Args:
        values: "loss 3", "metric 3 accuracy", "parameter NAME", "buffer NAME", "state NAME:KEY", "group 0 lr",
            "random state" -> tensor or number.
        early_state: the optimizer state after the first step.
    """

    values: dict[str, Any] = field(default_factory=dict)
    early_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The first thing that two runs do not agree on.

    Args:
        label: which value, as in `Outcome.values`.
        expected, got: the values there, or what is wrong with them.
        amount: largest absolute difference; nan where values cannot be subtracted.
        scale: largest absolute value that was expected.
    """

    label: str
    expected: str
    got: str
    amount: float = float("nan")
    scale: float = float("nan")

    def __str__(self) -> str:
        return f"{self.label}: expected {self.expected}, got {self.got}; differs by {self.amount:g} at {self.scale:g}"


def batches(case: Case, *, rank: int = 0, seed: int = 5) -> list[Batch]:
    """The batches that one rank sees."""
    generator = torch.Generator().manual_seed(seed + 1000 * rank)
    return [case.batch(step, rank, generator) for step in range(case.steps)]


def build(case: Case, *, rank: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer; each rank draws other values, those of rank 0 must win."""
    torch.manual_seed(rank)
    model = case.model()
    return model, case.optimizer(model)


def run_plain(case: Case, *, rank: int = 0, distributed: bool = False) -> Outcome:
    """The loop that everybody writes, in this process or under DDP."""
    model, optimizer = build(case, rank=rank)
    called: nn.Module = model
    if distributed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has no successor yet
            called = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = called(*args, **kwargs) if case.loss is None else case.loss(called, *args, **kwargs)
        loss, metrics = out if isinstance(out, tuple) else (out, {})
        loss.backward()
        metrics = metrics | clip(case, model)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), metrics

    return _run(case, model, optimizer, step, rank=rank)


def clip(case: Case, model: nn.Module) -> dict[str, torch.Tensor]:
    """Clip gradients as torch does; returns the norm as a metric."""
    if "clip_grad_value" in case.clip:
        nn.utils.clip_grad_value_(model.parameters(), case.clip["clip_grad_value"])
    if "clip_grad_norm" not in case.clip:
        return {}
    order = case.clip.get("clip_grad_norm_p", 2.0)
    return {"grad_norm": nn.utils.clip_grad_norm_(model.parameters(), case.clip["clip_grad_norm"], order)}


def run_compiled(case: Case, plan: fxzero.Plan, *, rank: int = 0) -> tuple[Outcome, fxzero.TrainStep]:
    """The same job as one compiled step."""
    model, optimizer = build(case, rank=rank)
    compiled = fxzero.compile(model, optimizer, plan.replace(**case.clip), loss=case.loss)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = compiled(*args, **kwargs)
        return loss, {name: value for name, value in compiled.metrics.items() if name not in METRICS}

    return _run(case, model, optimizer, step, rank=rank), compiled


def _run(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[..., Any], *, rank: int
) -> Outcome:
    out = Outcome()
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    torch.manual_seed(100 + rank)
    for number, (args, kwargs) in enumerate(batches(case, rank=rank)):
        if case.prepare:
            case.prepare(model, number)
        loss, metrics = step(args, kwargs)
        if scheduler:
            scheduler.step()
        out.values[f"loss {number}"] = loss.clone()
        out.values.update({f"metric {number} {name}": value.detach().clone() for name, value in metrics.items()})
        if number == 0:
            out.early_state = optimizer_state(model, optimizer)
    out.values.update(tensors_of(model))
    out.values.update(optimizer_state(model, optimizer))
    for index, group in enumerate(optimizer.param_groups):
        numbers = {key: value for key, value in group.items() if isinstance(value, (int, float, tuple))}
        out.values.update({f"group {index} {key}": value for key, value in numbers.items()})
    out.values["random state"] = torch.get_rng_state()
    return out


def whole(value: Any) -> Any:
    """A copy of a tensor, gathered where it is sharded (all ranks must call this)."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers."""
    named = {f"parameter {name}": whole(p) for name, p in model.named_parameters()}
    return named | {f"buffer {name}": whole(b) for name, b in model.named_buffers()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name."""
    return {
        f"state {name}:{key}": whole(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def first_difference(expected: Outcome, got: Outcome, *, rtol: float = 0.0) -> Difference | None:
    """The first value that is not equal (or not within `rtol` of the largest element expected).

    fxzero keeps state for parameters that the plain loop has not updated yet: it must be what it was at first.
    """
    for label, value in expected.values.items():
        if label not in got.values:
            return Difference(label, repr(value), "nothing")
        found = compare(label, value, got.values[label], rtol=rtol)
        if found:
            return found
    updated = {label.rpartition(":")[0] for label in expected.values if label.startswith("state ")}
    for label in got.values.keys() - expected.values.keys():
        owner, _, key = label.rpartition(":")
        early = got.early_state.get(label)
        if owner in updated or early is None:
            return Difference(label, "nothing", repr(got.values[label]))
        found = compare(label, early if key != "step" else early * 0, got.values[label])
        if found:
            return found
    return None


def compare(label: str, expected: Any, got: Any, *, rtol: float = 0.0) -> Difference | None:
    """How one value differs, if it does."""
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        same = type(expected) is type(got) and (expected == got or (rtol > 0 and _close(expected, got, rtol)))
        return None if same else Difference(label, repr(expected), repr(got))
    if (expected.shape, expected.dtype) != (got.shape, got.dtype):
        return Difference(label, f"{expected.dtype} {list(expected.shape)}", f"{got.dtype} {list(got.shape)}")
    if torch.equal(expected, got):
        return None
    a, b = expected.double(), got.double()
    error = (a - b).abs()
    scale = float(a.abs().max())
    if rtol and float(error.max()) <= rtol * scale:
        return None
    worst = int(error.argmax())
    where = f"{a.flatten()[worst].item():.9g} at {worst} of {a.numel()}"
    return Difference(label, where, f"{b.flatten()[worst].item():.9g}", float(error.max()), scale)


def _close(expected: Any, got: Any, rtol: float) -> bool:
    return isinstance(expected, float) and abs(expected - got) <= rtol * abs(expected)


def num_programs(compiled: fxzero.TrainStep) -> int:
    """How many programs a step has compiled so far."""
    return sum(len(programs) for programs in compiled._programs._compiled.values())


# ---- faults


@contextlib.contextmanager
def planted(edit: Callable[[StepGraph], int], *, verified: bool = True) -> Iterator[None]:
    """Steps compiled in the block end with one more pass, which does something wrong.

    Args:
        edit: (step) -> number of edits; must find something to edit.
        verified: whether the verifier looks at it; off where it would find the fault before a comparison could.
    """
    page = importlib.import_module("fxzero.decide.search")  # where a plan becomes passes
    manager = importlib.import_module("fxzero.pass_manager")
    recipe = page.recipe

    @graph_pass(requires=("captured",))
    def planted_fault(step: StepGraph) -> int:
        """Break the step."""
        edits = edit(step)
        assert edits, f"{edit.__name__} found nothing to break"
        return edits

    def broken_recipe(plan: fxzero.Plan, **how: Any) -> Pipeline:
        return Pipeline([*recipe(plan, **how).passes, planted_fault])

    with mock.patch.object(page, "recipe", broken_recipe), contextlib.ExitStack() as stack:
        if not verified:
            stack.enter_context(mock.patch.object(manager, "verify", lambda *_, **__: None))
        yield


def double_gradient(step: StepGraph) -> int:
    """The first gradient counts twice."""
    name, gradient = next(iter(step.gradients().items()))
    users = list(gradient.users)
    editor = Editor(step, phase="backward", param=name)
    with editor.after(gradient):
        doubled = editor.call(aten.mul.Tensor, gradient, 2)
    return replace_uses(gradient, doubled, users)


def drop_dropout(step: StepGraph) -> int:
    """Masks are drawn, but what they should mask passes through in forward."""
    edits = 0
    for mask in [node for node in step.calls() if is_random(node)]:
        (scaled,) = mask.users
        for product in [user for user in scaled.users if user.meta["phase"] == "forward"]:
            (kept,) = [source for source in product.all_input_nodes if source is not scaled]
            product.replace_all_uses_with(kept)
            edits += 1
    return edits


def skip_update(step: StepGraph) -> int:
    """The first parameter stays as it is."""
    name = next(name for kind, name in step.results if kind == "parameter")
    before = step.input("parameter", name)
    assert before is not None
    step.set_result("parameter", name, before)
    return 1 + erase_dead(step)


def keep_buffers(step: StepGraph) -> int:
    """Buffers stay as they are."""
    names = [name for kind, name in step.results if kind == "buffer"]
    for name in names:
        before = step.input("buffer", name)
        assert before is not None
        step.set_result("buffer", name, before)
    return len(names) + erase_dead(step)


def untie(step: StepGraph) -> int:
    """A gradient that is a sum over the uses of a tied weight loses its second use."""
    for name, gradient in step.gradients().items():
        if gradient.target is aten.add.Tensor:
            first = gradient.args[0]
            gradient.replace_all_uses_with(first)
            first.meta["grad_of"] = (name,)
            return 1
    return 0


def ignore_decay(step: StepGraph) -> int:
    """The second parameter group has the hyperparameters of the first."""
    edits = 0
    for node in step.inputs("hyperparameter"):
        name = node.meta["entry"].name
        other = step.input("hyperparameter", name.replace("groups.1.", "groups.0."))
        if name.startswith("groups.1.") and other is not None:
            edits += replace_uses(node, other, list(node.users))
    return edits


def skip_ranks(step: StepGraph) -> int:
    """Each reduction takes one rank for all: this one's gradient, or the first of the parts that were received."""
    edits = 0
    for wait in step.calls(c10d.wait):
        launch = c10d.launched_by(wait)
        editor = Editor(step, phase="backward", param=launch.meta.get("param"))
        if launch.target is c10d.all_reduce:
            wait.replace_all_uses_with(launch.args[0])
        elif launch.target is c10d.reduce_scatter:
            sharding = wait.meta["sharding"]
            index = coordinate(step, sharding.axis)
            with editor.before(launch):
                own = editor.call(ops.local_shard, launch.args[0], sharding.num_shards, index, sharding=sharding)
            wait.replace_all_uses_with(own)
        elif launch.target is c10d.all_to_all:
            (parts,) = wait.users
            (mean,) = parts.users
            with editor.after(parts):
                first = editor.call(aten.select.int, parts, 0, 0, sharding=mean.meta["sharding"])
            mean.replace_all_uses_with(first)
        else:
            continue
        edits += 1
    return edits + erase_dead(step)


def drop_wait(step: StepGraph) -> int:
    """The first collective is read before it has arrived."""
    wait = step.calls(c10d.wait)[0]
    wait.replace_all_uses_with(wait.args[0])
    step.graph.erase_node(wait)
    return 1


def forget_ranks_norm(step: StepGraph) -> int:
    """A rank clips by the norm of its own rows."""
    norm = next(n for n in step.calls(c10d.all_reduce) if n.name.startswith("grad_norm"))
    (wait,) = norm.users
    wait.replace_all_uses_with(norm.args[0])
    step.graph.erase_node(wait)
    step.graph.erase_node(norm)
    return 1


def take_rows_of_first(step: StepGraph) -> int:
    """Every rank takes the rows of rank 0 out of a whole tensor."""
    nodes = step.calls(ops.local_shard)
    for node in nodes:
        node.args = (node.args[0], node.args[1], 0)
    return len(nodes)


def read_released(step: StepGraph) -> int:
    """Backward reads what was gathered for forward and released since."""
    for wait in step.calls(c10d.wait):
        name = wait.meta.get("param")
        if wait.meta["phase"] != "backward" or c10d.launched_by(wait).target is not c10d.all_gather:
            continue
        first = next(w for w in step.calls(c10d.wait) if w.meta.get("param") == name)
        releases = [user for user in wait.users if c10d.is_release(user)]
        for release in releases:
            step.graph.erase_node(release)
        wait.replace_all_uses_with(first)
        return 1 + len(releases) + erase_dead(step)
    return 0


def skip_replicas(step: StepGraph) -> int:
    """Gradients are reduced over the shards of one replica, not over the replicas."""
    edits = 0
    for wait in step.calls(c10d.wait):
        launch = c10d.launched_by(wait)
        if launch.target is c10d.all_reduce and c10d.axis_of(launch) == "dp_replicate":
            wait.replace_all_uses_with(launch.args[0])
            edits += 1
    return edits + erase_dead(step)
