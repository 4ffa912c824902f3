"""Numbers of the host come to the device as tensors: forms round as calls with numbers do, what has none is named."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import fx

from fxzero import Plan, compat
from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.errors import PlanError
from fxzero.graph import StateEntry, StepGraph, ops
from fxzero.graph.host_side import NUMBER, numbers_that_change, split_at_numbers
from fxzero.graph.parse import from_text
from fxzero.graph.step_graph import Result, yields_scalar
from fxzero.passes.hand_over_numbers import hand_over_numbers
from fxzero.recipe import recipe
from tests.lower.models import Decoder, tokens

aten = torch.ops.aten
NUMBERS = {"a": 0.7, "b": -0.3, "n": 3}


def one_call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor) -> StepGraph:
    """A step of one call on tensors x, y, z of one shape and numbers a, b (floats) and n (an integer)."""
    graph, mode = fx.Graph(), compat.new_fake_mode()
    inputs: dict[str, fx.Node] = {}
    for name in ("x", "y", "z", *NUMBERS):
        inputs[name] = graph.placeholder(name)
        kind = "batch" if name in "xyz" else "hyperparameter"
        with mode:
            val: Any = torch.empty(x.shape, dtype=x.dtype) if name in "xyz" else NUMBERS[name]
        inputs[name].meta = {"entry": StateEntry(kind, name), "val": val, "phase": "update", "module": ""}

    def read(value: Any) -> Any:
        if value == "mask":
            return mask
        return inputs[value] if isinstance(value, str) else value

    mask = graph.call_function(aten.gt.Scalar, (inputs["x"], 0.0))
    call = graph.call_function(op, tuple(map(read, args)), {key: read(value) for key, value in kwargs.items()})
    for node in (mask, call):
        taken, given = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta = {"phase": "update", "module": "", "val": node.target(*taken, **given)}  # type: ignore[operator]
    graph.output((call,)).meta["results"] = (Result("loss", "loss"),)
    return StepGraph(graph)


def value_of(step: StepGraph, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(x.shape, generator=generator, dtype=torch.float64).add(0.1).to(x.dtype) for _ in "yz"]
    return fx.Interpreter(fx.GraphModule({}, step.graph)).run(x, *tensors, *NUMBERS.values())[0]


FORMS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "add": (aten.add.Tensor, ("x", "a"), {}),
    "add_scalar": (aten.add.Scalar, ("x", "a"), {}),
    "sub_scalar": (aten.sub.Scalar, ("x", "n"), {}),
    "mul": (aten.mul.Tensor, ("x", "a"), {}),
    "div": (aten.div.Tensor, ("x", "a"), {}),
    "add_alpha": (aten.add.Tensor, ("x", "y"), {"alpha": "a"}),
    "sub_alpha": (aten.sub.Tensor, ("x", "y"), {"alpha": "a"}),
    "addcmul": (aten.addcmul.default, ("x", "y", "z"), {"value": "b"}),
    "addcdiv": (aten.addcdiv.default, ("x", "y", "z"), {"value": "b"}),
    "lerp": (aten.lerp.Scalar, ("x", "y", "a"), {}),
    "pow": (aten.pow.Tensor_Scalar, ("y", "a"), {}),
    "ge": (aten.ge.Scalar, ("x", "a"), {}),
    "masked_fill": (aten.masked_fill.Scalar, ("x", "mask", "a"), {}),
    "clamp": (aten.clamp.default, ("x", "b", "a"), {}),
    "clamp_min": (aten.clamp.default, ("x", "b"), {}),
    "clamp_mixed": (aten.clamp.default, ("x", -0.1, "a"), {}),
}
ARITHMETIC = [name for name in FORMS if name.startswith(("add", "sub", "mul", "div", "lerp"))]
ONE_ULP = {"pow"}  # torch has other code for an exponent that is a number


@pytest.mark.parametrize("shape", [(), (3,), (1003,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forms_with_tensors_round_as_the_calls_with_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for name, (op, args, kwargs) in FORMS.items():
        step = one_call(op, args, kwargs, x)
        expected = value_of(step, x)
        hand_over_numbers.run(step)
        assert not any(yields_scalar(n) for n in step.results[("loss", "loss")].all_input_nodes), name
        got = value_of(step, x)
        assert got.dtype == expected.dtype, name
        ulp = torch.finfo(dtype).eps if name in ONE_ULP else 0.0
        assert torch.allclose(got.double(), expected.double(), rtol=ulp, atol=0.0), name


@pytest.mark.parametrize("name", ARITHMETIC)
def test_in_16_bits_a_call_is_computed_in_fp32_and_rounds_its_result(name: str) -> None:
    x = torch.randn(1003, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide, step = (one_call(*FORMS[name], tensor) for tensor in (x.float(), x))
    generator = torch.Generator().manual_seed(0)
    y, z = (torch.rand(1003, generator=generator).add(0.1).bfloat16() for _ in range(2))
    expected = fx.Interpreter(fx.GraphModule({}, wide.graph)).run(x.float(), y.float(), z.float(), *NUMBERS.values())[0]
    hand_over_numbers.run(step)
    got = fx.Interpreter(fx.GraphModule({}, step.graph)).run(x, y, z, *NUMBERS.values())[0]
    assert torch.equal(got, expected.bfloat16())


def test_integers_stay_integers() -> None:
    x = torch.tensor([2**60])
    step = one_call(aten.add.Tensor, ("x", "n"), {}, x)
    hand_over_numbers.run(step)
    (handed,) = step.calls(ops.on_device)
    assert handed.meta["val"].dtype == torch.int64
    run = fx.Interpreter(fx.GraphModule({}, step.graph)).run
    assert run(x, x, x, 0.7, -0.3, 3)[0].tolist() == [2**60 + 3]


REFUSED = {
    "a list": (aten.full.default, ([2], "a"), {}, r"Plan.cuda_graph, %full_default \(aten::full\) in update of the"),
    "a keyword": (aten.addmm.default, ("x", "x", "x"), {"beta": "a"}, "takes numbers .* got aten.addmm.default of %a;"),
    "the first": (aten.rsub.Scalar, ("x", "a"), {}, "%rsub_scalar"),
    "waits": (aten.nonzero.default, ("x",), {}, "%nonzero_default .*no place at which .* shape that depends on values"),
}


@pytest.mark.parametrize(("op", "args", "kwargs", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_take_tensors_is_named(op: Any, args: Any, kwargs: Any, message: str) -> None:
    step = one_call(op, args, kwargs, torch.zeros(2, 2))
    with pytest.raises(PlanError, match=message):
        hand_over_numbers.run(step)


def test_a_tensor_of_the_host_is_named_but_for_a_constant_of_no_dims() -> None:
    def given(kind: str, shape: tuple[int, ...]) -> StepGraph:
        step = one_call(aten.mul.Tensor, ("y", "x"), {}, torch.zeros(2))
        for node in step.graph.nodes:
            if node.name != "x" and isinstance(node.meta.get("val"), torch.Tensor):
                node.meta["val"] = torch.empty(2, device="meta")
        x = step.placeholders[0]
        x.meta |= {"entry": StateEntry(kind, "x"), "val": torch.empty(shape, device="cpu")}
        step.graph.erase_node(next(n for n in step.calls() if n.target is aten.gt.Scalar))
        return step

    def on_meta(step: StepGraph) -> int:
        # the meta device stands for a GPU here, which fxzero takes for the CPU elsewhere
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fxzero.passes.hand_over_numbers.device_of", lambda step: "meta")
            return hand_over_numbers.run(step)

    assert on_meta(given("constant", ())) == 0
    for kind, shape in (("constant", (2,)), ("batch", (2,))):
        with pytest.raises(PlanError, match=r"%mul.*: expected tensors on meta, got %x on cpu; give the batch on meta"):
            on_meta(given(kind, shape))


@functools.cache
def captured() -> StepGraph:
    """A decoder's step before any pass."""
    model = Decoder(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return capture_step(rehearse(Inventory.of(model, optimizer))[0], None, tokens(0), {}).step


def rewritten(plan: Plan) -> StepGraph:
    """That step after all passes."""
    captured().mesh = dict(plan.axes)
    return recipe(plan, backend="nccl").run(captured())


def test_a_step_in_one_graph_begins_with_its_numbers_and_hands_each_over_once() -> None:
    step = rewritten(Plan(zero=3, mesh={"dp": 2}, cuda_graph=True, lowering="inductor"))
    calls, numbers = step.calls(), numbers_that_change(step)
    handed = step.calls(ops.on_device)
    last = max(calls.index(node) for node in handed)
    begin = calls[: last + 1]
    assert all(n in numbers or n.target in (ops.on_device, aten._to_copy.default) for n in begin)
    assert not any(source in numbers for node in calls[last + 1 :] for source in node.all_input_nodes)
    given = [node.args[0] for node in handed]
    assert len(given) == len({*given}) > 2 * len(step.inputs("parameter"))
    assert str(from_text(str(step))) == str(step)


def test_the_two_parts_of_a_step_are_all_of_it() -> None:
    step = rewritten(Plan(zero=1, mesh={"dp": 2}, cuda_graph=True))
    host, device = split_at_numbers(step)
    names = {node.name for node in (*host.calls(), *device.calls(), *step.calls(ops.on_device))}
    assert names == {node.name for node in step.calls()}
    assert {*host.results, *device.results} == {*step.results, *((NUMBER, n.name) for n in step.calls(ops.on_device))}
    assert {entry.meta["entry"].kind for entry in host.placeholders} == {"hyperparameter", "optimizer"}
    assert device.inputs("coordinate") and not host.inputs("coordinate"), "a coordinate never changes"
    kept = [key for key in host.results if key[0] == "optimizer"]
    assert len(kept) == len(step.inputs("parameter")) and all(host.input(*key) is not None for key in kept)


def test_state_of_the_host_that_nobody_reads_is_an_input_of_its_part() -> None:
    """Its next value is written to it."""
    step = one_call(aten.mul.Tensor, ("x", "a"), {}, torch.zeros(2))
    graph, mode = step.graph, compat.new_fake_mode()
    with graph.inserting_after(step.placeholders[-1]):
        seen = graph.placeholder("seen")
    with graph.inserting_before(step.output):
        made = graph.call_function(aten.scalar_tensor.default, (step.placeholders[3],))
    for node in (seen, made):
        with mode:
            node.meta = {"phase": "update", "module": "", "val": torch.empty(())}
    seen.meta["entry"] = StateEntry("optimizer", "w:seen", (), "w")
    step.set_result("optimizer", "w:seen", made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxzero.graph.host_side.device_of", lambda step: "cuda")
        hand_over_numbers.run(step)
        host, device = split_at_numbers(step)
    assert host.input("optimizer", "w:seen") is not None and device.input("optimizer", "w:seen") is None
