"""Layer norm and its gradients against the formula in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.kernels import layer_norm as module
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import COLUMNS, DTYPES, FEW, drawn

EPS = 1e-5


def check(x, weight, bias, dy, *, ops=module):
    """Forward and backward of these tensors are near the formula."""
    y, mean, rstd = ops.layer_norm(x, weight, bias, EPS)
    dx, dweight, dbias = ops.layer_norm_backward(dy, x, weight, mean, rstd, bias is not None)
    wx, ww, wb, wdy = (None if t is None else t.double() for t in (x, weight, bias, dy))
    want_y, want_mean, want_rstd = module.layer_norm_reference(wx, ww, wb, EPS)
    # the statistics that the backward was given: their own error is that of the forward
    given_mean, given_rstd = mean.double(), rstd.double()
    want = module.layer_norm_backward_reference(wdy, wx, ww, given_mean, given_rstd, bias is not None)
    columns, rows = x.shape[-1], math.prod(x.shape[:-1])
    roundings = 12 + math.log2(columns) + columns / 64  # numpy and Triton sum in parallel, sixty-four columns at a time
    size = wx.abs().mean(-1)
    assert_close(mean, want_mean, roundings=roundings, magnitude=size, name="mean")
    assert_close(rstd, want_rstd, roundings=roundings, magnitude=want_rstd * (1 + size * want_rstd), name="rstd")
    inverse = want_rstd.unsqueeze(-1)
    normal = (wx.abs() + size.unsqueeze(-1)) * inverse
    factor = torch.ones_like(wx) if weight is None else ww.abs()
    magnitude = normal * factor * (1 + size * want_rstd).unsqueeze(-1) + (0 if bias is None else wb.abs())
    assert_close(y, want_y, roundings=3 * roundings, magnitude=magnitude, name="y")
    scaled = wdy.abs() * factor
    magnitude = inverse * (scaled + scaled.mean(-1, True) + normal * (scaled * normal).mean(-1, True))
    assert_close(dx, want[0], roundings=3 * roundings, magnitude=magnitude, name="dx")
    assert dx.dtype == y.dtype == x.dtype
    if weight is not None:
        magnitude = (wdy.abs() * normal).reshape(rows, columns).sum(0)
        assert_close(dweight, want[1], roundings=4 + rows, magnitude=magnitude, name="dweight")
        assert dweight.dtype == weight.dtype
    if bias is not None:
        assert_close(dbias, want[2], roundings=rows, magnitude=wdy.abs().reshape(rows, columns).sum(0), name="dbias")


def parameters(columns, *, device, dtype=torch.float32, weight=True, bias=True):
    given = ((weight, 11), (bias, 12))
    return [drawn(columns, device=device, dtype=dtype, seed=seed) if wanted else None for wanted, seed in given]


@FEW
@given(COLUMNS, st.integers(1, 9), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_any_width_and_dtype(device, columns, rows, dtype, other, weight, bias):
    x, dy = (drawn(rows, columns, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    check(x, *parameters(columns, device=device, dtype=other, weight=weight, bias=bias), dy)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 4, 5), (67, 48), (4099, 1)])
def test_leading_shapes_and_many_rows(device, shape):
    check(drawn(*shape, device=device), *parameters(shape[-1], device=device), drawn(*shape, device=device, seed=2))


def test_rows_with_a_stride_are_read_in_place_and_others_copied(device):
    x, both, dy = drawn(12, 40, device=device), parameters(20, device=device), drawn(6, 20, device=device, seed=2)
    check(x[:6, 10:30], *both, dy)
    check(x[::2, :20], *both, dy)
    check(drawn(20, 6, device=device).t(), *both, dy)
    check(x[:6, :20], *both, torch.ones((), device=device).expand(6, 20))


def test_a_mean_far_from_zero_does_not_cancel(device):
    check(drawn(5, 300, device=device) + 1000, *parameters(300, device=device), drawn(5, 300, device=device, seed=1))


def test_no_rows(device):
    x, both = drawn(0, 7, device=device), parameters(7, device=device)
    y, mean, rstd = module.layer_norm(x, *both, EPS)
    dx, dweight, dbias = module.layer_norm_backward(x, x, both[0], mean, rstd, True)
    assert [t.shape for t in (y, mean, rstd, dx)] == [(0, 7), (0,), (0,), (0, 7)]
    assert torch.equal(dweight, torch.zeros(7, device=device))
    assert torch.equal(dbias, torch.zeros(7, device=device))


def test_sums_over_rows_are_the_same_each_time(device):
    x, dy = drawn(61, 257, device=device), drawn(61, 257, device=device, seed=1)
    both = parameters(257, device=device)
    _, mean, rstd = module.layer_norm(x, *both, EPS)
    first, second = (module.layer_norm_backward(dy, x, both[0], mean, rstd, True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "named"),
    [
        (torch.ones(()), None, None, r"x = float32 \[\] with strides \[\]"),
        (torch.ones(2, 3), torch.ones(4), None, r"weight of shape \[3\], got weight = float32 \[4\]"),
        (torch.ones(2, 3), None, torch.ones(1, 3), r"bias of shape \[3\], got bias = float32 \[1, 3\]"),
        (torch.ones(2, 3), None, torch.ones(3).double(), r"got bias = float64 \[3\]"),
    ],
)
def test_what_no_kernel_takes_is_refused(x, weight, bias, named):
    with pytest.raises(ValueError, match=f"fxzero_kernels::layer_norm: expected .*{named}.*"):
        module.layer_norm(x, weight, bias, EPS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # without eps, rows of padding are divided by zero
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/ columns + eps)", "/ columns)"),
        ("inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, axis=1) / columns + eps))",
         "inverse = tl.rsqrt(tl.sum((value + centre[:, None]) * (value + centre[:, None]) * present[None, :], axis=1)"
         " / columns - centre * centre + eps)"),
        ("tl.where(present[None, :], value - centre[:, None], 0.0)", "value - centre[:, None]"),
        ("weight_total += ", "weight_total = "),
        ("bias_total += ", "bias_total = "),
        ("sums[0].sum(0)", "sums[0][1:].sum(0)"),
        ("(grad - shift - normal * slope)", "(grad - normal * slope)"),
        ("(value - centre) * inverse", "value * inverse"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("layer_norm", old, new)
    arguments = (*parameters(100, device=device), drawn(203, 100, device=device, seed=2))
    with pytest.raises(AssertionError, match="differ"):
        check(drawn(203, 100, device=device) * 0.01 + (100 if "rsqrt" in new else 1), *arguments, ops=wrong)


def test_the_ops_can_be_traced_and_differentiated(device):
    x, dy = drawn(3, 5, device=device, dtype=torch.bfloat16), drawn(3, 5, device=device, dtype=torch.bfloat16, seed=1)
    weight, bias = parameters(5, device=device)
    _, mean, rstd = module.layer_norm(x, weight, bias, EPS)
    torch.library.opcheck(module.layer_norm, (*(t.clone().requires_grad_() for t in (x, weight, bias)), EPS))
    torch.library.opcheck(module.layer_norm, (x[:, ::2], None, None, EPS))
    torch.library.opcheck(module.layer_norm_backward, (dy, x, weight, mean, rstd, True))
    torch.library.opcheck(module.layer_norm_backward, (dy, x, None, mean, rstd, False))
    graph = make_fx(lambda *a: module.layer_norm(*a, EPS), tracing_mode="fake")(x, weight, bias).graph
    assert next(n.target for n in graph.nodes if n.op == "call_function") is module.layer_norm


def test_autograd_knows_the_gradients(device):
    x, *both = (t.requires_grad_() for t in (drawn(4, 9, device=device), *parameters(9, device=device)))
    dy = drawn(4, 9, device=device, seed=2)
    got = torch.autograd.grad(module.layer_norm(x, *both, EPS)[0], (x, *both), dy)
    wide = torch.nn.functional.layer_norm(x.double(), (9,), *(t.double() for t in both), EPS)
    want = torch.autograd.grad(wide, (x, *both), dy.double())
    for name, mine, theirs in zip(("dx", "dweight", "dbias"), got, want, strict=True):
        assert_close(mine, theirs.double(), roundings=100, magnitude=10.0, name=name)


def test_without_the_interpreter_an_op_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.launch, "jit", None)
    x, dy, both = drawn(3, 5), drawn(3, 5, seed=2), parameters(5, device="cpu")
    got, want = module.layer_norm(x, *both, EPS), module.layer_norm_reference(x, *both, EPS)
    assert all(map(torch.equal, got, want))
    arguments = (dy, x, both[0], want[1], want[2], True)
    pairs = zip(module.layer_norm_backward(*arguments), module.layer_norm_backward_reference(*arguments), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
