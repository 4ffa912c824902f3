"""Matrix products: which may be chosen, what is measured once, and that it disturbs nothing."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import fx

from fxzero import compat, compat_inductor
from fxzero.lower import products
from fxzero.lower.products import Products
from fxzero.lower.store import Store

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(not compat_inductor.has_onednn(), reason="torch without oneDNN")


def product(a: torch.Tensor, b: torch.Tensor) -> fx.Node:
    graph, mode = fx.Graph(), compat.new_fake_mode()
    factors = [graph.placeholder(name) for name in "ab"]
    for node, value in zip(factors, (a, b), strict=True):
        node.meta["val"] = compat.fake_like(mode, value)
    return graph.call_function(aten.mm.default, tuple(factors))


LARGE = torch.rand(256, 256)


@pytest.mark.parametrize("a", [torch.rand(7, 5), torch.rand(5, 7).t()], ids=["rows", "columns"])
@pytest.mark.parametrize("b", [torch.rand(5, 9), torch.rand(9, 5).t()], ids=["rows", "columns"])
def test_the_other_library_computes_the_same_product(a: torch.Tensor, b: torch.Tensor) -> None:
    got = compat_inductor.mm_by_onednn()(a, b)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def test_a_product_is_measured_once_and_the_answer_is_kept(tmp_path: Path) -> None:
    asked = []

    def measure(signature: str) -> str:
        asked.append(signature)
        return "onednn" if signature.endswith("t") else "blas"

    plain, turned = product(LARGE, LARGE), product(LARGE, LARGE.t())
    with mock.patch.object(products, "_measure", measure):
        for _ in range(2):
            chosen = Products(Store(tmp_path)).choose([plain, turned, product(LARGE, LARGE)])
            assert chosen == {turned: compat_inductor.mm_by_onednn()}
    assert asked == ["256x256 * 256x256", "256x256 * 256x256t"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.rand(4, 4), torch.rand(4, 4)),
        (LARGE.double(), LARGE.double()),
        (LARGE.bfloat16(), LARGE.bfloat16()),
        (torch.rand(256, 512)[:, ::2], LARGE),
        (LARGE.t(), LARGE),
    ],
    ids=["small", "double", "bfloat16", "with_gaps", "copied"],
)
def test_what_is_small_or_of_another_form_keeps_its_op(a: torch.Tensor, b: torch.Tensor, tmp_path: Path) -> None:
    with mock.patch.object(products, "_measure", lambda signature: "onednn"):
        assert not Products(Store(tmp_path)).choose([product(a, b)])


def test_measuring_draws_no_random_numbers_of_the_model(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    Products(Store(tmp_path)).choose([product(LARGE, LARGE)])
    assert torch.equal(torch.get_rng_state(), before)
