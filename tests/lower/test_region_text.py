"""The canonical text of regions: equal for equal regions, other for others, and enough to compute from."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import fx

from fxzero import compat
from fxzero.errors import LoweringError
from fxzero.graph import StateEntry, StepGraph
from fxzero.graph.number_arguments import with_tensors
from fxzero.graph.regions import Region, mark
from fxzero.graph.step_graph import Result
from fxzero.graph.storage import InPlace
from fxzero.lower.region_text import read_region, region_text

aten = torch.ops.aten


def step_of(build: Callable[..., list[fx.Node]], *inputs: torch.Tensor | float) -> tuple[StepGraph, Region]:
    """A step whose calls are one region; the last of them is returned."""
    graph, mode = fx.Graph(), compat.new_fake_mode()
    sources = []
    for index, value in enumerate(inputs):
        node = graph.placeholder(f"in{index}")
        val = compat.fake_like(mode, value) if isinstance(value, torch.Tensor) else value
        node.meta = {"entry": StateEntry("batch", f"in{index}"), "val": val, "phase": "forward", "module": ""}
        sources.append(node)
    calls = build(graph, *sources)
    for node in calls:
        with mode:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta = {"val": node.target(*args, **kwargs), "phase": "forward", "module": ""}
    graph.output((calls[-1],)).meta["results"] = (Result("loss", "loss"),)
    mark(0, calls)
    return StepGraph(graph), Region(0, tuple(calls))


def text_of(build: Callable[..., list[fx.Node]], *inputs: torch.Tensor | float) -> str:
    step, region = step_of(build, *inputs)
    return region_text(region, InPlace(step)).text


def scaled(factor: float) -> Callable[..., list[fx.Node]]:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        product = graph.call_function(aten.mul.Tensor, (x, y))
        return [product, graph.call_function(aten.mul.Scalar, (product, factor))]

    return build


X, Y = torch.rand(4, 6), torch.rand(4, 6)


def test_names_and_values_are_no_part_of_it() -> None:
    assert text_of(scaled(2.0), X, Y) == text_of(scaled(2.0), Y + 1, X)
    assert text_of(scaled(2.0), X, 0.25) == text_of(scaled(2.0), X, 7.5)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (scaled(3.0), (X, Y)),
        (scaled(2.0), (X, Y[:, :1])),
        (scaled(2.0), (X, torch.rand(6, 4).t())),
        (scaled(2.0), (X, Y.double())),
        (scaled(2.0), (X, 0.5)),
        (scaled(2.0), (X, X.new_tensor(0.5))),
    ],
    ids=["literal", "shape", "strides", "dtype", "number", "no_dimensions"],
)
def test_what_a_compiler_must_know_is_part_of_it(build: Callable[..., list[fx.Node]], inputs: tuple) -> None:
    assert text_of(build, *inputs) != text_of(scaled(2.0), X, Y)


def test_a_region_is_read_back() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> list[fx.Node]:
        parts = graph.call_function(aten.split.Tensor, (x, 2, 1))
        first = graph.call_function(__import__("operator").getitem, (parts, 0))
        cast = graph.call_function(
            aten._to_copy.default, (first,), {"dtype": torch.float64, "device": torch.device("cpu")}
        )
        full = graph.call_function(aten.clamp.default, (cast, 0.25, float("inf")))
        return [parts, first, cast, full, graph.call_function(aten.sum.dim_IntList, (full, [1], True))]

    module, fakes = read_region(text_of(build, X, Y), compat.new_fake_mode())
    assert [(fake.shape, fake.stride(), fake.dtype) for fake in fakes] == [(X.shape, X.stride(), X.dtype)]
    torch.testing.assert_close(module(X)[0], X[:, :2].double().clamp(0.25).sum(1, True), rtol=0, atol=0)


def test_an_argument_without_a_text_is_refused() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> list[fx.Node]:
        return [graph.call_function(aten.rand_like.default, (x,))]

    step, region = step_of(build, X)
    region.calls[0].kwargs = {"generator": torch.Generator()}
    with pytest.raises(LoweringError, match="got Generator"):
        region_text(region, InPlace(step))


# ---- numbers as tensors

NUMBER, T = "number", "tensor"
FORMS = [
    (aten.add.Tensor, (T, NUMBER), None),
    (aten.sub.Tensor, (T, NUMBER), None),
    (aten.mul.Tensor, (T, NUMBER), None),
    (aten.div.Tensor, (T, NUMBER), None),
    (aten.add.Scalar, (T, NUMBER), None),
    (aten.sub.Scalar, (T, NUMBER), None),
    (aten.mul.Scalar, (T, NUMBER), None),
    (aten.div.Scalar, (T, NUMBER), None),
    (aten.lerp.Scalar, (T, T, NUMBER), None),
    (aten.pow.Tensor_Scalar, (T, NUMBER), None),
    (aten.addcmul.default, (T, T, T), "value"),
    (aten.addcdiv.default, (T, T, T), "value"),
    (aten.add.Tensor, (T, T), "alpha"),
    (aten.sub.Tensor, (T, T), "alpha"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[2]}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(number=st.floats(0.125, 4.0), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_a_number_may_come_as_a_tensor(form: tuple, dtype: torch.dtype, number: float, seed: int) -> None:
    op, kinds, keyword = form
    graph = fx.Graph()
    sources = [graph.placeholder(f"p{index}") for index in range(4)]
    for node in sources:
        node.meta["val"] = 0.5
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(5, generator=generator).add(0.5).to(dtype) for _ in kinds]
    nodes = [
        sources[3] if kind == NUMBER else fx.Node(graph, f"t{i}", "placeholder", "t", (), {})
        for i, kind in enumerate(kinds)
    ]
    node = graph.call_function(op, tuple(nodes), {keyword: sources[3]} if keyword else {})
    function = with_tensors(node)
    as_tensor = torch.tensor(number, dtype=torch.float64)
    filled = [as_tensor if kind == NUMBER else value for kind, value in zip(kinds, values, strict=True)]
    plain = [number if kind == NUMBER else value for kind, value in zip(kinds, values, strict=True)]
    got = function(*filled, **({keyword: as_tensor} if keyword else {}))
    expected = op(*plain, **({keyword: number} if keyword else {}))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_an_op_without_such_a_form_stays_out_of_regions() -> None:
    graph = fx.Graph()
    number, x = graph.placeholder("n"), graph.placeholder("x")
    number.meta["val"], x.meta["val"] = 0.5, X
    assert with_tensors(graph.call_function(aten.full.default, ([2], number))) is None
    assert with_tensors(graph.call_function(aten.clamp.default, (x, number))) is None
    assert with_tensors(graph.call_function(aten.mul.Tensor, (number, x))) is None
    assert with_tensors(graph.call_function(aten.relu.default, (x,))) is aten.relu.default
