"""RMS norm and its gradients against the formula in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.kernels import rms_norm as module
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import COLUMNS, DTYPES, FEW, drawn

EPS = 1e-5


def check(x, weight, dy, *, ops=module):
    """Forward and backward of these tensors are near the formula."""
    y, rstd = ops.rms_norm(x, weight, EPS)
    dx, dweight = ops.rms_norm_backward(dy, x, weight, rstd)
    wide = [None if t is None else t.double() for t in (x, weight, dy)]
    want_y, want_rstd = module.rms_norm_reference(wide[0], wide[1], EPS)
    want_dx, want_dweight = module.rms_norm_backward_reference(wide[2], wide[0], wide[1], want_rstd)
    columns, rows = x.shape[-1], math.prod(x.shape[:-1])
    roundings = 10 + math.log2(columns) + columns / 64  # numpy and Triton sum in parallel, sixty-four columns at a time
    assert_close(rstd, want_rstd, roundings=roundings, name="rstd")
    assert_close(y, want_y, roundings=roundings, name="y")
    inverse = want_rstd.unsqueeze(-1)
    scaled = (wide[2] if weight is None else wide[2] * wide[1]).abs()
    normal = (wide[0] * inverse).abs()
    size = inverse * (scaled + normal * (scaled * normal).mean(-1, keepdim=True))
    assert_close(dx, want_dx, roundings=3 * roundings, magnitude=size, name="dx")
    assert dx.dtype == y.dtype == x.dtype
    if weight is not None:
        size = (wide[2].abs() * normal).reshape(rows, columns).sum(0)
        assert_close(dweight, want_dweight, roundings=roundings + rows, magnitude=size, name="dweight")
        assert dweight.dtype == weight.dtype


@FEW
@given(COLUMNS, st.integers(1, 9), st.sampled_from(DTYPES), st.sampled_from([None, *DTYPES]), st.integers(0, 9))
def test_any_width_and_dtype(device, columns, rows, dtype, weight_dtype, seed):
    x, dy = (drawn(rows, columns, dtype=dtype, device=device, seed=seed + i) for i in (0, 10))
    weight = None if weight_dtype is None else drawn(columns, dtype=weight_dtype, device=device, seed=seed + 20)
    check(x, weight, dy)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 4, 5), (67, 48), (4099, 1)])
def test_leading_shapes_and_many_rows(device, shape):
    check(drawn(*shape, device=device), drawn(shape[-1], device=device, seed=1), drawn(*shape, device=device, seed=2))


def test_rows_with_a_stride_are_read_in_place_and_others_copied(device):
    x, weight, dy = drawn(12, 40, device=device), drawn(20, device=device, seed=1), drawn(6, 20, device=device, seed=2)
    check(x[:6, 10:30], weight, dy)
    check(x[::2, :20], weight, dy)
    check(drawn(20, 6, device=device).t(), weight, dy)
    check(drawn(3, 4, 2, 20, device=device)[:, :2].transpose(1, 2)[:, 0], weight, dy.view(3, 2, 20))
    check(x[:6, :20], drawn(40, device=device)[::2], drawn(20, device=device).expand(6, 20))
    check(x[:6, :20], weight, torch.ones((), device=device).expand(6, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_values_do_not_overflow(device, dtype):
    weight = torch.ones(33, device=device, dtype=dtype)
    for factor in (2.0**-12, 2.0**12):
        check(drawn(3, 33, device=device, dtype=dtype) * factor, weight, drawn(3, 33, device=device, dtype=dtype))


def test_no_rows(device):
    x, weight = drawn(0, 7, device=device), drawn(7, device=device)
    y, rstd = module.rms_norm(x, weight, EPS)
    dx, dweight = module.rms_norm_backward(x, x, weight, rstd)
    assert (y.shape, rstd.shape, dx.shape) == ((0, 7), (0,), (0, 7))
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_dweight_is_the_same_each_time(device):
    x, weight, dy = drawn(61, 257, device=device), drawn(257, device=device), drawn(61, 257, device=device, seed=1)
    rstd = module.rms_norm(x, weight, EPS)[1]
    first, second = (module.rms_norm_backward(dy, x, weight, rstd)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("x", "weight", "named"),
    [
        (torch.ones(()), None, r"x = float32 \[\] with strides \[\]"),
        (torch.ones(2, 0), None, r"x = float32 \[2, 0\]"),
        (torch.ones(1).expand(1, 2**16 + 1), None, r"x = float32 \[1, 65537\] with strides \[0, 0\]"),
        (torch.ones(2, 3), torch.ones(4), r"weight of shape \[3\], got weight = float32 \[4\]"),
        (torch.ones(2, 3).double(), None, r"got x = float64 \[2, 3\] .*; cast it"),
        (torch.ones(2, 3), torch.ones(3).int(), r"got weight = int32 \[3\]"),
    ],
)
def test_what_no_kernel_takes_is_refused(x, weight, named):
    with pytest.raises(ValueError, match=f"fxzero_kernels::rms_norm: expected .*{named}.*"):
        module.rms_norm(x, weight, EPS)


def test_a_gradient_of_another_shape_is_refused(device):
    x = drawn(2, 3, device=device)
    with pytest.raises(ValueError, match=r"dy of shape \[2, 3\], got dy = float32 \[3, 3\]"):
        module.rms_norm_backward(drawn(3, 3, device=device), x, None, drawn(2, device=device))
    with pytest.raises(ValueError, match=r"rstd of shape \[2\], got rstd = float32 \[3\]"):
        module.rms_norm_backward(x, x, None, drawn(3, device=device))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # without eps, rows of padding are divided by zero
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/ columns + eps)", "/ columns)"),
        ("/ columns + eps)", "/ COLUMNS + eps)"),
        ("total += tl.sum(", "total = tl.sum("),
        ("partial.sum(0)", "partial[:-1].sum(0)"),
        ("(grad - normal * mean)", "(grad + normal * mean)"),
        ("            grad *= factor\n", ""),
        ("* x_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)\n    inverse = tl.div", None),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    new = old.replace("x_stride", "columns") if new is None else new
    wrong = mutant("rms_norm", old, new)
    x = (drawn(203, 200, device=device) * 0.01)[:, :100]
    with pytest.raises(AssertionError, match="differ"):
        check(x, drawn(100, device=device, seed=1), drawn(203, 100, device=device, seed=2), ops=wrong)


def test_the_ops_can_be_traced_and_differentiated(device):
    x, dy = drawn(3, 5, device=device, dtype=torch.bfloat16), drawn(3, 5, device=device, dtype=torch.bfloat16, seed=1)
    weight = drawn(5, device=device)
    rstd = module.rms_norm(x, weight, EPS)[1]
    torch.library.opcheck(module.rms_norm, (x.clone().requires_grad_(), weight.clone().requires_grad_(), EPS))
    torch.library.opcheck(module.rms_norm, (x[:, ::2], None, EPS))
    torch.library.opcheck(module.rms_norm_backward, (dy, x, weight, rstd))
    torch.library.opcheck(module.rms_norm_backward, (dy, x, None, rstd))
    graph = make_fx(lambda *a: module.rms_norm(*a, EPS), tracing_mode="fake")(x, weight).graph
    assert next(n.target for n in graph.nodes if n.op == "call_function") is module.rms_norm
    graph = make_fx(module.rms_norm_backward, tracing_mode="symbolic")(dy, x, weight, rstd).graph
    assert module.rms_norm_backward in [n.target for n in graph.nodes]


def test_autograd_knows_the_gradients(device):
    x, weight = drawn(4, 9, device=device).requires_grad_(), drawn(9, device=device, seed=1).requires_grad_()
    dy = drawn(4, 9, device=device, seed=2)
    y, rstd = module.rms_norm(x, weight, EPS)
    assert not rstd.requires_grad
    got = torch.autograd.grad(y, (x, weight), dy)
    want = torch.autograd.grad(
        torch.nn.functional.rms_norm(x.double(), (9,), weight.double(), EPS), (x, weight), dy.double()
    )
    for name, mine, theirs in zip(("dx", "dweight"), got, want, strict=True):
        assert_close(mine, theirs.double(), roundings=100, magnitude=10.0, name=name)


def test_without_the_interpreter_an_op_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.launch, "jit", None)
    x, weight, dy = drawn(3, 5), drawn(5, seed=1), drawn(3, 5, seed=2)
    got = module.rms_norm(x, weight, EPS)
    want = module.rms_norm_reference(x, weight, EPS)
    assert all(map(torch.equal, got, want))
    got = module.rms_norm_backward(dy, x, weight, want[1])
    assert all(map(torch.equal, got, module.rms_norm_backward_reference(dy, x, weight, want[1])))
    assert module.rms_norm(x[:0], weight, EPS)[0].shape == (0, 5)
