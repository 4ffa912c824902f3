"""Texts of regions that leave sizes open: expressions from two numbers, conditions on sizes, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fxzero.lower.conditions import hold
from fxzero.lower.symbolic_text import as_text, symbolic_text

HERE, THERE = {"batch": 4, "length": 24}, {"batch": 3, "length": 23}


def document(*numbers: Any, op: str = "aten::view.default") -> str:
    shape = [*numbers]
    return as_text({"inputs": [["float32", shape, [1], "cpu"]], "calls": [{"op": op, "args": [{"node": "i0"}, shape]}]})


def at(batch: int, length: int) -> list[int]:
    """Sizes as they come: products, squares, slices, constants."""
    return [batch, length, batch * length * 8, length * length, batch * (length - 1), length + 7, 3 * length - 2, 64]


@pytest.mark.parametrize("sizes", [(2, 9), (16, 512), (5, 5), (1, 1)])
def test_numbers_become_expressions_that_hold_at_other_sizes(sizes: tuple[int, int]) -> None:
    found = symbolic_text(document(*at(4, 24)), HERE, document(*at(3, 23)), THERE)
    assert found is not None and found.names == ("batch", "length")
    assert found.at(dict(zip(HERE, sizes, strict=True))) == document(*at(*sizes))
    assert json.loads(found.text)["sizes"] == ["batch", "length"]
    assert found.values({"length": 7, "batch": 5}) == (5, 7), "in the order of the text's names"


def test_a_size_that_is_not_read_is_no_input() -> None:
    found = symbolic_text(document(24, 8), HERE, document(23, 8), THERE)
    assert found is not None and found.names == ("length",)


def test_the_ops_that_were_chosen_are_compiled_and_regions_are_found_by_their_own() -> None:
    one, other = document(24), document(23)
    found = symbolic_text(one, HERE, other, THERE, chosen=document(24, op="mine::view"))
    assert found is not None and '"mine::view"' in found.text
    assert found.at(HERE) == one


@pytest.mark.parametrize(
    "other",
    [document(4, 24), document(4, 24, 1), document(3.5, 23), document("3", 23), document(3, 23, op="aten::add.Tensor")],
    ids=["equal", "longer", "float", "text", "op"],
)
def test_texts_that_differ_otherwise_have_no_symbolic_form(other: str) -> None:
    assert symbolic_text(document(4, 24), HERE, other, THERE) is None


def test_conditions_are_asked_of_sizes_and_hold_only_where_they_can_be() -> None:
    sizes = {"batch": 4, "length": 24}
    assert hold(["batch*length <= 96", "Eq(Mod(length, 8), 0)", "(batch > 1) & (length > 1)", "batch**2 < 17"], sizes)
    for false in (
        "batch*length < 96",
        "Ne(length, 24)",
        "Unknown(batch) > 0",
        "~(batch > 5)",
        "rows > 1",
        "length/0 > 1",
    ):
        assert not hold([false], sizes), false
