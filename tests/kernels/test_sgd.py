"""SGD in one launch against the formula in fp64, and against torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.kernels import sgd as module
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import DTYPES, FEW, drawn
from tests.kernels.updates import GRADIENT, SIZES, check, clones, lists, wide

ROLES = ("params", "grads", "momenta")
OPTIONS = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "first": False}


def update(ops, made, arguments):
    """One step in place; with `ops` None by the reference, in the dtypes that there are."""
    copies, momenta = made.get("copies", []), made.get("momenta", [])
    if ops is not None:
        ops.sgd_(made["params"], made["grads"], momenta, copies=copies, **OPTIONS | arguments)
        return
    module.sgd_reference(made["params"], made["grads"], momenta, copies, **wide(OPTIONS | arguments))


def magnitudes(before, after):
    grads = [g.abs() + p.abs() for g, p in zip(before["grads"], before["params"], strict=True)]
    momenta = [m.abs() + g for m, g in zip(before.get("momenta", grads), grads, strict=True)]
    params = [p.abs() + g + m for p, g, m in zip(before["params"], grads, momenta, strict=True)]
    return {"momenta": momenta, "params": params, "copies": params}


def checked(made, ops=module, **arguments):
    check(update, made, magnitudes=magnitudes, ops=ops, **arguments)


@FEW
@given(
    st.lists(st.integers(0, 70) | st.sampled_from([2047, 2049]), min_size=1, max_size=4), st.sampled_from(DTYPES),
    st.sampled_from(DTYPES), st.sampled_from([None, 0.0, 0.5]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([0.0, 0.1]), st.sampled_from([None, torch.bfloat16]),
)  # fmt: skip
def test_any_sizes_dtypes_and_options(
    device, sizes, dtype, grad_dtype, dampening, nesterov, first, maximize, weight_decay, copy_dtype
):
    roles = [*ROLES[: 2 if dampening is None else 3], *(["copies"] if copy_dtype else [])]
    made = lists(roles, device=device, sizes=sizes, dtypes={"params": dtype, "grads": grad_dtype, "copies": copy_dtype})
    options = {"momentum": 0.9, "dampening": dampening or 0.0, "nesterov": nesterov, "first": first}
    checked(made, **options, weight_decay=weight_decay, maximize=maximize)


def test_numbers_as_tensors(device):
    made = lists([*ROLES, "copies"], device=device, dtypes={"grads": torch.float16, "copies": torch.bfloat16})
    numbers = {"lr": 0.3, "inverse_scale": 1 / 1024, "clip": 0.37}
    options = {"momentum": 0.9, "weight_decay": 0.1}
    checked(made, **options, **numbers)
    checked(made, **options, **{name: torch.tensor(x, device=device) for name, x in numbers.items()})


def test_nothing_is_written_after_an_overflow(device):
    made = lists([*ROLES, "copies"], device=device)
    before = clones(made)
    update(module, made, {"momentum": 0.9, "overflow": torch.ones((), device=device)})
    assert all(torch.equal(a, b) for role in made for a, b in zip(made[role], before[role], strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_five_steps_are_those_of_torch(device, options):
    params = [torch.nn.Parameter(drawn(n, device=device, seed=i)) for i, n in enumerate(SIZES)]
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=False, **options)
    mine = {"params": [p.detach().clone() for p in params]}
    if options.get("momentum"):
        mine["momenta"] = [torch.full_like(p, torch.nan) for p in params]  # the first step reads none of it
    for step in range(1, 6):
        for i, param in enumerate(params):
            param.grad = drawn(len(param), device=device, seed=10 * step + i)
        optimizer.step()
        mine["grads"] = [p.grad for p in params]
        update(module, mine, options | {"first": step == 1})
    for theirs, own in zip(params, mine["params"], strict=True):
        assert_close(own, theirs.detach().double(), roundings=20, magnitude=5.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("grad += param * weight_decay", "grad -= param * weight_decay"),
        ('1 - arguments["dampening"], ', '1 + arguments["dampening"], '),
        ("grad += average * momentum", "grad = average"),
        ("param -= grad * rate", "param += grad * rate"),
        ("tl.store(momentum_at, average, mask=inside)", "tl.store(momentum_at, grad, mask=inside)"),
        ("COPY_ROW=(3 + bool(momenta)) * bool(copies)", "COPY_ROW=0"),
        ("other=0.0), inverse_scale, clip, MAXIMIZE)", "other=0.0), inverse_scale, 1.0, MAXIMIZE)"),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("sgd", old, new)
    options = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "nesterov": True, "clip": 0.5}
    with pytest.raises(AssertionError, match="differ"):
        checked(lists([*ROLES, "copies"], device=device), ops=wrong, **options)


def test_lists_that_do_not_belong_together_are_refused():
    made = {"params": [torch.ones(3)], "grads": [torch.ones(4)]}
    with pytest.raises(
        ValueError, match=r"fxzero_kernels::sgd_: expected 3 elements, .*, got grads\[0\] = float32 \[4\]"
    ):
        update(module, made, {})
    made = {"params": [torch.ones(3)], "grads": [torch.ones(3)], "momenta": [torch.ones(3).half()]}
    with pytest.raises(ValueError, match=r"expected dtype float32, got momenta\[0\] = float16 \[3\]"):
        update(module, made, {})


def test_the_op_can_be_checked_and_is_the_reference_without_the_interpreter(device, monkeypatch):
    made = lists([*ROLES, "copies"], device=device, sizes=(3, 5))
    arguments = wide(OPTIONS | GRADIENT | {"momentum": 0.9})
    arguments = {name: x for name, x in arguments.items() if "correction" not in name}
    torch.library.opcheck(module.sgd_op, tuple(made.values()), arguments)
    torch.library.opcheck(module.sgd_op, (made["params"], made["grads"], [], []), arguments)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.multi_tensor.launch, "jit", None)
    made = lists([*ROLES, "copies"], device="cpu")
    want = clones(made)
    update(module, made, {"momentum": 0.9})
    update(None, want, {"momentum": 0.9})
    assert all(torch.equal(a, b) for role in made for a, b in zip(made[role], want[role], strict=True))
