"""Sizes that change: right for each, compiled once for each."""

import torch
from torch import fx, nn

from fxzero import compat
from fxzero.backend import programs
from fxzero.backend.shapes import ByShape, is_open
from tests.backend.models import Decoder, tokens
from tests.backend.reference import compiled, regions_interpreted


def titles() -> list[str]:
    return [step.title for step in programs()]


def test_each_number_of_rows_trains_as_in_eager_code() -> None:
    model = Decoder(2, dropout=0.1)
    called = compiled(model)
    for step, rows in enumerate((2, 3, 5, 4, 3, 1, 2)):
        x, y = tokens(step, rows=rows)
        found = []
        for function in (model, called):
            torch.manual_seed(step)
            loss = function(x, y)
            loss.backward()
            found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
            model.zero_grad()
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_sizes_that_came_before_are_found_again() -> None:
    called = compiled(nn.Linear(4, 4), dynamic=True)
    for rows in (2, 3, 5):
        called(torch.randn(rows, 4)).sum().backward()
    before = titles()
    for rows in (5, 2, 3):
        called(torch.randn(rows, 4)).sum().backward()
    assert titles() == before


def test_sizes_are_inputs_and_outputs() -> None:
    def function(x: torch.Tensor, scale: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        return x.view(x.shape[0] * 2, -1) * scale, x.shape[0] + scale, torch.arange(x.shape[1])

    called = compiled(function, dynamic=True)
    for rows, scale in ((2, 5), (3, 5), (3, 7), (4, 9)):
        x = torch.randn(rows, 6)
        got, want = called(x, scale), function(x, scale)
        assert torch.equal(got[0], want[0]) and got[1] == want[1] and torch.equal(got[2], want[2])


def test_floats_may_change() -> None:
    def function(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x * scale + scale**2).sin()

    for dynamic in (None, True):
        called = compiled(function, dynamic=dynamic)
        for scale in (0.5, 0.25, 1.75, 0.25):
            x = torch.randn(3, 2, requires_grad=True)
            assert torch.equal(called(x, scale), function(x, scale))


def test_a_model_with_all_sizes_open() -> None:
    """Embedding.norm_type, a float, is open then, too."""
    model = Decoder(2)
    for step, rows in enumerate((2, 3)):
        loss = compiled(model, dynamic=True)(*tokens(step, rows=rows))
        assert loss.item() == model(*tokens(step, rows=rows)).item()
        loss.backward()


def test_strides_are_part_of_what_is_compiled() -> None:
    """Parts of matrices of several widths: one set of sizes, which a compiled region reads by its strides."""
    module = fx.symbolic_trace(lambda x: (x * 2).sin() + x)
    example = compat.new_fake_mode().from_tensor(torch.randn(4, 4))
    assert is_open(example)
    compiled_for: list[tuple[int, ...]] = []

    def compile_for(graph: fx.GraphModule, inputs: list[torch.Tensor], sizes: object) -> fx.GraphModule:
        compiled_for.append(inputs[0].stride())
        return graph

    by_shape = ByShape(module, [example], compile_for)
    for x in (torch.randn(4, 8)[:, :4], torch.randn(4, 12)[:, :4], torch.randn(4, 4).t(), torch.randn(4, 8)[:, :4]):
        assert torch.equal(by_shape.run(x), module(x))
    assert compiled_for == [(8, 1), (12, 1), (1, 4)]


def test_inputs_that_share_memory_are_other_inputs() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * y

    called = compiled(function, dynamic=True)
    for shared in (False, True, False):
        found = []
        for run in (function, called):
            base = torch.arange(12.0)
            x = base[:6].view(2, 3)
            y = base[3:9].view(2, 3) if shared else torch.arange(6.0).view(2, 3)
            found.append((run(x, y), base))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_regions_serve_all_sizes_from_the_third_set_of_them_on() -> None:
    model = Decoder(2)
    with regions_interpreted() as store:
        called = compiled(model, lowering="inductor")
        for step, rows in enumerate((2, 3, 5, 4, 6)):
            x, y = tokens(step, rows=rows)
            before = len(store.texts)
            loss = called(x, y)
            loss.backward()
            assert loss.item() == model(x, y).item()
            new = set(store.texts[before:]) - set(store.texts[:before])
            assert any('"sizes"' in text for text in new) == (step == 2)
            assert bool(new) == (step < 3)
