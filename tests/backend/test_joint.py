"""What inputs and modules are called, and what a graph may not hold."""

import pytest
import torch
from torch import nn

from fxzero.backend import programs
from fxzero.backend.joint import module_path
from tests.backend.models import Decoder, tokens
from tests.backend.reference import compiled


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].layers.1.bn", "layers.1.bn"),
        ("L['model']._modules['layers']._modules['0']", "layers.0"),
        ("L['self'].layers[0].head", "layers.0.head"),
        ("G['model']", ""),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_a_path_of_a_module(source: str, path: str) -> None:
    assert module_path(source) == path


def test_inputs_bear_the_names_of_the_model() -> None:
    model = Decoder(2)
    compiled(model)(*tokens(0)).backward()
    forward = programs()[-2]
    named = {node.meta["entry"].name for node in forward.inputs("parameter")}
    assert named == {name for name, _ in model.named_parameters()}
    assert {node.meta["entry"].name for node in forward.inputs("batch")} == {"x", "y"}


def test_equal_names_of_two_models_stay_apart() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    compiled(lambda args: one(args[0]) + two(args[1]))((torch.ones(2, 3), torch.zeros(2, 3))).sum().backward()
    names = [node.meta["entry"].name for node in programs()[-2].placeholders]
    assert len(set(names)) == 6 and "weight" in names and {"args.0", "args.1"} <= set(names)
    assert one.weight.grad is not None and one.weight.grad.abs().sum() > 0 and not two.weight.grad.any()


def branching(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def selecting(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [(branching, "got .*cond.*a call of other graphs|inside of the graph"), (selecting, "known only when it runs")],
)
def test_what_fxzero_has_no_form_for_is_an_error(function: object, message: str) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        with pytest.raises(
            torch._dynamo.exc.BackendCompilerFailed, match=rf"CaptureError: .*({message}).*compiler.disable"
        ):
            compiled(function)(torch.randn(4))


def test_without_that_setting_dynamo_keeps_it_out_itself() -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    assert compiled(selecting)(x).tolist() == [2.0, 4.0]
