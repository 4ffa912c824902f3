"""Regions for all sizes of a batch: used where they are the region, compiled for a shape where not; right always."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxzero
from fxzero import compat_inductor
from fxzero.lower import sized_regions
from fxzero.lower.inductor import PinnedError, compile_region
from fxzero.lower.store import VARIABLE, Store
from fxzero.lower.symbolic_text import SymbolicText, as_text, symbolic_text
from tests.lower.interpreted import Interpreted, interpreted
from tests.lower.models import Decoder

needs_compiler = pytest.mark.skipif(compat_inductor.find_cpp_compiler() is None, reason="no C++ compiler")

SIZES = ((4, 16), (2, 32), (3, 25), (8, 8), (5, 19))  # in the second both are by a factor of two from the first
OPEN = 2  # regions of the tiny model that depend on them


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(50, (rows, length + 1), generator=torch.Generator().manual_seed(rows * length))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


class Tiny(nn.Module):
    """What makes two regions that depend on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.embed(x).sigmoid()).flatten(0, 1), y.flatten())


def train(
    lowering: str, *, sizes: Any = SIZES, model: Callable[[], nn.Module] = Tiny, **keys: Any
) -> tuple[list[float], list[Any], fxzero.TrainStep]:
    """Losses, what was lowered at each size, and the step."""
    torch.manual_seed(0)
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-1)
    step = fxzero.compile(made, optimizer, fxzero.Plan(zero=0, lowering=lowering, **keys))
    losses, lowered = [], []
    for size in sizes:
        losses.append(step(*batch(*size)).item())
        lowered.append(step._last[-1].program.lowered)
    return losses, lowered, step


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return train("eager")[0]


def alone(lowered: list[Any]) -> list[int | None]:
    return [one.num_alone for one in lowered]


@pytest.mark.parametrize(("dynamic", "first", "since"), [("auto", None, 2), (True, 0, 1)])
def test_after_the_first_new_size_no_region_is_made_again(
    dynamic: str | bool, first: int | None, since: int, expected: list[float]
) -> None:
    with interpreted() as store:
        losses, lowered, step = train("inductor", dynamic=dynamic)
    assert losses == expected
    assert alone(lowered) == [first, 0, 0, 0, 0]
    texts = [text for text in store.texts if '"sizes"' in text]
    assert len(texts) == len(set(texts)) == lowered[-1].num_open == OPEN
    assert "    values = [5, 19, " in step._last[-1].program.source
    said = (
        f"shapes: 5 programs; batch, sequence symbolic since program {since}; 2 regions of symbolic sizes, 0 compiled"
    )
    assert f"{said} for one shape" in step.report()


class Normed(Tiny):
    """With running statistics, which a region that depends on sizes writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(self.embed(x).flatten(0, 1))), y.flatten())


@pytest.mark.parametrize("model", [functools.partial(Decoder, 1), Normed], ids=["decoder", "normed"])
def test_others_train_to_the_bit_at_all_sizes(model: Callable[[], nn.Module]) -> None:
    how: Any = {"model": model, "sizes": SIZES[:3]}
    with interpreted() as store:
        losses, lowered, step = train("inductor", **how)
    wanted, _, eager = train("eager", **how)
    assert losses == wanted
    assert alone(lowered) == [None, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(step.model.buffers(), eager.model.buffers(), strict=True))
    assert model is not Normed or any('"written":{"i' in text for text in store.texts if '"sizes"' in text)


def test_without_symbols_each_size_has_regions_of_its_own(expected: list[float]) -> None:
    with interpreted() as store:
        losses, lowered, step = train("inductor", dynamic=False)
    assert losses == expected
    assert "shapes: 5 programs\n" in step.report()
    assert alone(lowered) == [None] * len(SIZES) and not any('"sizes"' in text for text in store.texts)


def test_an_expression_that_fits_two_sizes_only_is_never_used_at_a_third(
    expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(one: str, sizes: Any, other: str, others: Any, **keys: Any) -> SymbolicText | None:
        found = symbolic_text(one, sizes, other, others, **keys)
        return None if found is None else spoiled(found, sizes, others)

    monkeypatch.setattr(sized_regions, "symbolic_text", wrong)
    monkeypatch.setattr(sized_regions, "MOST_LESSONS", 1)
    with interpreted():
        losses, lowered, _ = train("inductor")
    assert losses == expected
    assert alone(lowered) == [None, 0, 0, OPEN, OPEN], "learned at two rows and at three"


def spoiled(found: SymbolicText, sizes: Any, others: Any) -> SymbolicText:
    """Every expression with a square added that is 0 at both sizes."""

    def edit(value: Any) -> Any:
        if isinstance(value, dict) and [*value] == ["size"]:
            a, b = sizes["batch"], others["batch"]
            return {"size": [*value["size"], [1, "batch", "batch"], [-(a + b), "batch"], [a * b]]}
        if isinstance(value, dict):
            return {key: edit(item) for key, item in value.items()}
        return [edit(item) for item in value] if isinstance(value, list) else value

    return SymbolicText(as_text(edit(json.loads(found.text))), edit(found.plain), found.names)


class Conditional(Interpreted):
    """A compiler that decides by sizes, as `asks` says of each variant."""

    asks: Callable[[int], list[str]] = lambda variant: []

    def conditions(self, text: str) -> list[str]:
        return type(self).asks(json.loads(text).get("variant", 0)) if '"sizes"' in text else []


def conditional(asks: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.lower.interpreted.Interpreted", type("Asking", (Conditional,), {"asks": staticmethod(asks)})
    )


def test_where_conditions_do_not_hold_a_region_is_compiled_once_more(
    expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    conditional(lambda variant: ["batch*sequence <= 64"] if variant == 0 else ["batch*sequence > 64"], monkeypatch)
    with interpreted() as store:
        losses, lowered, _ = train("inductor")
    assert losses == expected
    assert alone(lowered) == [None, 0, 0, 0, 0]
    assert len([text for text in store.texts if '"variant":1' in text]) == OPEN


def test_regions_whose_conditions_never_hold_are_compiled_for_a_shape(
    expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    conditional(lambda variant: ["batch > 1000"], monkeypatch)
    with interpreted():
        losses, lowered, step = train("inductor")
    assert losses == expected
    assert alone(lowered) == [None, OPEN, OPEN, OPEN, OPEN]
    assert "0 regions of symbolic sizes, 2 compiled for one shape" in step.report()


def test_a_region_that_is_refused_for_all_sizes_is_compiled_for_each(
    expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(self: Interpreted, text: str, make: Any) -> Any:
        if '"sizes"' in text:
            raise PinnedError("batch: pinned")
        return of_text(self, text, make)

    of_text = Interpreted.get
    monkeypatch.setattr(Interpreted, "get", get)
    with interpreted():
        losses, lowered, _ = train("inductor")
    assert losses == expected
    assert alone(lowered) == [None, OPEN, OPEN, OPEN, OPEN]


def test_where_a_pass_makes_another_program_of_a_large_batch_there_is_a_further_lesson() -> None:
    sizes = ((2, 16), (3, 12), (4, 20), (5, 18))  # from 64 tokens on activations are computed again
    how: Any = {"model": functools.partial(Decoder, 1, dim=256), "sizes": sizes}
    with interpreted():
        losses, lowered, _ = train("inductor", **how)
    assert losses == train("eager", **how)[0]
    assert alone(lowered) == [None, 0, 0, 0]


# ---- compiled


def region(rows: Any, flat: Any) -> str:
    """relu(x @ w) of [rows, length, 8], and the sum of all rows."""
    inputs = [["float32", [*rows, 8], [{"size": [[8, "length"]]}, 8, 1], "cpu"], ["float32", [8, 4], [4, 1], "cpu"]]
    calls = [
        {"op": "aten::view.default", "args": [{"node": "i0"}, [flat, 8]]},
        {"op": "aten::mm.default", "args": [{"node": "c0"}, {"node": "i1"}]},
        {"op": "aten::relu.default", "args": [{"node": "c1"}]},
        {"op": "aten::sum.dim_IntList", "args": [{"node": "c2"}, [0]]},
    ]
    return as_text(
        {"inputs": inputs, "calls": calls, "outputs": ["c2", "c3"], "written": {}, "sizes": ["batch", "length"]}
    )


SERVING_ALL = region([{"size": [[1, "batch"]]}, {"size": [[1, "length"]]}], {"size": [[1, "batch", "length"]]})
PINNED = region([4, {"size": [[1, "length"]]}], {"size": [[1, "batch", "length"]]})


@needs_compiler
def test_a_compiled_region_serves_all_sizes_for_which_its_conditions_hold(tmp_path: Path) -> None:
    sizes = {"batch": 4, "length": 6}
    function, made = Store(tmp_path).get(SERVING_ALL, lambda: compile_region(SERVING_ALL, threads=1, sizes=sizes))
    assert made
    for rows, length in ((4, 6), (2, 3), (7, 50)):
        x, w = torch.randn(rows, length, 8), torch.randn(8, 4)
        out, total = function([rows, length, x, w])
        torch.testing.assert_close(out, (x.view(-1, 8) @ w).relu())
        torch.testing.assert_close(total, (x.view(-1, 8) @ w).relu().sum(0), rtol=1e-5, atol=1e-5)
    assert "batch*length <= 4096" in Store(tmp_path).conditions(SERVING_ALL)
    _, made = Store(tmp_path).get(SERVING_ALL, lambda: pytest.fail("compiled again"))
    assert not made, "another process finds it"


@needs_compiler
def test_a_size_that_the_compiler_takes_for_a_number_is_refused_once_and_for_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(PinnedError, match="batch: expected a region for all sizes, got one for 4"):
        store.get(PINNED, lambda: compile_region(PINNED, threads=1, sizes={"batch": 4, "length": 6}))
    assert store.holds(PINNED)
    with pytest.raises(PinnedError, match="got one for 4"):
        Store(tmp_path).get(PINNED, lambda: pytest.fail("compiled again"))


def compiled_at(sizes: Any, **keys: Any) -> tuple[list[float], list[int]]:
    losses, lowered, _ = train("inductor", sizes=sizes, **keys)
    return losses, [one.num_compiled for one in lowered]


@needs_compiler
def test_one_recompile_then_none_and_a_second_run_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    sizes = ((4, 6), (3, 9), (7, 5), (2, 30))
    losses, compiled = compiled_at(sizes)
    assert compiled[0] and compiled[1] and compiled[2:] == [0, 0]
    assert compiled_at(sizes) == (losses, [0, 0, 0, 0])
    assert losses == pytest.approx(train("eager", sizes=sizes)[0], rel=1e-6)
