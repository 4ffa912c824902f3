"""Quantized messages, bit for bit those of the compression ops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.graph import compression_ops as plain
from fxzero.kernels import quantize_blocks as module
from tests.kernels.drawn import DTYPES, FEW, drawn

INF, NAN = float("inf"), float("nan")
BLOCKS = st.integers(1, 70) | st.sampled_from([256, 1021, 4096])


def same(a, b):
    """Whether two tensors are equal bit by bit, NaN being NaN whatever its bits."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def check(x, form, block, parts, *, ops=module):
    """Message, parts and both reductions of `x` are those of the compression ops.

    Of these ops on the CPU: on a GPU torch divides by a number (127, the number of parts) by multiplying with its
    reciprocal, which may differ in the last bit.
    """
    packed = ops.quantize_blockwise(x, form, block, parts)
    whole = packed.cpu()
    assert torch.equal(whole, plain.quantize_blockwise(x.cpu(), form, block, parts)), "the message differs"
    # bf16 is cut off in the interpreter: see tests/kernels/closeness.py
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if x.is_cuda else [])):
        rest = (list(x.shape), form, block, parts)
        got = ops.dequantize_blockwise(packed, *rest, dtype)
        assert same(got.cpu(), plain.dequantize_blockwise(whole, *rest, dtype)), "what is read differs"
        for op in ("sum", "avg"):
            rest = ([x.shape[0] // parts, *x.shape[1:]], form, block, parts, op, dtype)
            got = ops.dequantize_reduce(packed, *rest)
            assert same(got.cpu(), plain.dequantize_reduce(whole, *rest)), f"{op} differs"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to fp16, by numpy
@FEW
@given(
    st.sampled_from(module.FORMS), BLOCKS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 400),
    st.sampled_from(DTYPES), st.integers(-30, 30),
)  # fmt: skip
def test_any_shape_and_block(device, form, block, parts, rows, columns, dtype, exponent):
    check((drawn(parts * rows, columns, device=device) * 2.0**exponent).to(dtype), form, block, parts)


@pytest.mark.parametrize("form", module.FORMS)
def test_halves_go_to_even_and_every_code_is_reached(device, form):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    values = codes.view(torch.float8_e4m3fn if form == "fp8" else torch.int8).float()
    values = values[values.isfinite() & (values != -128)].sort().values
    halves = (values[1:] + values[:-1]) / 2
    greatest = values.max().reshape(1)
    near = torch.cat([halves.nextafter(halves + way) for way in (-1.0, 0.0, 1.0)])
    x = torch.cat((values, near, greatest * 0.99999, -values * 2.0**-7, values * 0.0, -values * 0.0))
    check(torch.cat((greatest, x)), form, len(x) + 1, 1)  # one block whose scale is 1


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # to fp16, by numpy
@pytest.mark.parametrize("form", module.FORMS)
def test_what_is_not_finite_is_read_as_nan_and_touches_no_neighbour(device, form):
    x = torch.tensor([[1.0, INF, -2.0, NAN, 5.0], [-INF, NAN, INF, NAN, NAN]], device=device)
    check(x, form, 5, 2)
    check(x, form, 2, 1)
    smallest = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-126, 1e-40, 0.0], device=device)
    check(smallest, form, 4, 1)
    check(torch.tensor([3.4e38, -3.4e38, 1.0, 1e-30], device=device), form, 4, 2)


def test_messages_that_are_not_aligned_and_inputs_that_are_not_contiguous(device):
    check(drawn(6, 7, device=device), "int8", 4, 3)  # a part has 14 + 16 bytes
    check(drawn(7, 6, device=device).t(), "fp8", 5, 2)


def check_nothing(x, form):
    packed = module.quantize_blockwise(x, form, 4, 2)
    assert (packed.shape, packed.dtype) == ((0,), torch.uint8)
    assert module.dequantize_blockwise(packed, [0, 7], form, 4, 2, torch.float32).shape == (0, 7)
    assert module.dequantize_reduce(packed, [0, 7], form, 4, 2, "avg", torch.float32).shape == (0, 7)


def test_nothing(device):
    check_nothing(drawn(0, 7, device=device), "int8")


def test_long_blocks_and_fp64_are_left_to_the_reference(device):
    x = drawn(2, 2**16 + 3, device=device)
    check(x, "int8", 2**16 + 3, 2)
    check(drawn(2, 9, device=device).double(), "fp8", 4, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ ((size >> 20) & 1)", ""),
        ("size < 0x3C800000", "size < 0"),
        ("(code - ((code & 128) << 1))", "code"),
        ("tl.where(finite, e4m3_of(scaled), 127)", "e4m3_of(scaled)"),
        ("tl.where(size < 8, ", "tl.where(size < 0, "),
        ("scaled + 12582912.0) - 12582912.0", "scaled + 0.5) - 0.5"),
        ("bits >> (8 * byte)", "bits >> byte"),
        ("base = tl.cast(part, tl.int64) *", "base = tl.cast(0, tl.int64) *"),
        ("if MEAN:", "if not MEAN:"),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("quantize_blocks", old, new)
    x = torch.cat((torch.arange(-448.0, 449.0, 0.5, device=device), torch.tensor([NAN, 0.01, 0.02], device=device)))
    with pytest.raises(AssertionError, match="differ"):
        for form in module.FORMS:
            check(x, form, 449, 3, ops=wrong)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(3, 2), "int8", 4, 2), r"parts that divide dim 0, got 'int8', block 4, 2 parts of \[3, 2\]"),
        ((torch.ones(3, 2), "int4", 4, 1), "got 'int4'"),
        ((torch.ones(3, 2), "fp8", 0, 1), "block 0"),
    ],
)
def test_what_cannot_be_packed_is_refused(arguments, named):
    with pytest.raises(ValueError, match=f"fxzero_kernels::quantize_blockwise: expected .*{named}"):
        module.quantize_blockwise(*arguments)


def test_other_bytes_than_those_of_the_message_are_refused():
    packed = module.quantize_blockwise(torch.ones(4, 2), "int8", 4, 2)
    with pytest.raises(ValueError, match=r"expected 16 packed bytes, got packed = uint8 \[15\]"):
        module.dequantize_blockwise(packed[:-1], [4, 2], "int8", 4, 2, torch.float32)
    with pytest.raises(ValueError, match="expected 'sum' or 'avg', got 'max'"):
        module.dequantize_reduce(packed, [2, 2], "int8", 4, 2, "max", torch.float32)


def test_the_ops_can_be_checked_and_are_the_reference_without_the_interpreter(device, monkeypatch):
    x = drawn(4, 5, device=device)
    packed = module.quantize_blockwise(x, "int8", 4, 2)
    torch.library.opcheck(module.quantize_blockwise, (x, "int8", 4, 2))
    torch.library.opcheck(module.dequantize_blockwise, (packed, [4, 5], "int8", 4, 2, torch.bfloat16))
    torch.library.opcheck(module.dequantize_reduce, (packed, [2, 5], "int8", 4, 2, "avg", torch.float32))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.launch, "jit", None)
    for form in module.FORMS:
        check(torch.cat((drawn(6, 7), torch.tensor([[NAN, INF, -0.0, 0.0, 1.0, 2.0, 3.0]] * 2))), form, 4, 2)
        check_nothing(drawn(0, 7), form)
