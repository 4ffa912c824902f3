"""Buckets of tensors, packed with a cast and unpacked again, against torch's cat and copies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.kernels import bucket_copy as module
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import DTYPES, FEW, drawn

SIZES = st.lists(st.integers(0, 70) | st.sampled_from([2047, 2048, 2049, 5003]), min_size=1, max_size=5)


def check(tensors, dtype, *, ops=module):
    """The buffer holds the tensors, and they are had back; a cast may round, and cuts bf16 off in the interpreter."""
    flat = ops.bucket_pack(tensors, dtype)
    assert flat.dtype is dtype
    assert_close(flat, torch.cat([x.flatten() for x in tensors]).double(), roundings=0, name="flat")
    back = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in tensors]
    ops.bucket_unpack_(flat, back)
    for i, (x, part) in enumerate(zip(back, flat.split([x.numel() for x in tensors]), strict=True)):
        assert_close(x.flatten(), part.double(), roundings=0, name=f"tensors[{i}]")


@FEW
@given(SIZES, st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_any_sizes_and_dtypes(device, sizes, dtype, flat_dtype):
    check([drawn(n, dtype=dtype, device=device, seed=i) for i, n in enumerate(sizes)], flat_dtype)


def test_shapes_and_strides(device):
    tensors = [
        drawn(3, 5, device=device),
        drawn(7, 4, device=device).t(),
        drawn(device=device),
        drawn(2, 0, device=device),
    ]
    check(tensors, torch.float16)
    assert torch.equal(module.bucket_pack(tensors, torch.float32), torch.cat([x.flatten() for x in tensors]))
    assert module.bucket_pack([drawn(0, device=device)], torch.float32).shape == (0,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("source_at, target_at, everywhere(BLOCK)", "source_at, target_at, offset < 0"),
        ("source_at, target_at, offset < size", "source_at, target_at, offset < size - 1"),
        ("value.to(target_at", "(value * 1.01).to(target_at"),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("bucket_copy", old, new)
    with pytest.raises(AssertionError, match="differ"):
        check([drawn(5003, device=device), drawn(70, device=device)], torch.bfloat16, ops=wrong)


def test_what_no_kernel_takes_is_refused():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"bucket_pack: expected at least one tensor, got none"):
        module._fake_pack([], torch.float32)
    with pytest.raises(ValueError, match=r"expected one dtype, .*, got tensors\[1\] = float16 \[2, 3\]"):
        module.bucket_pack([ones, ones.half()], torch.float32)
    with pytest.raises(ValueError, match=r"got tensors\[0\] = int32 \[2, 3\]"):
        module.bucket_pack([ones.int()], torch.float32)
    with pytest.raises(ValueError, match="a buffer in float32, bfloat16 or float16, got int32"):
        module.bucket_pack([ones], torch.int32)
    with pytest.raises(ValueError, match=r"flat of shape \[6\], got flat = float32 \[7\]"):
        module.bucket_unpack_(torch.ones(7), [ones])
    with pytest.raises(ValueError, match=r"contiguous tensors, got tensors\[0\] = float32 \[3, 2\]"):
        module.bucket_unpack_(torch.ones(6), [ones.t()])


def test_the_ops_can_be_traced_and_are_the_reference_without_the_interpreter(device, monkeypatch):
    tensors = [drawn(3, 5, device=device), drawn(4, device=device)]
    flat = module.bucket_pack(tensors, torch.bfloat16)
    torch.library.opcheck(module.bucket_pack, (tensors, torch.bfloat16))
    torch.library.opcheck(module.bucket_unpack_, (flat, tensors))
    graph = make_fx(lambda x: module.bucket_pack(x, torch.bfloat16), tracing_mode="fake")(tensors).graph
    assert module.bucket_pack in [n.target for n in graph.nodes]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.launch, "jit", None)
    check([drawn(3, 5), drawn(4), drawn(7, 4).t()], torch.bfloat16)
