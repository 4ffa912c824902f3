"""Lion in one launch against the formula in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.kernels import lion as module
from tests.kernels.drawn import DTYPES, FEW
from tests.kernels.updates import GRADIENT, check, clones, lists, wide

ROLES = ("params", "grads", "exp_avgs")
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def update(ops, made, arguments):
    """One step in place; with `ops` None by the reference, in the dtypes that there are."""
    positional, copies = [made[role] for role in ROLES], made.get("copies", [])
    if ops is not None:
        ops.lion_(*positional, copies=copies, **HYPER | arguments)
        return
    module.lion_reference(*positional, copies, **wide(HYPER | arguments))


def magnitudes(before, after):
    averages = [m.abs() + g.abs() for m, g in zip(before["exp_avgs"], before["grads"], strict=True)]
    params = [p.abs() + 1 for p in before["params"]]
    return {"exp_avgs": averages, "params": params, "copies": params}


def checked(made, ops=module, **arguments):
    """Where the two terms under the sign cancel, roundings decide it: no such gradient is left in `made`."""
    for i, (grad, average) in enumerate(zip(made["grads"], made["exp_avgs"], strict=True)):
        mixed = 0.9 * average.double() + 0.1 * grad.double()
        made["grads"][i] = torch.where(mixed.abs() < 1e-3, 1.0 + average.abs().to(grad.dtype), grad)
    check(update, made, magnitudes=magnitudes, ops=ops, **arguments)


@FEW
@given(
    st.lists(st.integers(0, 70) | st.sampled_from([2047, 2049]), min_size=1, max_size=4),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from([None, *DTYPES[1:]]),
)  # fmt: skip
def test_any_sizes_and_dtypes(device, sizes, dtype, grad_dtype, copy_dtype):
    roles = [*ROLES, *(["copies"] if copy_dtype else [])]
    made = lists(roles, device=device, sizes=sizes, dtypes={"params": dtype, "grads": grad_dtype, "copies": copy_dtype})
    checked(made)


def test_maximize(device):
    made = lists(ROLES, device=device)
    other = clones(made)
    other["grads"] = [-g for g in other["grads"]]
    update(module, made, {"maximize": True})
    update(module, other, {})
    assert all(map(torch.equal, made["params"], other["params"]))


def test_numbers_as_tensors(device):
    numbers = {"lr": 0.3, "inverse_scale": 0.5, "clip": 2.0}
    made = lists([*ROLES, "copies"], device=device, dtypes={"copies": torch.bfloat16})
    checked(made, **numbers)
    checked(made, **{name: torch.tensor(x, device=device) for name, x in numbers.items()})


def test_nothing_is_written_after_an_overflow(device):
    made = lists([*ROLES, "copies"], device=device)
    before = clones(made)
    update(module, made, {"overflow": torch.ones((), device=device)})
    assert all(torch.equal(a, b) for role in made for a, b in zip(made[role], before[role], strict=True))


def test_a_sign_of_nothing_is_nothing(device):
    zeros = [torch.zeros(3, device=device)]
    made = {"params": [torch.ones(3, device=device)], "grads": zeros, "exp_avgs": clones({"m": zeros})["m"]}
    update(module, made, {"weight_decay": 0.0})
    assert torch.equal(made["params"][0], torch.ones(3, device=device))
    nan = torch.full((3,), torch.nan, device=device)
    made = {"params": [torch.ones(3, device=device)], "grads": [nan], "exp_avgs": zeros}
    want = clones(made)
    update(module, made, {})
    update(None, want, {})
    assert torch.allclose(made["params"][0], want["params"][0], rtol=1e-6)
    assert made["exp_avgs"][0].isnan().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("average * beta1 + grad", "average + grad"),
        ("decay - rate * direction", "decay + rate * direction"),
        ("1 - lr * weight_decay", "1 + lr * weight_decay"),
        ("tl.where(mixed < 0, -1.0, 0.0)", "1.0"),
        ("beta1, 1 - beta1, beta2, 1 - beta2", "beta1, 1 - beta1, beta1, 1 - beta1"),
        ('"COPY_ROW": 4 *', '"COPY_ROW": 3 *'),
        ("        decay = 1.0 - rate *", "        decay = 1.0 + rate *"),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("lion", old, new)
    with pytest.raises(AssertionError, match="differ"):
        checked(lists([*ROLES, "copies"], device=device), ops=wrong)
        checked(lists([*ROLES, "copies"], device=device), ops=wrong, lr=torch.tensor(0.1, device=device))


def test_lists_that_do_not_belong_together_are_refused():
    made = {role: [torch.ones(3)] for role in ROLES} | {"exp_avgs": [torch.ones(2, 2)]}
    with pytest.raises(
        ValueError, match=r"fxzero_kernels::lion_: expected 3 elements.*exp_avgs\[0\] = float32 \[2, 2\]"
    ):
        update(module, made, {})


def test_the_op_can_be_checked_and_is_the_reference_without_the_interpreter(device, monkeypatch):
    made = lists([*ROLES, "copies"], device=device, sizes=(3, 5))
    arguments = {name: x for name, x in wide(HYPER | GRADIENT).items() if "correction" not in name}
    torch.library.opcheck(module.lion_op, tuple(made.values()), arguments)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.multi_tensor.launch, "jit", None)
    made = lists([*ROLES, "copies"], device="cpu")
    want = clones(made)
    update(module, made, {})
    update(None, want, {})
    assert all(torch.equal(a, b) for role in made for a, b in zip(made[role], want[role], strict=True))
