"""Packed messages: what is read again is within the bound that [Note: packed blocks] states, whatever was packed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxzero import compat
from fxzero.graph import compression_ops
from fxzero.graph.compression_ops import (
    FORMS,
    dequantize_blockwise,
    dequantize_reduce,
    packed_bytes,
    quantize_blockwise,
    wire_ratio,
)
from fxzero.graph.edit import describe

quick = settings(deadline=None, max_examples=60)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, str, int, int]:
    """(x, form, block, parts): blocks that do and do not divide, tiny and large values, whole blocks of zeros."""
    parts, rows = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    columns = draw(st.lists(st.integers(1, 9), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn((parts * rows, *columns), generator=generator) * 10.0 ** draw(st.integers(-6, 4))
    x *= torch.rand(x.shape, generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    x *= 10.0 ** torch.randint(-3, 1, x.shape, generator=generator)
    return x.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(FORMS)), draw(st.integers(1, 40)), parts


def bound(x: torch.Tensor, form: str, block: int, parts: int) -> torch.Tensor:
    """The most by which each element may differ."""
    out = []
    for part in x.double().reshape(parts, -1):
        for values in part.split(block):
            largest = values.abs().max()
            half_step = largest / 254 if form == "int8" else torch.maximum(values.abs() / 16, largest / 458752)
            out.append(half_step.expand_as(values))
    return torch.cat(out).view(x.shape)


def there_and_back(x: torch.Tensor, form: str, block: int, parts: int, dtype: torch.dtype) -> torch.Tensor:
    packed = quantize_blockwise(x, form, block, parts)
    assert packed.dtype is torch.uint8
    assert packed.numel() == parts * packed_bytes(x.numel() // parts, block)
    return dequantize_blockwise(packed, list(x.shape), form, block, parts, dtype)


@given(tensors())
@quick
def test_what_is_read_again_is_within_the_stated_bound(case) -> None:
    x, form, block, parts = case
    got = there_and_back(x, form, block, parts, torch.float64)
    # beside the rounding to the form: of the scale to fp32 and of the product; scales stop at 2**-126
    slack = 1e-6 * x.double().abs().max() + 2.0**-126
    assert bool(((got - x.double()).abs() <= bound(x, form, block, parts) + slack).all())


@given(tensors(), st.sampled_from(["sum", "avg"]))
@quick
def test_the_reduction_is_that_of_the_parts_as_they_are_read(case, op) -> None:
    x, form, block, parts = case
    packed = quantize_blockwise(x, form, block, parts)
    rows = [x.shape[0] // parts, *x.shape[1:]]
    got = dequantize_reduce(packed, rows, form, block, parts, op, torch.float32)
    read = dequantize_blockwise(packed, list(x.shape), form, block, parts, torch.float32).view(parts, *rows)
    total = torch.zeros(rows)
    for part in read:
        total += part
    assert torch.equal(got, total / parts if op == "avg" else total)


@given(tensors())
@quick
def test_fake_values_are_those_of_the_op(case) -> None:
    x, form, block, parts = case
    rows = [x.shape[0] // parts, *x.shape[1:]]
    mode = compat.new_fake_mode()
    with mode:
        fake = compat.fake_like(mode, x)
        fakes = [quantize_blockwise(fake, form, block, parts)]
        fakes.append(dequantize_blockwise(fakes[0], list(x.shape), form, block, parts, x.dtype))
        fakes.append(dequantize_reduce(fakes[0], rows, form, block, parts, "avg", x.dtype))
    real = [quantize_blockwise(x, form, block, parts)]
    real.append(dequantize_blockwise(real[0], list(x.shape), form, block, parts, x.dtype))
    real.append(dequantize_reduce(real[0], rows, form, block, parts, "avg", x.dtype))
    assert describe(fakes) == describe(real)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_arrives_as_nan_and_harms_no_neighbour(form: str) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[0, 3], broken[1, 5], broken[2, 7] = math.nan, math.inf, -math.inf
    x[0, 3] = x[1, 5] = x[2, 7] = 0  # what the scales of their blocks come from otherwise
    got = there_and_back(broken, form, 32, 2, torch.float32)
    assert got.isnan().nonzero().tolist() == [[0, 3], [1, 5], [2, 7]]
    assert torch.equal(got.nan_to_num(0), there_and_back(x, form, 32, 2, torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_tiles_do_not_show(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    whole = [quantize_blockwise(x, form, 16, parts) for parts in (1, 3)]
    read = there_and_back(x, form, 16, 3, torch.float32)
    monkeypatch.setattr(compression_ops, "_TILE", 40)
    for parts, expected in zip((1, 3), whole, strict=True):
        assert torch.equal(quantize_blockwise(x, form, 16, parts), expected)
    assert torch.equal(there_and_back(x, form, 16, 3, torch.float32), read)


@pytest.mark.parametrize(("form", "stated"), [("int8", 0.0070), ("fp8", 0.0261)])
def test_the_error_of_normal_values_is_the_stated_one(form: str, stated: float) -> None:
    """docs/plan.md states it, for blocks of 256 and (fp8) for rows."""
    x = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    for block in (256, 768) if form == "fp8" else (256,):
        error = (there_and_back(x, form, block, 1, torch.float32) - x).norm() / x.norm()
        assert error == pytest.approx(stated, rel=0.03)


def test_the_wire_ratio_is_the_stated_one() -> None:
    assert wire_ratio(2**20, 256, 4) == (1 + 4 / 256) / 4 == 0.25390625
    assert wire_ratio(2**20, 256, 2) == 0.5078125


def test_a_message_of_another_length_is_refused_by_the_fake_op() -> None:
    mode = compat.new_fake_mode()
    with mode:
        packed = torch.empty(100, dtype=torch.uint8)
        with pytest.raises(ValueError, match="expected 18 packed bytes"):
            dequantize_blockwise(packed, [2, 5], "int8", 8, 2, torch.float32)
        with pytest.raises(ValueError, match="got 'int4', block 8, 3 parts of \\[2, 5\\]"):
            quantize_blockwise(torch.empty(2, 5), "int4", 8, 3)
