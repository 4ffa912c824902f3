"""AdamW in one launch against the formula in fp64, and against torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxzero.kernels import adamw as module
from fxzero.kernels import multi_tensor
from tests.kernels.closeness import assert_close
from tests.kernels.drawn import DTYPES, FEW, drawn
from tests.kernels.updates import SIZES, check, clones, lists, wide

ROLES = ("params", "grads", "exp_avgs", "exp_avg_sqs")
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
STEP3 = {"correction1": 1 - 0.9**3, "correction2": 1 - 0.999**3}


def update(ops, made, arguments):
    """One step in place; with `ops` None by the reference, in the dtypes that there are."""
    optional = {role: made[role] for role in ("max_exp_avg_sqs", "copies") if role in made}
    positional = [made[role] for role in ROLES]
    if ops is not None:
        ops.adamw_(*positional, **optional, **HYPER | arguments)
        return
    rest = (optional.get("max_exp_avg_sqs", []), optional.get("copies", []))
    module.adamw_reference(*positional, *rest, **wide(STEP3 | HYPER | arguments))


def magnitudes(before, after):
    averages = [m.abs() + g.abs() for m, g in zip(before["exp_avgs"], before["grads"], strict=True)]
    roots = [v.sqrt() for v in after.get("max_exp_avg_sqs", after["exp_avg_sqs"])]
    # lr / correction1 and sqrt(correction2), rounded up and down
    steps = [0.1 * m / (0.03 * r + 1e-30) for m, r in zip(averages, roots, strict=True)]
    params = [p.abs() + s for p, s in zip(before["params"], steps, strict=True)]
    return {"exp_avgs": averages, "params": params, "copies": params}


def checked(made, ops=module, **arguments):
    check(update, made, magnitudes=magnitudes, ops=ops, **STEP3 | arguments)


@FEW
@given(
    st.lists(st.integers(0, 70) | st.sampled_from([2047, 2048, 2049]), min_size=1, max_size=4),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.sampled_from([None, *DTYPES[1:]]),
)  # fmt: skip
def test_any_sizes_and_dtypes(device, sizes, dtype, grad_dtype, amsgrad, maximize, copy_dtype):
    roles = [*ROLES, *(["max_exp_avg_sqs"] if amsgrad else []), *(["copies"] if copy_dtype else [])]
    dtypes = {"params": dtype, "grads": grad_dtype, "copies": copy_dtype}
    checked(lists(roles, device=device, sizes=sizes, dtypes=dtypes), maximize=maximize)


def test_unscaled_and_clipped_by_numbers_and_by_tensors(device):
    made = lists([*ROLES, "copies"], device=device, dtypes={"grads": torch.float16, "copies": torch.bfloat16})
    made["grads"] = [1000 * g for g in made["grads"]]
    checked(made, inverse_scale=1 / 1024, clip=0.37)
    tensors = {name: torch.tensor(x, device=device) for name, x in (("inverse_scale", 1 / 1024), ("clip", 0.37))}
    checked(made, **tensors)


@pytest.mark.parametrize("names", [("lr",), ("correction1", "correction2"), ("lr", "correction1", "correction2")])
def test_rate_and_corrections_as_tensors(device, names):
    values = HYPER | STEP3
    checked(lists(ROLES, device=device), **{name: torch.tensor(values[name], device=device) for name in names})


@pytest.mark.parametrize("flag", [torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(True), torch.tensor([2])])
def test_nothing_is_written_after_an_overflow(device, flag):
    made = lists([*ROLES, "max_exp_avg_sqs", "copies"], device=device)
    before = clones(made)
    made["grads"][2][0] = float("nan")
    update(module, made, STEP3 | {"overflow": flag.to(device)})
    assert all(
        torch.equal(a, b) for role in made if role != "grads" for a, b in zip(made[role], before[role], strict=True)
    )
    checked(before, overflow=torch.zeros_like(flag, device=device))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.4, 0.9)}], ids=str)
def test_five_steps_are_those_of_torch(device, options):
    params = [torch.nn.Parameter(drawn(n, device=device, seed=i)) for i, n in enumerate(SIZES)]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, foreach=False, **options)
    mine = {"params": [p.detach().clone() for p in params]}
    for role in ("exp_avgs", "exp_avg_sqs", *(["max_exp_avg_sqs"] if options.get("amsgrad") else [])):
        mine[role] = [torch.zeros_like(p) for p in params]
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    for step in range(1, 6):
        for i, param in enumerate(params):
            param.grad = drawn(len(param), device=device, seed=10 * step + i)
        optimizer.step()
        mine["grads"] = [p.grad for p in params]
        corrections = {"correction1": 1 - beta1**step, "correction2": 1 - beta2**step, "beta1": beta1, "beta2": beta2}
        update(module, mine, corrections | {"maximize": options.get("maximize", False)})
    for theirs, own in zip(params, mine["params"], strict=True):  # five steps of at most 2 lr, five roundings of |p|
        assert_close(own, theirs.detach().double(), roundings=10, magnitude=1.0)


def test_a_table_is_built_once_for_the_same_places(device):
    made = lists(ROLES, device=device)
    first = multi_tensor.table_of(list(made.values()))
    again = multi_tensor.table_of(list(made.values()))
    assert again.places is first.places
    assert again.chunks is first.chunks
    other = clones(made)
    moved = multi_tensor.table_of(list(other.values()))
    assert moved.places is not first.places
    assert moved.chunks is first.chunks
    assert first.aligned
    assert not multi_tensor.table_of([[made["params"][4][1:]]]).aligned
    assert first.places[1].tolist() == [x.data_ptr() for x in made["params"]]
    assert first.chunks.tolist() == [[0, 0], [2, 0], [3, 0], [3, 1], [4, 0], [4, 1], [4, 2]]


@pytest.mark.parametrize("name", ["lr", "clip", "overflow"])
def test_a_number_of_several_elements_is_refused(device, name):
    with pytest.raises(ValueError, match=rf"adamw_: expected one element on {device}.*, got {name}\w* = float32 \[2\]"):
        update(module, lists(ROLES, device=device), STEP3 | {name: torch.ones(2, device=device)})


def test_addresses_that_are_not_aligned(device):
    made = lists(ROLES, device=device, sizes=(100, 2050))
    checked({role: [x[1:] for x in tensors] for role, tensors in made.items()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grads": [torch.ones(3)]}, "2 grads, one for each parameter, got 1"),
        ({"grads": [torch.ones(3), torch.ones(5)]}, r"4 elements, as its parameter, got grads\[1\] = float32 \[5\]"),
        ({"grads": [torch.ones(3), torch.ones(4).half()]}, r"one dtype .*, got grads\[1\] = float16 \[4\]"),
        ({"exp_avgs": [torch.ones(3).half()] * 2}, r"dtype float32, got exp_avgs\[0\] = float16 \[3\]"),
        ({"exp_avg_sqs": [torch.ones(3), torch.ones(8)[::2]]}, r"a contiguous tensor, got exp_avg_sqs\[1\] = .*\[2\]"),
        ({"copies": [torch.ones(3)]}, "2 copies, one for each parameter, got 1"),
        ({"params": [torch.ones(3).double()] * 2}, r"got params\[0\] = float64 \[3\]"),
    ],
)
def test_lists_that_do_not_belong_together_are_refused(change, named):
    made = {role: [torch.ones(3), torch.ones(4)] for role in ROLES} | change
    with pytest.raises(ValueError, match=f"fxzero_kernels::adamw_: expected .*{named}.*"):
        update(module, made, STEP3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # without eps, padding is 0 / 0
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" + eps\n    param", "\n    param"),
        ("square += complement2 * grad * grad", "square += complement2 * grad"),
        ("(1 - lr * weight_decay, ", "(1 + lr * weight_decay, "),
        ("math.sqrt(correction2))", "correction2)"),
        ("param -= step_size", "param += step_size"),
        ("1 - beta1, beta2", "beta1, beta2"),
        ("grad_type, 2, ALIGNED", "grad_type, 1, ALIGNED"),
        ("square, propagate_nan=tl.PropagateNan.ALL)", "square * 0)"),
        ("COPY_ROW=(5 + bool(max_exp_avg_sqs)) *", "COPY_ROW=5 *"),
        ("other=0.0), inverse_scale, clip, MAXIMIZE)", "other=0.0), inverse_scale, 1.0, MAXIMIZE)"),
        ("copy_at, offset < size, decay", "copy_at, offset < size - 1, decay"),
    ],
)
def test_a_wrong_kernel_is_found(device, mutant, old, new):
    wrong = mutant("adamw", old, new)
    made = lists([*ROLES, "max_exp_avg_sqs", "copies"], device=device)
    made["max_exp_avg_sqs"][2] += 3
    made["grads"][3] *= 1e-8  # with v as small, eps counts
    for role in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        made[role][3] *= 1e-8 if role == "exp_avgs" else 1e-16
    with pytest.raises(AssertionError, match="differ"):
        checked(made, ops=wrong, clip=0.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.where(tl.load(overflow) == 0, size, 0)", "size"),
        ("        grad = -grad\n", "        grad = 1.0 * grad\n"),
        ("    counts = torch.tensor([launch.ceil_div(size, BLOCK)", "    counts = torch.tensor([max(1, size // BLOCK)"),
        ("tl.load(places + tensor)", "tl.load(places)"),
    ],
)
def test_a_wrong_shared_part_is_found(device, mutant, monkeypatch, old, new):
    shared = mutant("multi_tensor", old, new)
    for name in ("place", "address_of", "scalar", "unscaled", "everywhere", "multi_tensor"):
        monkeypatch.setattr(module, name, shared if name == "multi_tensor" else getattr(shared, name))
    made = lists(ROLES, device=device)
    with pytest.raises(AssertionError, match="differ"):
        checked(made, maximize=True)
        checked(made, overflow=torch.ones((), device=device))


def test_the_op_can_be_traced(device):
    made = lists([*ROLES, "max_exp_avg_sqs", "copies"], device=device, sizes=(3, 5))
    numbers = {"lr": 0.1, "correction1": 0.5, "correction2": 0.5, "inverse_scale": 1.0, "clip": 1.0}
    arguments = numbers | {f"{name}_tensor": None for name in numbers} | {"overflow": None, "maximize": False}
    arguments |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    torch.library.opcheck(module.adamw_op, tuple(made.values()), arguments)
    arguments["lr_tensor"] = torch.tensor(0.1, device=device)
    torch.library.opcheck(module.adamw_op, (*list(made.values())[:4], [], []), arguments)
    before = clones(made)

    def step(made):
        update(module, made, STEP3)
        return made["params"]

    graph = make_fx(step, tracing_mode="fake")(made).graph
    assert module.adamw_op in [n.target for n in graph.nodes]
    assert all(map(torch.equal, made["params"], before["params"]))


def test_without_the_interpreter_an_op_on_the_cpu_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module.multi_tensor.launch, "jit", None)
    made = lists([*ROLES, "max_exp_avg_sqs", "copies"], device="cpu")
    want = clones(made)
    update(module, made, STEP3)
    update(None, want, STEP3)
    assert all(torch.equal(a, b) for role in made for a, b in zip(made[role], want[role], strict=True))
