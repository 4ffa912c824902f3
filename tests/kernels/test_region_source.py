"""Generated kernels against their regions in fp64: random ones, each op, each way of reading, and planted faults."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxzero.graph import row_ops
from fxzero.kernels import region_ops
from fxzero.lower.inductor import Compiled
from fxzero.lower.row_document import Unsupported, row_document
from fxzero.lower.store import Store
from fxzero.lower.triton import compile_region
from tests.kernels.drawn import drawn
from tests.lower.row_regions import Handmade, check_region
from tests.lower.row_samples import add_sample, num_samples

aten = torch.ops.aten
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = itertools.count()

Function = Callable[[list[Any]], tuple[Any, ...]]


@pytest.fixture(scope="module")
def function_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Function]:
    """The function of a text, made anew each time."""
    folder = tmp_path_factory.mktemp("regions")

    def make(text: str) -> Function:
        store = Store(folder / str(next(NUMBERS)), lowering="triton")
        return store.get(text, lambda: compile_region(text))[0]

    return make


def test_the_tables_of_the_pass_and_of_the_generator_are_one() -> None:
    assert set(region_ops.POINTWISE) == row_ops.POINTWISE
    assert set(region_ops.ROW_OPS) == row_ops.ROW_OPS
    assert region_ops.VIEWS == {*row_ops.REGROUPING, row_ops.EXPAND}


def test_the_tables_name_ops_of_torch() -> None:
    for name in (*row_ops.POINTWISE, *row_ops.ROW_OPS, *row_ops.REGROUPING, row_ops.EXPAND):
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, packet), overload)
        assert row_ops.op_name(op) == name
        alike = ("_to_copy", "full_like", "zeros_like", "ones_like", "masked_fill.Tensor", "leaky_relu_backward")
        if name in row_ops.POINTWISE and torch.Tag.pointwise not in op.tags:
            assert any(one in name for one in alike), f"{name} is not pointwise"


# ---- random regions

UNARY = [aten.neg, aten.abs, aten.sin, aten.cos, aten.tanh, aten.sigmoid, aten.erf, aten.silu, aten.relu, aten.exp]
BINARY = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default]
ROWS = [aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default]
WHOLE = [aten._softmax.default, aten._log_softmax.default]


def bounded(region: Handmade, node: Any) -> Any:
    """The value between -1 and 1, so that nothing grows from op to op."""
    return region.call(aten.sin.default, node)


class Drawn:
    """A random region of one row structure.

    Attributes:
        fulls, rows, columns, scalars: nodes of each part so far.
    """

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.region = Handmade()
        lead = draw(st.sampled_from([(1,), (3,), (2, 5), (7,), (31,), (2, 1, 3)]))
        self.columns_ = draw(st.sampled_from([1, 2, 3, 7, 24, 31, 127, 128, 257, 1021]))
        if lead in ((1,), (3,)) and draw(st.booleans()):
            self.columns_ = draw(st.sampled_from([4093, 8191, 8192]))
        self.lead = lead
        self.shape = (*lead, self.columns_)
        self.fulls = [self.full() for _ in range(draw(st.integers(1, 3)))]
        self.rows = [self.tensor(*lead, 1) for _ in range(draw(st.integers(0, 1)))]
        self.columns = [self.tensor(self.columns_) for _ in range(draw(st.integers(0, 2)))]
        self.scalars = [self.region.input(value) for value in draw(st.lists(st.sampled_from([0.25, 1.5]), max_size=1))]

    def tensor(self, *shape: int, values: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Any:
        dtype = self.draw(st.sampled_from(FLOATS))
        return self.region.input(values(drawn(*shape, dtype=dtype, seed=len(self.region.values))))

    def full(self) -> Any:
        """An input of all rows and columns, contiguous or not."""
        form = self.draw(st.sampled_from(["contiguous", "contiguous", "slice", "transposed", "partial"]))
        if form == "slice":
            wide = (*self.lead, self.columns_ + 5)
            return self.tensor(*wide, values=lambda x: x[..., 3 : 3 + self.columns_])
        if form == "transposed":
            return self.tensor(*reversed(self.shape), values=lambda x: x.permute(*reversed(range(x.dim()))))
        if form == "partial" and len(self.lead) > 1:
            return self.tensor(*self.lead[:-1], 1, self.columns_, values=lambda x: x.expand(self.shape))
        return self.tensor(*self.shape)

    def step(self) -> None:
        """One more call or two."""
        kind = self.draw(
            st.sampled_from(["unary", "binary", "binary", "row", "whole", "select", "cast", "view", "norm"])
        )
        getattr(self, f"_{kind}")()

    def one(self, *lists: list[Any]) -> Any:
        return self.draw(st.sampled_from([node for nodes in lists for node in nodes]))

    def _unary(self) -> None:
        nodes = self.draw(st.sampled_from([n for n in (self.fulls, self.rows, self.columns) if n]))
        op = self.draw(st.sampled_from(UNARY)).default
        x = self.one(nodes)
        x = bounded(self.region, x) if op is aten.exp.default else x
        nodes.append(self.region.call(op, x))

    def _binary(self) -> None:
        op = self.draw(st.sampled_from(BINARY))
        other = self.one(self.fulls, self.rows, self.columns)
        self.fulls.append(bounded(self.region, self.region.call(op, self.one(self.fulls), other)))
        if self.scalars:
            self.fulls.append(self.region.call(aten.mul.Tensor, self.fulls[-1], self.scalars[0]))

    def _row(self) -> None:
        op, keep = self.draw(st.sampled_from(ROWS)), self.draw(st.booleans())
        x = bounded(self.region, self.one(self.fulls))
        dim = self.region.calls[-1].meta["val"].dim() - 1
        out = self.region.call(op, x, [dim], keep)
        if not keep:
            out = self.region.call(aten.unsqueeze.default, out, -1)
        self.rows.append(bounded(self.region, out))

    def _whole(self) -> None:
        x = self.one(self.fulls)
        self.fulls.append(self.region.call(self.draw(st.sampled_from(WHOLE)), x, x.meta["val"].dim() - 1, False))

    def _norm(self) -> None:
        weight = self.one(self.columns) if self.columns else None
        x = self.one(self.fulls)
        weight = None if weight is None or weight.meta["val"].dtype != x.meta["val"].dtype else weight
        out = self.region.call(aten.native_layer_norm.default, x, [self.columns_], weight, None, 1e-3)
        self.fulls.append(self.region.call(operator.getitem, out, 0))
        self.rows.append(self.region.call(operator.getitem, out, 2))

    def _select(self) -> None:
        inputs = [node for node in self.fulls if node in self.region.values]
        if not inputs:  # what is computed may be on the other side of a comparison than its formula
            return
        condition = self.region.call(aten.gt.Scalar, self.one(inputs), 0.25)
        a, b = self.one(self.fulls), self.one(self.fulls, self.rows, self.columns)
        self.fulls.append(self.region.call(aten.where.self, condition, a, b))

    def _cast(self) -> None:
        dtype = self.draw(st.sampled_from(FLOATS))
        self.fulls.append(self.region.call(aten._to_copy.default, self.one(self.fulls), dtype=dtype))

    def _view(self) -> None:
        """All values that are computed from now on have flat rows."""
        x = self.fulls[-1]
        if x in self.region.values or not x.meta["val"].is_contiguous():
            return
        x = self.region.call(aten.view.default, x, [-1, self.columns_])
        self.fulls, self.rows, self.lead = [x], [], tuple(x.meta["val"].shape[:1])
        self.shape = tuple(x.meta["val"].shape)


@st.composite
def regions(draw: Any) -> tuple[Handmade, list[Any], dict[Any, Any]]:
    """A region, what it returns beside what nothing reads, and what it writes over."""
    made = Drawn(draw)
    for _ in range(draw(st.integers(1, 5))):
        made.step()
    made.region.call(aten.neg.default, made.one(made.fulls))
    calls = [n for n in made.region.calls if isinstance(n.meta["val"], torch.Tensor)]
    outputs = draw(st.lists(st.sampled_from(calls), max_size=2, unique=True))
    written = {}
    for source in made.region.values:
        val = source.meta["val"]
        like = [
            node
            for node in calls
            if isinstance(val, torch.Tensor)
            and (val.dtype, val.shape, val.stride())
            == (node.meta["val"].dtype, node.meta["val"].shape, node.meta["val"].stride())
            and not row_ops.is_view(node)
            and source.users
        ]
        if like and draw(st.booleans()) and like[-1] not in written.values():
            written[source] = like[-1]
    aliases = [n for n in outputs if row_ops.is_view(n)]
    return made.region, [n for n in outputs if n not in written.values() and n not in aliases], written


RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@RANDOM
@given(regions())
def test_random_regions(function_of: Callable[[str], Function], drawn_: tuple) -> None:
    region, outputs, written = drawn_
    check_region(region, function_of, *outputs, written=written)


# ---- each op


@pytest.mark.parametrize("name", sorted(row_ops.POINTWISE | row_ops.ROW_OPS))
def test_each_op(name: str, function_of: Callable[[str], Function]) -> None:
    for dtype, index in itertools.product((torch.float32, torch.bfloat16), range(num_samples(name))):
        region = Handmade()
        add_sample(region, name, index, dtype)
        check_region(region, function_of)


# ---- what is read and written, and how


def positions_of(*values: Any) -> Handmade:
    """The sum of tensors that broadcast to each other."""
    region = Handmade()
    total, *rest = [region.input(value) for value in values]
    for node in rest:
        total = region.call(aten.add.Tensor, total, node)
    return region


LAYOUTS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "slices": lambda: [drawn(6, 50)[::2, 3:40], drawn(3, 90)[:, :74:2]],
    "transposed": lambda: [drawn(37, 3).t(), drawn(3, 37)],
    "all transposed": lambda: [drawn(37, 3).t(), drawn(37, 3, seed=1).t()],
    "heads": lambda: [drawn(2, 5, 3, 8).transpose(1, 2), drawn(5, 8), drawn(2, 1, 5, 1)],
    "inner broadcast": lambda: [drawn(4, 1, 6).expand(4, 5, 6), drawn(5, 1)],
    "columns": lambda: [drawn(7, 31), drawn(31), drawn(62)[::2]],
    "rows": lambda: [drawn(7, 31), drawn(7, 1), drawn(14)[::2].unsqueeze(1)],
    "scalars": lambda: [drawn(7, 31), drawn(), drawn(9)[4]],
    "offset": lambda: [drawn(10, 31)[2:9], drawn(40)[9:]],
    "no dimensions": lambda: [drawn(), drawn(seed=1)],
    "one element": lambda: [drawn(1, 1), drawn(1)],
    "square": lambda: [drawn(24, 24), drawn(24), drawn(24, 1)],
    "long": lambda: [drawn(3, 5000), drawn(5000), drawn(3, 1)],
    "many rows": lambda: [drawn(4099, 3), drawn(3), drawn(4099, 1)],
    "one row": lambda: [drawn(1, 8192), drawn(8192)],
    "one column": lambda: [drawn(300, 1), drawn(300, 1, seed=2)],
}


@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, reduces: bool, function_of: Callable[[str], Function]) -> None:
    region = positions_of(*LAYOUTS[name]())
    total = region.calls[-1]
    if reduces and total.meta["val"].dim():
        region.call(aten.mul.Tensor, total, region.call(aten.amax.default, total, [-1], True))
    check_region(region, function_of, total)


def test_views_of_what_comes_in_are_read_with_their_strides(function_of: Callable[[str], Function]) -> None:
    region = Handmade()
    x = region.input(drawn(2, 5, 36))
    split = region.call(aten.split.Tensor, x, 12, -1)
    k, q = (region.call(operator.getitem, split, i) for i in (0, 2))
    heads = region.call(aten.transpose.int, region.call(aten.view.default, q, [2, 5, 3, 4]), 1, 2)
    scaled = region.call(aten.mul.Scalar, heads, 0.25)
    region.call(aten.sum.dim_IntList, scaled, [-1], True)
    check_region(region, function_of, heads, k)


def test_views_of_values_come_out_as_views(function_of: Callable[[str], Function]) -> None:
    region = Handmade()
    x = region.call(aten.exp.default, region.input(drawn(2, 3, 8)))
    flat = region.call(aten._unsafe_view.default, x, [6, 8])
    total = region.call(aten.sum.dim_IntList, flat, [1])
    wide = region.call(aten.expand.default, region.call(aten.unsqueeze.default, total, 1), [6, 8])
    region.call(aten.sub.Tensor, flat, wide)
    check_region(region, function_of, flat, wide)


def test_a_view_of_a_value_shares_its_memory(function_of: Callable[[str], Function]) -> None:
    region = Handmade()
    x = region.call(aten.exp.default, region.input(drawn(2, 8)))
    y = region.call(aten.view.default, x, [16])
    text = region.text(x, y)
    a, b = function_of(text)([drawn(2, 8)])
    assert a.data_ptr() == b.data_ptr()


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (2, 0, 3)])
def test_no_elements(shape: tuple[int, ...], function_of: Callable[[str], Function]) -> None:
    region = Handmade()
    x, y = region.input(drawn(*shape)), region.input(drawn(*shape))
    region.call(aten.mul.Tensor, region.call(aten.add.Tensor, x, y), x)
    check_region(region, function_of)


def test_numbers_of_the_host_are_no_part_of_the_kernel(function_of: Callable[[str], Function]) -> None:
    texts = set()
    for number in (0.25, 1e-8, 3.0):
        region = Handmade()
        x, n, count = region.input(drawn(5, 7)), region.input(number), region.input(3)
        half = region.call(aten.div.Tensor, region.call(aten.add.Tensor, x, n), count)
        region.call(aten.lerp.Scalar, x, half, n)
        region.call(aten.addcmul.default, x, half, half, value=n)
        check_region(region, function_of)
        texts.add(region.text())
    assert len(texts) == 1


def test_what_is_not_a_number_is_seen_by_a_greatest_element(function_of: Callable[[str], Function]) -> None:
    x = drawn(4, 9)
    x[1, 3], x[2, 0], x[3, 8] = float("nan"), float("inf"), float("-inf")
    region = Handmade()
    node = region.input(x)
    for op in (aten.amax.default, aten.amin.default):
        region.call(op, node, [1])
    region.call(aten.clamp.default, node, -1.0, 1.0)
    region.call(aten.relu.default, node)
    region.call(aten.maximum.default, node, region.input(drawn(4, 9, seed=1)))
    check_region(region, function_of)


def test_numbers_that_fp32_hardly_holds(function_of: Callable[[str], Function]) -> None:
    region = Handmade()
    x = region.input(drawn(4, 9))
    region.call(aten.mul.Scalar, x, 1e-40)
    positive = region.call(aten.gt.Scalar, x, 0.0)
    for number in (float("inf"), float("-inf"), float("nan"), -3.4028234663852886e38):
        region.call(aten.masked_fill.Scalar, x, positive, number)
    check_region(region, function_of)


# ---- state


def updated(state: torch.Tensor, *others: torch.Tensor, view: bool = False) -> tuple[Handmade, dict[Any, Any]]:
    """A region that multiplies state by others, reads the old state too, and has the new one in its place."""
    region = Handmade()
    old = region.input(state)
    total = region.call(aten.mul.Scalar, region.call(aten.t.default, old) if view else old, 2.0)
    for other in others:
        total = region.call(aten.add.Tensor, region.input(other), total)
    new = region.call(aten.add.Tensor, old, region.call(aten.mul.Scalar, old, 0.5))
    return region, {old: new}


@pytest.mark.parametrize(
    ("state", "others", "view", "direct"),
    [
        ((9, 31), [(9, 31), (31,)], False, True),
        ((5000,), [(5000,)], False, True),
        ((31,), [(600, 31)], False, False),
        ((600, 1), [(600, 31)], False, False),
        ((), [(60, 310)], False, False),
        ((40, 40), [(40, 40)], True, False),
        ((), [()], False, True),
    ],
)
def test_state_is_written_when_nobody_reads_it_any_more(
    state: tuple, others: list, view: bool, direct: bool, function_of: Callable[[str], Function]
) -> None:
    region, written = updated(drawn(*state), *(drawn(*other, seed=1) for other in others), view=view)
    check_region(region, function_of, written=written)
    (buffer,) = (one for one in row_document(region.text(written=written))["buffers"].values() if one["over"])
    assert buffer["direct"] is direct


# ---- what no kernel over rows can hold


def refused(build: Callable[[Handmade, Any], Any], *shape: int) -> str:
    region = Handmade()
    build(region, region.call(aten.exp.default, region.input(drawn(*shape))))
    with pytest.raises(Unsupported) as caught:
        compile_region(region.text())
    return str(caught.value)


def rows_of_two_lengths(region: Handmade, x: Any) -> None:
    region.call(aten.sum.dim_IntList, x, [1])
    region.call(aten.sum.dim_IntList, region.call(aten.view.default, x, [4, 12]), [1])


def partly_broadcast(region: Handmade, x: Any) -> None:
    wide = region.call(aten.unsqueeze.default, x, 1)
    region.call(aten.add.Tensor, region.input(drawn(8, 3, 6)), wide)


@pytest.mark.parametrize(
    ("build", "got"),
    [
        (lambda r, x: r.call(aten.sum.dim_IntList, x, [0]), r"aten::sum.dim_IntList of [8, 6]"),
        (lambda r, x: r.call(aten.mm.default, x, r.input(drawn(6, 4))), "aten::mm.default of [8, 6], [6, 4]"),
        (lambda r, x: r.call(aten.embedding.default, x, r.input(torch.tensor([1, 2]))), "aten::embedding.default of"),
        (lambda r, x: r.call(aten.t.default, x), "aten::t.default of [8, 6]"),
        (lambda r, x: r.call(aten.slice.Tensor, x, 1, 0, 3), "aten::slice.Tensor of [8, 6]"),
        (lambda r, x: r.call(aten.cat.default, [x, x], 1), "aten::cat.default of [8, 6]"),
        (rows_of_two_lengths, "aten::sum.dim_IntList of [4, 12]"),
        (partly_broadcast, "aten::add.Tensor of [8, 3, 6], [8, 1, 6]"),
        (lambda r, x: r.call(aten._to_copy.default, x, dtype=torch.float64), "aten::_to_copy.default of [8, 6]"),
        (lambda r, x: r.call(aten.pow.Tensor_Tensor, x, x), "aten::pow.Tensor_Tensor of [8, 6]"),
    ],
)  # fmt: skip
def test_what_no_kernel_over_rows_holds_is_refused(build: Callable[[Handmade, Any], Any], got: str) -> None:
    message = refused(build, 8, 6)
    assert message.startswith("a region: expected pointwise ops and reductions of rows")
    assert f"got {got}" in message


def test_a_row_has_an_end() -> None:
    assert "of [2, 65537]" in refused(lambda r, x: r.call(aten.sum.dim_IntList, x, [1]), 2, 2**16 + 1)


# ---- tiles


def test_tiles_are_tried_on_a_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region, written = updated(drawn(9, 31), drawn(9, 31))
    source = compile_region(region.text(written=written), autotune=True).source
    assert "TILES = region_tiles.Tiles([(1, 512, 4)" in source
    monkeypatch.setattr("fxzero.kernels.region_tiles._milliseconds", None)

    def tuned(text: str) -> Function:
        return Store(tmp_path, lowering="triton").get(text, lambda: compile_region(text, autotune=True))[0]

    check_region(region, tuned, written=written)


# ---- planted faults


def norm() -> tuple[Handmade, dict[Any, Any]]:
    """A norm of rows with a weight, whose mean of squares is state, in bf16."""
    region = Handmade()
    x, w = region.input(drawn(40, 24, dtype=torch.bfloat16)), region.input(drawn(24, dtype=torch.bfloat16, seed=1))
    state = region.input(drawn(40, 1, seed=2))
    wide = region.call(aten._to_copy.default, x, dtype=torch.float32)
    mean = region.call(aten.mean.dim, region.call(aten.pow.Tensor_Scalar, wide, 2), [1], True)
    y = region.call(aten.mul.Tensor, wide, region.call(aten.rsqrt.default, region.call(aten.add.Scalar, mean, 1e-5)))
    region.call(aten.mul.Tensor, region.call(aten.mul.Tensor, y, w), region.call(aten.exp.default, x))
    total = region.call(aten.sum.dim_IntList, region.call(aten.exp.default, x), [1], True)
    new = region.call(aten.lerp.Scalar, state, mean, 0.25)
    region.call(aten.add.Tensor, state, total)
    return region, {state: new}


STORE = "tl.store(i2_ptr + row, c11, mask=exists)"


def swapped(old: str, new: str) -> Callable[[str], str]:
    def edit(source: str) -> str:
        assert old in source, f"{old!r} is not in {source}"
        return source.replace(old, new)

    return edit


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "edit",
    [
        swapped("row < 40", "row < 39"),
        swapped("column < 24", "column < 23"),
        swapped(", present)  # sum", ", column >= 0)  # sum"),
        swapped("/ 24", "/ COLUMNS"),
        swapped("i1_ptr + column", "i1_ptr + 0 * column"),
        swapped("row * 24", "row * 23"),
        swapped(".to(tl.float32)", ""),
        swapped("    c12 = i2", f"    {STORE}\n    i2 = tl.load(i2_ptr + row, mask=exists, other=0)\n    c12 = i2"),
    ],
)
def test_a_wrong_kernel_is_found(edit: Callable[[str], str], tmp_path: Path) -> None:
    region, written = norm()

    def function_of(text: str) -> Function:
        compiled = compile_region(text)
        return Store(tmp_path, lowering="triton").get(text, lambda: Compiled(edit(compiled.source), ()))[0]

    import triton

    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError), match=r"differ|bf16"):
        check_region(region, function_of, written=written)


def test_the_text_of_a_kernel(golden: Any) -> None:
    region, written = norm()
    golden("kernels/region", compile_region(region.text(written=written)).source)
