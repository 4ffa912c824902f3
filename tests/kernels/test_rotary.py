"""Rotary embedding and its gradient against the formula in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.kernels import rotary as module
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import DTYPES, FEW, drawn

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 70))


def table(x, *, seed, batched=False, dtype=torch.float32):
    shape = (x.shape[0], *x.shape[2:]) if batched else x.shape[2:]
    return drawn(*shape, dtype=dtype, device=x.device, seed=seed)


def check(x, cos, sin, dy, interleaved, *, ops=module):
    """Forward and backward of these tensors are near the formula."""
    wide = [t.double() for t in (x, cos, sin, dy)]
    y = ops.rotary(x, cos, sin, interleaved)
    want = module.rotary_reference(*wide[:3], interleaved)
    size = module.rotary_reference(wide[0].abs(), wide[1].abs(), torch.zeros_like(wide[2]), interleaved)
    other = module.rotary_reference(wide[0].abs(), torch.zeros_like(wide[1]), wide[2].abs(), interleaved).abs()
    assert_close(y, want, roundings=3, magnitude=size + other, name="y")
    dx = ops.rotary_backward(dy, cos, sin, interleaved)
    want = module.rotary_backward_reference(wide[3], wide[1], wide[2], interleaved)
    size = module.rotary_backward_reference(wide[3].abs(), wide[1].abs(), torch.zeros_like(wide[2]), interleaved)
    other = module.rotary_backward_reference(wide[3].abs(), torch.zeros_like(wide[1]), wide[2].abs(), interleaved).abs()
    assert_close(dx, want, roundings=3, magnitude=size + other, name="dx")
    assert (y.dtype, dx.dtype) == (x.dtype, dy.dtype)


@FEW
@given(SIZES, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_any_size_and_dtype(device, sizes, dtype, table_dtype, batched, interleaved):
    x, dy = (drawn(*sizes[:3], 2 * sizes[3], dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    cos, sin = (table(x, seed=seed, batched=batched, dtype=table_dtype) for seed in (2, 3))
    check(x, cos, sin, dy, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_are_read_in_place_and_kept(device, interleaved):
    x = drawn(2, 5, 3, 16, device=device).transpose(1, 2)  # [B, S, H, D], as a projection leaves it
    cos, sin = (table(x, seed=seed) for seed in (1, 2))
    assert module.rotary(x, cos, sin, interleaved).stride() == x.stride()
    check(x, cos, sin, x * 2, interleaved)
    part = drawn(2, 5, 9, 48, device=device)[:, :, 3:6, 16:32].transpose(1, 2)
    check(part, cos, sin, part[:, :1].expand(-1, 3, -1, -1), interleaved)
    across = drawn(2, 3, 16, 5, device=device).transpose(2, 3)
    check(across, cos, sin, torch.ones((), device=device).expand(2, 3, 5, 16), interleaved)
    wide = drawn(3, 2, 5, 32, device=device)
    check(x, wide[0, :, :, ::2], wide[1, :, :, 16:], x, interleaved)
    check(x, cos.expand(2, -1, -1), drawn(16, 5, device=device).t(), x, interleaved)


def test_rotate_half_is_that_of_llama(device):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = drawn(2, 7, 3, 32, device=device).transpose(1, 2)
    angles = torch.outer(torch.arange(7.0), 10000.0 ** -(torch.arange(16) / 16)).repeat(1, 2).to(device)
    cos, sin = (f(angles).expand(2, -1, -1) for f in (torch.cos, torch.sin))
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.allclose(module.rotary(x, cos, sin, False), want, rtol=1e-6, atol=1e-6)
    back = module.rotary_backward(module.rotary(x, cos, sin, False), cos, sin, False)
    assert torch.allclose(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_has_the_gradient_of_its_own_forward(interleaved):
    x = drawn(2, 3, 5, 8, dtype=torch.float64).requires_grad_()
    cos, sin = (table(x, seed=seed, batched=True, dtype=torch.float64) for seed in (1, 2))
    dy = drawn(2, 3, 5, 8, dtype=torch.float64, seed=3)
    (want,) = torch.autograd.grad(module.rotary_reference(x * 1.0, cos, sin, interleaved), x, dy)
    assert torch.allclose(module.rotary_backward_reference(dy, cos, sin, interleaved), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing(device, shape):
    x = drawn(*shape, device=device)
    cos = table(x, seed=1)
    assert module.rotary(x, cos, cos, True).shape == module.rotary_backward(x, cos, cos, False).shape == shape


@pytest.mark.parametrize(
    ("x", "cos", "named"),
    [
        (torch.ones(2, 3, 4), torch.ones(3, 4), r"got x = float32 \[2, 3, 4\] with strides \[12, 4, 1\]"),
        (torch.ones(1, 2, 3, 5), torch.ones(3, 5), r"got x = float32 \[1, 2, 3, 5\]"),
        (torch.ones(1, 2, 3, 4), torch.ones(3, 2), r"cos of shape \[3, 4\], got cos = float32 \[3, 2\]"),
        (torch.ones(2, 2, 3, 4), torch.ones(1, 3, 4), r"cos of shape \[2, 3, 4\], got cos = float32 \[1, 3, 4\]"),
        (torch.ones(2, 2, 3, 4), torch.ones(3, 4).double(), r"got cos = float64 \[3, 4\]"),
    ],
)
def test_what_no_kernel_takes_is_refused(x, cos, named):
    with pytest.raises(ValueError, match=f"fxzero_kernels::rotary: expected .*{named}.*"):
        module.rotary(x, cos, cos, False)


# No mutant reaches outside of the tensors: that would end the process.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("u_result = u * u_cos - v * u_sin", "u_result = u * u_cos + v * u_sin"),
        ("v_result = v * v_cos + u * v_sin", "v_result = v * v_cos + u * u_sin"),
        ("u_result = u * u_cos + v * v_sin", "u_result = u * u_cos + v * u_sin"),
        ("one = (2 * pair)", "one = pair"),
        ("two = one + half", "two = one + 1"),
        ("sequence // heads, sequence % heads", "sequence // heads, sequence // heads"),
        ("x += batch * x_batch + head * x_head", "x += (batch * heads + head) * positions * 2 * half"),
        ("table.stride(0) if table.dim() == 3 else 0", "0"),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("rotary", old, new)
    x = drawn(2, 5, 3, 16, device=device).transpose(1, 2)
    cos, sin = (table(x, seed=seed, batched=True) for seed in (1, 2))
    with pytest.raises(AssertionError, match="differ"):
        for interleaved in (False, True):
            check(x, cos, sin, x, interleaved, ops=wrong)


def test_the_ops_can_be_traced_and_differentiated(device):
    x = drawn(2, 5, 3, 4, device=device, dtype=torch.bfloat16).transpose(1, 2)
    cos, sin = (table(x, seed=seed) for seed in (1, 2))
    torch.library.opcheck(module.rotary, (x.detach().requires_grad_(), cos, sin, False))
    torch.library.opcheck(module.rotary, (x[:, :, ::2], cos[::2], sin[::2], True))
    torch.library.opcheck(module.rotary_backward, (x, cos, sin, True))
    graph = make_fx(lambda *t: module.rotary(*t, False), tracing_mode="fake")(x, cos, sin).graph
    assert next(n.target for n in graph.nodes if n.op == "call_function") is module.rotary
    x.requires_grad_()
    (got,) = torch.autograd.grad(module.rotary(x, cos, sin, True), x, x.detach())
    assert torch.equal(got, module.rotary_backward(x.detach(), cos, sin, True))
    with pytest.raises(NotImplementedError, match="expected cos and sin without gradient"):
        module.rotary(x, cos.requires_grad_(), sin, True).sum().backward()


def test_without_the_interpreter_an_op_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.launch, "jit", None)
    x = drawn(2, 3, 5, 8)
    cos, sin = (table(x, seed=seed) for seed in (1, 2))
    for arguments in ((x, cos, sin, False), (x, cos, sin, True)):
        assert torch.equal(module.rotary(*arguments), module.rotary_reference(*arguments))
        assert torch.equal(module.rotary_backward(*arguments), module.rotary_backward_reference(*arguments))
