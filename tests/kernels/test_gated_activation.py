"""Gated activations and their gradients against the formulas in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.kernels import gated_activation as module
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import COLUMNS, DTYPES, FEW, drawn

ROUNDINGS = 16  # of the longest chain, where exp counts for four


def magnitudes(a, form):
    """What roundings of f(a) and f'(a) scale with: exp's argument z is rounded, which moves exp(z) by |z| eps."""
    if form == "gelu_erf":  # 1 + erf cancels where a is far below zero
        return a.abs(), 1 + a.abs() * (1 + a.square()) * torch.exp(-a.square() / 2)
    z = a if form == "silu" else 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
    share, rest = torch.sigmoid(z), torch.sigmoid(-z)
    inner = 1.0 if form == "silu" else 1.6 * (1 + 0.14 * a.square())
    moved = share * (1 + z.abs() * rest) + 1e-30  # exp overflows in fp32: shares below 2^-127 become zero
    return a.abs() * moved, moved + a.abs() * share * rest * inner * (1 + z.abs())


def check(a, b, dy, form, *, ops=module):
    """Forward and backward of these tensors are near the formula."""
    y = ops.gated_activation(a, b, form)
    da, db = ops.gated_activation_backward(dy, a, b, form)
    wide = [t.double() for t in (dy, a, b)]
    want_da, want_db = module.gated_activation_backward_reference(*wide, form)
    value, slope = magnitudes(wide[1], form)
    want = module.gated_activation_reference(wide[1], wide[2], form)
    assert_close(y, want, roundings=ROUNDINGS, magnitude=value * wide[2].abs(), name="y")
    assert_close(da, want_da, roundings=ROUNDINGS, magnitude=slope * (wide[0] * wide[2]).abs(), name="da")
    assert_close(db, want_db, roundings=ROUNDINGS, magnitude=value * wide[0].abs(), name="db")
    assert (y.dtype, da.dtype, db.dtype) == (a.dtype, a.dtype, b.dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # 1 / (1 + inf) is what is wanted
@FEW
@given(COLUMNS, st.integers(1, 3), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(module.FORMS))
def test_any_width_and_dtype(device, columns, rows, dtype, other, form):
    a, b, dy = (drawn(rows, columns, dtype=dtype, device=device, seed=seed) for seed in range(3))
    check(3 * a, b.to(other), dy, form)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("form", module.FORMS)
def test_values_far_from_zero(device, form):
    a = torch.linspace(-30, 30, 1001, device=device).expand(2, -1).contiguous()
    check(a, drawn(2, 1001, device=device), drawn(2, 1001, device=device, seed=1), form)


@pytest.mark.parametrize("form", module.FORMS)
def test_the_reference_is_torchs_activation_and_has_the_gradients_of_its_own_forward(form):
    a, b, dy = (drawn(7, 11, dtype=torch.float64, seed=seed) for seed in range(3))
    a, b = (3 * a).requires_grad_(), b.requires_grad_()
    want = torch.autograd.grad(module.gated_activation_reference(a, b, form), (a, b), dy)
    plain = F.silu(a) if form == "silu" else F.gelu(a, approximate="none" if form == "gelu_erf" else "tanh")
    assert torch.allclose(module.gated_activation_reference(a, b, form), plain * b, rtol=1e-12, atol=1e-14)
    got = module.gated_activation_backward_reference(dy, a.detach(), b.detach(), form)
    assert all(torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14) for mine, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 4, 5), (67, 48), (4099, 1), (3, 2051)])
def test_leading_shapes_and_many_tiles(device, shape):
    check(*(drawn(*shape, device=device, seed=seed) for seed in range(3)), "silu")


def test_halves_of_one_tensor_are_read_in_place_and_others_copied(device):
    both = drawn(3, 4, 2 * 20, device=device)
    dy = drawn(3, 4, 20, device=device, seed=1)
    assert module.launch.rows_of(both[..., 20:]).data_ptr() == both[..., 20:].data_ptr()
    check(*both.chunk(2, dim=-1), dy, "gelu_tanh")
    check(*both.chunk(2, dim=-1), torch.ones((), device=device).expand(3, 4, 20), "silu")
    check(*both.transpose(0, 1).chunk(2, dim=-1), dy.transpose(0, 1), "silu")
    check(both[..., ::2], both[..., 1::2], dy, "gelu_erf")


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0,)])
def test_nothing(device, shape):
    x = drawn(*shape, device=device)
    results = (module.gated_activation(x, x, "silu"), *module.gated_activation_backward(x, x, x, "silu"))
    assert all(result.shape == shape for result in results)


@pytest.mark.parametrize(
    ("a", "b", "form", "named"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "silu", r"b of shape \[2, 3\], got b = float32 \[2, 4\] with strides \[4"),
        (torch.ones(()), torch.ones(()), "silu", r"got a = float32 \[\]"),
        (torch.ones(2), torch.ones(2).double(), "silu", r"got b = float64 \[2\]"),
        (torch.ones(2), torch.ones(2), "relu", "a form of .*, got 'relu'"),
    ],
)
def test_what_no_kernel_takes_is_refused(a, b, form, named):
    with pytest.raises(ValueError, match=f"fxzero_kernels::gated_activation: expected .*{named}.*"):
        module.gated_activation(a, b, form)


@pytest.mark.parametrize(
    ("old", "new", "form"),
    [
        ("slope = share * sigmoid(-a)", "slope = share", "silu"),
        ("share = sigmoid(a)", "share = sigmoid(1.0001 * a)", "silu"),
        ("share = sigmoid(1.5957691216057308 * (a + 0.044715", "share = sigmoid(1.59577 * (a + 0.0447", "gelu_tanh"),
        ("(1.0 + 0.134145 * a * a)", "(1.0 + 0.044715 * a * a)", "gelu_tanh"),
        ("0.3989422804014327 * tl.exp(", "tl.exp(", "gelu_erf"),
        ("gate_grad = grad * value * (", "gate_grad = grad * (", "gelu_erf"),
        ("result = gate * share_of(gate, FORM) * value", "result = gate * share_of(gate, FORM)", "gelu_erf"),
        ("launch.ceil_div(columns, width)", "(columns // width)", "silu"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_found(device, mutant, old, new, form):
    wrong = mutant("gated_activation", old, new)
    with pytest.raises(AssertionError, match="differ"):
        check(*(drawn(9, 1500, device=device, seed=seed) for seed in range(3)), form, ops=wrong)


def test_the_ops_can_be_traced_and_differentiated(device):
    a, b, dy = (drawn(3, 5, device=device, seed=seed) for seed in range(3))
    arguments = (a.clone().requires_grad_(), b.clone().requires_grad_(), "gelu_tanh")
    torch.library.opcheck(module.gated_activation, arguments)
    torch.library.opcheck(module.gated_activation_backward, (dy, a, b.bfloat16(), "silu"))
    graph = make_fx(lambda *t: module.gated_activation(*t, "silu"), tracing_mode="fake")(a, b).graph
    assert next(n.target for n in graph.nodes if n.op == "call_function") is module.gated_activation
    got = torch.autograd.grad(module.gated_activation(*arguments), arguments[:2], dy)
    want = module.gated_activation_backward(dy, a, b, "gelu_tanh")
    assert all(map(torch.equal, got, want))


def test_without_the_interpreter_an_op_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.launch, "jit", None)
    a, b, dy = (drawn(3, 5, seed=seed) for seed in range(3))
    for form in module.FORMS:
        assert torch.equal(module.gated_activation(a, b, form), module.gated_activation_reference(a, b, form))
        got = module.gated_activation_backward(dy, a, b, form)
        assert all(map(torch.equal, got, module.gated_activation_backward_reference(dy, a, b, form)))
