"""What is kept between forward and backward: little, by the call that it belongs to, for as long as it is needed."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fxzero.backend import programs
from fxzero.backend.slots import Slots
from fxzero.errors import OffloadError
from tests.backend.models import Decoder, tokens
from tests.backend.reference import compiled

OFFLOAD = {"offload_activations": "host", "offload_below": 0}


@contextmanager
def counted_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Memory that autograd saves in the block -> its bytes; parameters are the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    memory: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            memory[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield memory


def saved_by(wrap: Callable[[nn.Module], Any]) -> int:
    torch.manual_seed(0)
    model = Decoder(4, dropout=0.1)
    called = wrap(model)
    with counted_bytes(model) as memory:
        called(*tokens(0))  # compiles, on fake tensors
        memory.clear()
        loss = called(*tokens(0))
    loss.backward()
    return sum(memory.values())


def test_little_is_saved_and_less_with_blocks() -> None:
    eager = saved_by(lambda model: model)
    default = saved_by(compiled)
    torch.compiler.reset()
    blocks = saved_by(lambda model: compiled(model, recompute="blocks"))
    torch.compiler.reset()
    half = saved_by(lambda model: compiled(model, recompute=0.5))
    assert default < eager
    assert blocks < half < default
    assert blocks < default / 3, (blocks, half, default, eager)


def test_a_mask_of_dropout_is_saved_as_a_byte_an_element() -> None:
    model = compiled(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.15), nn.Linear(64, 64)))
    model(torch.randn(8, 64)).sum().backward()
    saved = [n.meta["val"] for n in programs()[-1].inputs("saved")]
    assert [(val.dtype, tuple(val.shape)) for val in saved if val.dtype is torch.bool] == [(torch.bool, (8, 64))]
    assert sum(val.numel() * val.element_size() for val in saved) == 8 * 64 * (1 + 4)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("options", [{}, {"recompute": "blocks"}, OFFLOAD], ids=str)
def test_two_calls_before_their_backwards(options: dict[str, Any]) -> None:
    model = Decoder(3, dropout=0.1)
    found = []
    for called in (model, compiled(model, **options)):
        torch.manual_seed(1)
        first, second = called(*tokens(0)), called(*tokens(1))
        second.backward()
        of_second = gradients(model)
        first.backward()
        found.append((first.item(), second.item(), of_second, gradients(model)))
    assert found[0][:2] == found[1][:2]
    for want, got in zip(found[0][2] + found[0][3], found[1][2] + found[1][3], strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("options", [{}, {"recompute": "blocks"}, OFFLOAD], ids=str)
def test_backward_may_run_twice(options: dict[str, Any]) -> None:
    """Also where an earlier call's ran once."""
    model = Decoder(3, dropout=0.1)
    called = compiled(model, **options)
    called(*tokens(0)).backward()
    gradients(model)
    loss = called(*tokens(0))
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    for a, b in zip(first, gradients(model), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_backward_in_another_thread() -> None:
    model = Decoder(2)
    called = compiled(model, **OFFLOAD)
    called(*tokens(0)).backward()
    want = gradients(model)
    loss = called(*tokens(0))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(60)
    for a, b in zip(want, gradients(model), strict=True):
        assert torch.equal(a, b)


def test_an_error_in_a_program_names_the_node_and_leaves_the_function_usable() -> None:
    layer = nn.Embedding(10, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4))
    called = compiled(model)
    good = torch.tensor([1, 2])
    want = called(good).sum().item()
    with pytest.raises(IndexError, match="out of range") as caught:
        called(torch.tensor([1, 99]))
    if hasattr(caught.value, "__notes__"):
        assert any("node %embedding" in note for note in caught.value.__notes__)
    out = called(good).sum()
    out.backward()
    assert out.item() == want and layer.weight.grad is not None


def test_a_slot_goes_back_when_its_call_is_forgotten() -> None:
    made: list[Slots] = []
    before = Slots.__init__

    def noted(self: Slots, *args: Any) -> None:
        before(self, *args)
        made.append(self)

    with mock.patch.object(Slots, "__init__", noted):
        called = compiled(Decoder(3), **OFFLOAD)
        for step in range(5):
            loss = called(*tokens(step))
    held = made[0].swapper.held()["host"]
    for step in range(5):
        loss = called(*tokens(step))
    del loss
    gc.collect()
    called(*tokens(0)).backward()
    assert made[0].swapper.held()["host"] <= held


def test_a_hook_that_replaces_saved_tensors_is_told() -> None:
    called = compiled(Decoder(3), **OFFLOAD)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = called(*tokens(0))
    with pytest.raises(OffloadError, match=r"expected the ticket of its slot.*saved_tensors_hooks"):
        loss.backward()


def test_what_backward_has_is_not_saved_twice() -> None:
    """A weight, its transpose, and the parts of a product are one memory each."""
    compiled(Decoder(2))(*tokens(0)).backward()
    backward = programs()[-1]
    assert not [n for n in backward.inputs("saved") if n.name.startswith(("t_", "view", "transpose", "split"))]
    assert len(backward.inputs("parameter")) > 5
