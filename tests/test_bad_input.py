"""What cannot be compiled is refused in the user's terms, and leaves model, optimizer and random state as they were."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module

import fxzero
from fxzero.errors import CaptureError, FxzeroError, PlanError

ROWS, WIDTH, CLASSES = 5, 4, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, CLASSES))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randint(0, CLASSES, (ROWS,), generator=generator)


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *_: Any) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


class Remembered:
    """Everything about a model and its optimizer that a failed compile could touch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.now = self.look()

    def look(self) -> dict[str, Any]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        tensors = {**parameters, **dict(self.model.named_buffers())}
        return {
            "identity": {name: id(value) for name, value in tensors.items()},
            "values": {name: value.detach().clone() for name, value in tensors.items() if not value.is_meta},
            "gradients": {name: value.grad for name, value in parameters.items()},
            "modules": {name: self.attributes(module) for name, module in self.model.named_modules()},
            "state": {id(p): dict(state) for p, state in self.optimizer.state.items()},
            "groups": [[(k, v) for k, v in group.items() if k != "params"] for group in self.optimizer.param_groups],
            "held": [id(p) for group in self.optimizer.param_groups for p in group["params"]],
            "optimizer": sorted(vars(self.optimizer)),
            "random": torch.get_rng_state(),
            "hooks": len(nn_module._global_forward_pre_hooks) + len(nn_module._global_forward_hooks),
            "modes": (torch.is_grad_enabled(), torch.get_default_dtype()),
        }

    def attributes(self, module: nn.Module) -> dict[str, Any]:
        plain = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        tables = {key: list(value) for key, value in vars(module).items() if isinstance(value, dict)}
        return {key: list(value) if isinstance(value, list) else value for key, value in plain.items()} | tables

    def check(self) -> None:
        """Nothing has changed since."""
        after = self.look()
        for what, before in self.now.items():
            if what == "values":
                changed = [name for name, value in before.items() if not torch.equal(value, after[what][name])]
                assert changed == [], "values"
            elif what == "random":
                assert torch.equal(before, after[what]), "random state"
            else:
                assert before == after[what], what


def refused(
    match: str,
    *args: Any,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    kind: type[FxzeroError] = CaptureError,
    loss: Callable[..., Any] | None = cross_entropy,
    plan: Any = None,
) -> FxzeroError:
    """The error that compiling and calling a step ends in; everything is as it was before."""
    model = network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters()) if optimizer is None else optimizer
    remembered = Remembered(model, optimizer)
    with pytest.raises(kind, match=match) as caught:
        fxzero.compile(model, optimizer, plan, loss=loss)(*(args or batch()))
    remembered.check()
    assert "\n" not in str(caught.value)
    return caught.value


# ---- plans


def test_an_unknown_plan_key_gets_the_nearest_name() -> None:
    refused(r"got 'zeros'; did you mean 'zero'\?", plan={"zeros": 3}, kind=PlanError)


def test_a_mesh_that_does_not_multiply_to_the_world_size() -> None:
    refused(r"world size 1, got dp=2 = 2", plan={"mesh": {"dp": 2}}, kind=PlanError)


def test_a_tier_that_there_is_not() -> None:
    says = r"Plan\.offload_optimizer: expected 'none' or 'host' or 'nvme' or 'auto', got 'cpu'"
    refused(says, plan={"offload_optimizer": "cpu"}, kind=PlanError)


def test_an_unknown_pass_to_disable() -> None:
    refused(r"disable: expected names of passes, got 'bucket'", plan={"disable": ["bucket"]}, kind=PlanError)


# ---- optimizers


def test_an_optimizer_over_other_parameters() -> None:
    other = torch.optim.AdamW(network().parameters())
    refused(r"param_groups\[0\]\['params'\]\[0\]: expected a parameter of the model", optimizer=other)


def test_an_optimizer_over_some_other_parameters() -> None:
    model = network()
    optimizer = torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.zeros(7))])
    refused(
        r"\['params'\]\[6\]: expected a parameter of the model, got a tensor of shape \(7,\)",
        model=model,
        optimizer=optimizer,
    )


def test_lbfgs() -> None:
    model = network()
    refused("LBFGS: expected an optimizer whose step", model=model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_step_hooks(register: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())

    def clip(*_: Any) -> None:
        raise AssertionError("a hook ran")

    getattr(optimizer, register)(clip)
    refused("AdamW: expected an optimizer without step hooks, got hooks clip", model=model, optimizer=optimizer)


def test_an_optimizer_that_is_differentiated_through() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), differentiable=True)
    refused("expected differentiable=False", model=model, optimizer=optimizer)


class Backtracking(torch.optim.Optimizer):
    """Steers by the values of gradients."""

    def step(self, closure: None = None) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad.norm() > 1:
                    parameter.sub_(parameter.grad)


def test_an_optimizer_that_steers_by_values() -> None:
    model = network()
    error = refused(r"Backtracking\.step", model=model, optimizer=Backtracking(model.parameters(), {}))
    assert "if parameter.grad.norm() > 1:" in str(error) and "test_bad_input.py" in str(error)


class Cooling(torch.optim.SGD):
    """Changes its own learning rate."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.param_groups[0]["lr"] *= 0.9


def test_an_optimizer_that_changes_its_hyperparameters() -> None:
    model = network()
    optimizer = Cooling(model.parameters(), lr=0.1)
    refused(
        r"Cooling\.param_groups\[0\]\['lr'\]: expected hyperparameters that step\(\) only reads",
        model=model,
        optimizer=optimizer,
    )


# ---- losses


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda model, x, y: model(x), r"a tensor of shape \(5, 3\)"),
        (lambda model, x, y: model(x).argmax(), r"dtype torch\.int64"),
        (lambda model, x, y: model(x).detach().mean(), "a tensor that needs no gradient"),
        (lambda model, x, y: x.mean(), "a tensor that needs no gradient"),
        (lambda model, x, y: 1.0, "float"),
        (lambda model, x, y: None, "NoneType"),
        (lambda model, x, y: (cross_entropy(model, x, y), 1), "tuple"),
    ],
    ids=["vector", "integer", "detached", "without the model", "number", "nothing", "pair"],
)
def test_a_loss_that_is_no_differentiable_scalar(loss: Callable[..., Any], got: str) -> None:
    refused(f"loss: expected a differentiable scalar tensor, got {got}", loss=loss)


def test_a_loss_that_was_read_by_item() -> None:
    refused("loss: expected a differentiable scalar tensor", loss=lambda model, x, y: model(x).mean().item())


def test_a_model_that_returns_no_loss() -> None:
    refused(r"loss: expected a differentiable scalar tensor, got a tensor of shape \(5, 3\)", batch()[0], loss=None)


def test_a_metric_that_is_no_tensor() -> None:
    refused(
        "metric 'rows' of the loss function: expected a tensor, got int",
        loss=lambda m, x, y: (cross_entropy(m, x, y), {"rows": 5}),
    )


def test_a_loss_function_that_raises() -> None:
    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        model(x)
        raise KeyError("temperature")

    error = refused(r"KeyError: 'temperature'", loss=loss)
    assert 'raise KeyError("temperature")' in str(error) and isinstance(error.__cause__, KeyError)


# ---- batches


@pytest.mark.parametrize(
    ("args", "got"),
    [
        ((batch()[0],), "missing 1 required positional argument: 'y'"),
        ((batch()[0], {"y": batch()[1]}), "must be Tensor, not dict"),
        ((torch.randn(ROWS, WIDTH + 1), batch()[1]), "must have same reduction dim"),
    ],
    ids=["missing", "nested", "width"],
)
def test_a_batch_of_another_structure(args: tuple[Any, ...], got: str) -> None:
    error = refused(got, *args)
    assert "torch.where" not in str(error), "advice for another fault"


def test_a_batch_of_another_structure_after_a_good_one_leaves_the_step_usable() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    step = fxzero.compile(model, optimizer, loss=cross_entropy)
    step(*batch())
    remembered = Remembered(model, optimizer)
    for args in [(batch()[0],), (batch(),), (batch()[0], {"y": batch()[1]})]:
        with pytest.raises(CaptureError):
            step(*args)
        remembered.check()
    assert torch.isfinite(step(*batch()))


@pytest.mark.parametrize("leaf", [batch()[1].numpy(), {1, 2}, nn.ReLU()], ids=["numpy", "set", "module"])
def test_a_batch_with_a_leaf_that_is_no_plain_value(leaf: Any) -> None:
    refused(r"args\.2: expected ", *batch(), leaf)


# ---- models


def test_a_compiled_model() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    refused("expected a plain module, got one from torch.compile", model=torch.compile(model), optimizer=optimizer)


def test_a_model_compiled_in_place() -> None:
    model = network()
    model.compile()
    refused(r"torch\.compile|dynamo", model=model)


def test_a_model_with_a_compiled_part() -> None:
    model = network()
    model[0] = torch.compile(model[0])
    refused(r"torch\.compile|dynamo", model=model)


def test_a_wrapped_model() -> None:
    model = nn.DataParallel(network())
    refused("expected a plain module, got one wrapped by DataParallel", model=model)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ((lambda x: x, None), "model: expected a torch Module, got function"),
        ((network(), network()), "optimizer: expected a torch Optimizer, got Sequential"),
    ],
)
def test_something_else_than_a_model_and_its_optimizer(arguments: tuple[Any, Any], got: str) -> None:
    with pytest.raises(CaptureError, match=got):
        fxzero.compile(*arguments)


def test_a_plan_that_is_no_table() -> None:
    refused("Plan: expected a table of keys, got 3", plan=3, kind=PlanError)


def test_a_model_that_has_a_step_already() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    fxzero.compile(model, optimizer, loss=cross_entropy)(*batch())
    refused("expected ", model=model, optimizer=optimizer)


def test_meta_parameters_without_init() -> None:
    with torch.device("meta"):
        model = network()
    refused(r"parameter 0\.weight: expected parameters with values", model=model, kind=PlanError)


class Embedded(nn.Module):
    """Gradients of its table are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, WIDTH, sparse=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.table(y).sum()


def test_sparse_gradients() -> None:
    model = Embedded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(r"gradient of table\.weight: expected a dense gradient", model=model, optimizer=optimizer, loss=None)


class Undecided(nn.Module):
    """Decides by values, and leaves things on itself before it does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.by_name = 0, {"last": None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(torch.dropout(x, 0.5, self.training))
        self.calls += 1
        self.by_name["last"] = hidden
        self.cache = hidden
        if hidden.sum() > 0:
            hidden = hidden * 2
        return hidden


def test_control_flow_that_depends_on_data_names_module_and_line() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(Undecided()), nn.Linear(WIDTH, CLASSES))
    error = refused(r"module '1\.0' of Sequential", model=model)
    assert re.search(r"test_bad_input\.py:\d+ \(if hidden\.sum\(\) > 0:\)", str(error))
    assert error.__cause__ is not None
    assert model[1][0].by_name == {"last": None}


class Listing(nn.Sequential):
    """Keeps what it sees in a list."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.mean())
        return super().forward(x)


def test_a_failed_capture_leaves_lists_on_modules_alone() -> None:
    refused("loss: expected", model=Listing(nn.Linear(WIDTH, CLASSES)), loss=lambda model, x, y: model(x))


def test_a_failed_capture_can_be_followed_by_a_good_one() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    step = fxzero.compile(model, optimizer, loss=cross_entropy)
    with pytest.raises(CaptureError):
        step(batch()[0])
    plain = network()
    torch.manual_seed(1)
    expected = cross_entropy(plain, *batch())
    torch.manual_seed(1)
    assert torch.equal(step(*batch()), expected.detach())


# ---- calls at a wrong moment, and what is no error


def test_a_call_within_unsharded() -> None:
    model = network()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), loss=cross_entropy)
    with step.unsharded(), pytest.raises(CaptureError, match="leave the block first"):
        step(*batch())
    assert torch.isfinite(step(*batch()))


@pytest.mark.parametrize("look", [lambda step: step.graph, lambda step: step.captured, lambda step: step.report()])
def test_a_look_at_a_step_that_has_not_run(look: Callable[[fxzero.TrainStep], Any]) -> None:
    model = network()
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), loss=cross_entropy)
    with pytest.raises(CaptureError, match="expected a step that has run"):
        look(step)


def test_a_loss_that_is_nan_is_returned() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), loss=cross_entropy)
    assert step(*batch()).isnan() and step(*batch()).isnan()
    assert model[3].weight.isnan().all(), "the update is not hidden either"
