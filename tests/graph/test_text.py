"""The text of a step graph: what it says, that it is stable, and that it reads back as the same graph."""

import dataclasses
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from fxzero import compat
from fxzero.errors import RewriteError
from fxzero.graph import Result, Sharding, StateEntry, StepGraph, ops
from fxzero.graph import collectives as c10d
from fxzero.graph.edit import Editor, coordinate, describe, replace_uses, retype
from fxzero.graph.parse import find_op, from_text
from fxzero.graph.text import op_name, size_text, to_text
from fxzero.graph.type_text import dtype_names
from fxzero.graph.verify import verify
from fxzero.plan import Plan
from fxzero.recipe import recipe

aten = torch.ops.aten


class Tied(nn.Module):
    """An embedding that is the head too, batch normalization, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(62, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 62, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.drop(F.relu(self.norm(self.embed(x))))), y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.mse_loss(x + self.out(mixed.transpose(1, 2).reshape(2, 8, 16)), y)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.max_pool2d(F.gelu(self.norm(self.conv(x))), 2).mean((2, 3)), y)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(62, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.embed(x)), y)


def batch_of(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(model, Attention):
        return torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    if isinstance(model, Images):
        return torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.zeros(2).long()
    return torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.long)


def shard(step: StepGraph, name: str) -> StepGraph:
    """ZeRO-3 over 4 ranks for one parameter, written by hand."""
    step.mesh = {"dp": 4}
    parameter = step.input("parameter", name)
    sharding = Sharding("dp", 4, parameter.meta["entry"].shape[0])
    users = [user for user in parameter.users if user.meta["phase"] == "forward"]
    editor = Editor(step, phase="forward", module=users[0].meta["module"], param=name)
    with editor.before(users[0]):
        waited, full = editor.all_gather(parameter, sharding, stem=name.replace(".", "_"))
    replace_uses(parameter, full, users)
    with editor.after(users[-1]):
        editor.call(ops.release, [waited])
    gradient = step.gradients()[name]
    with Editor(step, phase="backward", param=name).after(gradient) as editor:
        rows = editor.reduce_scatter(gradient, sharding, op="avg", stem=f"{name.replace('.', '_')}_grad")
    replace_uses(gradient, rows, [user for user in gradient.users if user.meta["phase"] == "update"])
    state = [n for n in step.inputs("optimizer") if n.meta["entry"].param == name and n.meta["entry"].shape]
    for node in (parameter, *state):
        node.meta["sharding"] = sharding
        node.meta["val"] = node.meta["val"].new_empty(16, *node.meta["entry"].shape[1:])
    retype(step, (parameter, *state))
    for node in step.phase("update"):
        if node.meta.get("param") == name and getattr(node.meta["val"], "shape", ()):
            node.meta["sharding"] = sharding
    return step


def blank(**inputs: torch.Tensor) -> Editor:
    """An editor at the end of a graph without calls; its inputs are batch entries."""
    step = StepGraph(fx.Graph(), {"dp": 4, "tp": 2})
    mode = compat.new_fake_mode()
    for name, value in inputs.items():
        node = step.graph.placeholder(name)
        entry = StateEntry("batch", name, tuple(value.shape))
        node.meta = {"entry": entry, "val": compat.fake_like(mode, value), "phase": "forward", "module": ""}
    step.graph.output(()).meta["results"] = ()
    return Editor(step, phase="forward")


def end(editor: Editor, **results: fx.Node) -> StepGraph:
    editor.step.set_results({("metric", name): node for name, node in results.items()})
    return editor.step


def seen(step: StepGraph) -> list[object]:
    """Everything that a graph says, but for what scalars stand at and names that nothing reads."""
    found: list[object] = [step.mesh, step.title, step.facts, step.output.meta["results"]]
    names = {node: node.name for node in step.graph.nodes}
    for node in step.graph.nodes:
        meta = {key: value for key, value in node.meta.items() if key not in ("val", "results")}
        defaults = getattr(getattr(node.target, "_schema", None), "arguments", ())
        given = {a.name: a.default_value for a in defaults if a.kwarg_only} | node.kwargs
        target = node.target if node.op == "call_function" else node.op
        args = fx.map_arg((node.args, given), lambda n: f"%{names[n]}")
        found.append((node.name if node.users else "", target, str(args), describe(node.meta.get("val")), meta))
    return found


def check_round_trip(step: StepGraph) -> None:
    text = to_text(step)
    back = from_text(text)
    assert to_text(back) == text
    assert seen(back) == seen(step)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "rprop": lambda p: torch.optim.Rprop(p),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", [Tied, Attention, Images])
def test_a_captured_step_reads_back(model, optimizer, capture) -> None:
    module = model()
    step = capture(module, OPTIMIZERS[optimizer](module.parameters()), *batch_of(module))
    check_round_trip(step)
    verify(from_text(to_text(step)))


@pytest.mark.parametrize("backend", ["fake", "gloo"])
def test_a_rewritten_step_reads_back(backend, capture) -> None:
    """What passes put into meta must stand in the text, or ranks would not agree on it."""
    model = Attention()
    step = capture(model, torch.optim.AdamW(model.parameters()), *batch_of(model))
    step.mesh = {"dp": 4}
    step = recipe(Plan(zero=3, mesh={"dp": 4}, bucket_bytes=2000), backend=backend).run(step)
    check_round_trip(step)
    verify(from_text(to_text(step)))


@pytest.mark.parametrize("reductions", ["int8", "powersgd", "topk"])
def test_a_compressed_step_reads_back(reductions, capture) -> None:
    model = Attention()
    step = capture(model, torch.optim.AdamW(model.parameters()), *batch_of(model))
    plan = Plan(mesh={"dp": 4}, compress_gathers="fp8", compress_reductions=reductions, compress_below=200)
    step.mesh = dict(plan.axes)
    step = recipe(plan, backend="gloo").run(step)
    check_round_trip(step)
    verify(from_text(to_text(step)))


def test_two_captures_have_one_text(capture) -> None:
    texts = set()
    for seed in range(2):
        torch.manual_seed(seed)
        model = Tied()
        texts.add(to_text(capture(model, torch.optim.AdamW(model.parameters()), *batch_of(model))))
    assert len(texts) == 1


@pytest.mark.slow
def test_two_processes_have_one_text() -> None:
    program = (
        "import torch; from torch import nn; from fxzero.capture import *; m = nn.Linear(4, 1); "
        "o = torch.optim.SGD(m.parameters(), momentum=0.9, lr=0.1); x = torch.ones(2, 4); "
        "m(x).sum().backward(); o.step(); "
        "print(capture_step(Inventory.of(m, o), lambda m, x: (m(x).sum(), {'a': x.sum()}), (x,), {}).step)"
    )
    texts = set()
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        texts.add(done.stdout)
    assert len(texts) == 1
    check_round_trip(from_text(texts.pop()))


def test_golden_captured_step(capture, golden) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    loss_of = nn.Module()
    loss_of.add_module("net", model)
    loss_of.forward = lambda x, y: F.mse_loss(model(x), y)
    optimizer = torch.optim.SGD(loss_of.parameters(), lr=0.1, momentum=0.9)
    step = capture(loss_of, optimizer, torch.ones(3, 4), torch.ones(3, 2))
    check_round_trip(step)
    golden("graph/captured_step", to_text(step))


def sharded(capture) -> StepGraph:
    model = Small()
    optimizer = torch.optim.Adagrad(model.parameters())
    step = shard(capture(model, optimizer, *batch_of(model)), "embed.weight")
    step.title, step.facts = "zero 3 | after shard", frozenset({"parameters-sharded", "captured"})
    return step


def test_golden_sharded_step(capture, golden) -> None:
    step = sharded(capture)
    verify(step)
    check_round_trip(step)
    golden("graph/sharded_step", to_text(step))


def test_an_update_placed_under_backward_is_marked_there(capture) -> None:
    step = sharded(capture)
    before = to_text(step)
    update = next(n for n in step.phase("update") if n.meta["param"] == "head.bias")
    step.gradients()["head.bias"].append(update)
    step.graph.lint()
    check_round_trip(step)
    after = to_text(step)
    assert f"\nu %{update.name} " in after
    assert after.count("\nu ") == 1 and "# first column: " in after and "# first column: " not in before
    changed = {" ".join(line.split()) for line in before.splitlines()}
    changed ^= {" ".join(line.split()) for line in after.splitlines()}
    assert len(changed) == 3  # the line without and with its mark, the legend: no heading, no other node
    late = step.phase("backward")[-1]
    step.phase("update")[3].append(late)
    check_round_trip(step)
    assert to_text(step).index(f"%{late.name} ") < to_text(step).index("\nupdate\n")


def test_the_parts_of_a_line(capture) -> None:
    text = to_text(sharded(capture))
    squeezed = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "%embed_weight f32[62/dp, 16] parameter embed.weight",
        "%embed_weight_sum f32[62/dp, 16] optimizer embed.weight:sum",
        "%head_bias f32[4] parameter head.bias",
        "%groups_0_lr float hyperparameter groups.0.lr",
        "%args_0 i64[8] batch args.0",
        "%embed_weight_gather f32[64, 16] all_gather %embed_weight dp, 4.0 KiB # embed; for embed.weight",
        "%embed_weight_full f32[64, 16] wait %embed_weight_gather # embed; for embed.weight",
        "%embed_weight_rows f32[62, 16] slice.Tensor %embed_weight_full, 0, 0, 62 # embed; for embed.weight",
        "release %embed_weight_full # embed; for embed.weight",
        "%t f32[16, 4]{1,16} t %head_weight # head",
        "%embed_weight_grad_reduce f32[62/dp, 16] reduce_scatter %constant_pad_nd_default avg dp, 4.0 KiB"
        " # for embed.weight",
        "# facts: captured, parameters-sharded",
    ):
        assert line in squeezed
    assert squeezed[0].startswith("# zero 3 | after shard | mesh dp=4 | cpu | ")
    assert squeezed[0].endswith(" results, 1 collective forward, 1 backward")


def test_columns_line_up(capture) -> None:
    lines = to_text(sharded(capture)).splitlines()
    forward = lines[lines.index("forward") + 1 : lines.index("backward")]
    comments = {line.rindex(" # ") for line in forward if " # " in line}
    assert len(comments) == 1
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes(size, text) -> None:
    assert size_text(size) == text


def test_every_dtype_has_a_name_of_its_own() -> None:
    names = dtype_names()
    assert len(set(names.values())) == len(names)
    assert [names[d] for d in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)] == [
        "f32",
        "bf16",
        "i64",
        "u8",
        "bool",
    ]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.mm.default, "mm"),
        (aten.add.Tensor, "add.Tensor"),
        (aten.mul.Tensor, "mul.Tensor"),
        (operator.mul, "py.mul"),
        (operator.getitem, "getitem"),
        (torch.sym_max, "py.torch.sym_max"),
        (torch.ops.prims.convert_element_type.default, "prims::convert_element_type"),
        (c10d.all_gather_coalesced, "all_gather_coalesced"),
        (c10d.wait, "wait"),
        (ops.local_shard, "local_shard"),
    ],
)
def test_op_names_lead_back_to_the_op(target, name) -> None:
    assert op_name(target) == name
    assert find_op(name) is target


def test_short_names_hide_no_op_of_aten() -> None:
    for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "release", "local_shard", "getitem"):
        assert not hasattr(aten, name)


@pytest.mark.parametrize("name", ["py.eval", "py.torch.load", "py.builtins.eval", "py.attrgetter.mro", "mm.mro"])
def test_a_text_cannot_name_any_function_it_likes(name) -> None:
    with pytest.raises(RewriteError, match="op: expected an op that torch or fxzero knows"):
        find_op(name)


def test_arguments_of_every_kind_read_back() -> None:
    at = blank(x=torch.ones(2, 3), mask=torch.ones(2, 3) > 0, image=torch.ones(1, 3, 4, 4), i=torch.zeros(2).long())
    x, mask, image, i = at.step.placeholders
    with at.before(at.step.output):
        made = [
            at.call(aten.full.default, [2], float("inf"), dtype=torch.bfloat16, device=torch.device("cpu")),
            at.call(aten.full.default, [2], float("nan"), layout=torch.strided, pin_memory=False),
            at.call(aten.full.default, [], 1 - 2j, dtype=torch.complex64),
            at.call(aten.masked_fill.Scalar, x, mask, float("-inf")),
            at.call(aten.clamp.default, x, None, 1e-30),
            at.call(aten.index.Tensor, x, [None, i]),
            at.call(aten.gelu.default, x, approximate="tanh"),
            at.call(aten.cat.default, (x, x), 1),
            at.call(aten._to_copy.default, image, dtype=torch.float16, memory_format=torch.channels_last),
            at.call(aten.split_with_sizes.default, x, [1, 2], 1),
            at.call(aten.sum.dim_IntList, x, [], True, dtype=torch.float64),
            at.call(operator.getitem, aten_pair(at, x), 0),
        ]
        at.call(aten._assert_async.msg, mask, 'it\'s a "test" # of %x, [1] \\ \n\u01c2')
    step = end(at, **{f"m{index}": node for index, node in enumerate(made)})
    check_round_trip(step)
    text = to_text(step)
    for part in (
        "full  ",
        " [2], inf, dtype=bf16, device=cpu\n",
        " [2], nan, layout=strided, pin_memory=False\n",
        " [], 1-2j, dtype=c64\n",
        " %x, %mask, -inf\n",
        " %x, None, 1e-30\n",
        " %x, [None, %i]\n",
        " %x, approximate='tanh'\n",
        " dtype=f16, memory_format=channels_last\n",
        "f16[1, 3, 4, 4]{48,1,12,3}",
        "(f32[2, 1]{3,1}, f32[2, 2]{3,1})",
    ):
        assert part in text


def aten_pair(at: Editor, x: fx.Node) -> fx.Node:
    return at.call(aten.max.dim, x, 0)


def test_arguments_at_their_default_are_left_out() -> None:
    at = blank(x=torch.ones(2))
    (x,) = at.step.placeholders
    with at.before(at.step.output):
        node = at.call(aten.add.Tensor, x, x, alpha=1)
        other = at.call(aten.add.Tensor, x, x, alpha=1.0)
        copy = at.call(aten._to_copy.default, x, dtype=torch.float16, non_blocking=False, memory_format=None)
    text = to_text(end(at, a=node, b=other, c=copy))
    assert text.count("alpha") == 1 and "alpha=1.0" in text
    assert "%x, dtype=f16\n" in text
    assert to_text(from_text(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12), st.floats(), st.lists(st.integers(min_value=0), max_size=3))
def test_any_string_name_and_number_reads_back(message, module, number, shape) -> None:
    at = blank(x=torch.ones(2))
    (x,) = at.step.placeholders
    at.meta |= {"module": module, "param": message}
    x.meta["entry"] = StateEntry("batch", message, tuple(shape), module or None)
    with at.before(at.step.output):
        at.call(aten._assert_async.msg, x, message)
        full = at.call(aten.mul.Tensor, x, number)
    full.meta |= {"grad_of": (message, module), "algorithm": message}
    step = end(at)
    step.set_results({("metric", message): full})
    step.title, step.facts = message, frozenset({module, "a"})
    text = to_text(step)
    back = from_text(text)
    assert to_text(back) == text
    assert seen(back) == seen(step)


def test_collectives_of_every_kind_read_back() -> None:
    at = blank(x=torch.ones(16, 2), y=torch.ones(8, dtype=torch.bfloat16), z=torch.ones(8, dtype=torch.bfloat16))
    x, y, z = at.step.placeholders
    half = Sharding("tp", 2, 15)
    with at.before(at.step.output):
        waited = [
            at.call(c10d.wait, node)
            for node in (
                at.call(c10d.all_reduce, x, "sum", "tp"),
                at.call(c10d.all_gather, x, 8, "dp"),
                at.call(c10d.all_to_all, x, [4] * 4, [4] * 4, "dp"),
                at.call(c10d.all_gather, x, group_size=4, group_name="dp"),
                at.call(c10d.shift, x, 1, 4, coordinate(at.step, "dp"), "dp"),
            )
        ]
        pair = at.call(c10d.all_gather_coalesced, [y, z], 2, "tp")
        waited += [at.call(c10d.wait, at.call(operator.getitem, pair, index)) for index in range(2)]
        sums = at.call(c10d.reduce_scatter_coalesced, [y, z], "avg", 4, "dp", sharding=Sharding("dp", 4, 7))
        waited += [at.call(c10d.wait, at.call(operator.getitem, sums, index)) for index in range(2)]
        waited += [at.local_shard(x, half, stem="own"), at.call(aten.mul.Tensor, x, 2, sharding=half)]
        at.call(ops.release, waited[:2])
    step = end(at, **{f"m{index}": node for index, node in enumerate(waited)})
    text = to_text(step)
    for part in (
        " %x sum tp, 128 B\n",
        " %x group_size=8 dp, 1.0 KiB\n",
        " %x [4, 4, 4, 4] [4, 4, 4, 4] dp, 128 B\n",
        " %x dp, 512 B\n",
        " shift %x 1 %dp_index dp, 128 B\n",
        "(bf16[16] x2)",
        " [%y, %z] tp, 64 B\n",
        " [%y, %z] avg dp, 32 B  # shard 7/dp\n",
        "release  ",
        " %wait_tensor_default, %wait_tensor_default_1\n",
        "f32[15/tp:2, 2]",
        "# shard 15/tp:2\n",
        "  %tp_index  int  ",
        "mesh dp=4 tp=2",
        "7 collectives forward",
    ):
        assert re.sub(" +", " ", part) in re.sub(" +", " ", text), part
    back = from_text(text)
    assert to_text(back) == text
    gathers = [node.args for node in back.calls(c10d.all_gather)]
    assert [args[1:] for args in gathers] == [(8, "dp"), (4, "dp")]
    assert back.calls(ops.release)[0].args[0] == back.calls(c10d.wait)[:2]


def test_inputs_of_every_kind_read_back() -> None:
    at = blank(
        plain=torch.ones(2, 3),
        turned=torch.ones(3, 2).t(),
        expanded=torch.ones(1).expand(4),
        empty=torch.ones(0, 3),
        one=torch.empty_strided((1, 3), (7, 1)),
        away=torch.ones(2, device="meta"),
    )
    for node, kind, name, param in zip(
        at.step.placeholders,
        ("parameter", "buffer", "optimizer", "constant", "constant", "optimizer"),
        ("a b.weight", "it's", "w:step", "c_0", "c_1", "lonely"),
        (None, None, "w", None, None, "some w"),
        strict=True,
    ):
        node.meta["entry"] = dataclasses.replace(node.meta["entry"], kind=kind, name=name, param=param)
    plain, turned, *_ = at.step.placeholders
    plain.meta["sharding"] = Sharding("dp", 4, 5)
    plain.meta["entry"] = dataclasses.replace(plain.meta["entry"], shape=(5, 3))
    turned.meta["entry"] = dataclasses.replace(turned.meta["entry"], shape=(8, 3))
    coordinate(at.step, "tp")
    step = end(at, same=plain)
    check_round_trip(step)
    text = to_text(step)
    for part in (
        "f32[5/dp, 3]  parameter  'a b.weight'\n",
        'f32[2, 3]{1,2}  buffer  "it\'s"  # whole [8, 3]\n',
        "f32[4]{0}  optimizer  w:step\n",
        "f32[0, 3]  constant  c_0\n",
        "f32[1, 3]{7,1}  constant  c_1\n",
        "f32[2]@meta  optimizer  lonely  # state of 'some w'\n",
        "int  coordinate  tp\n",
        "%plain  -> metric  same\n",
    ):
        assert re.sub(" +", " ", part) in re.sub(" +", " ", text)


def test_a_device_loses_its_index() -> None:
    at = blank()
    with at.before(at.step.output):
        full = at.call(aten.full.default, [2], 1.0, device=torch.device("cuda", 0))
    text = to_text(end(at, full=full))
    assert "f32[2]@cuda" in text and "device=cuda\n" in text
    assert to_text(from_text(text)) == text


def test_a_value_that_cannot_be_read_back_is_refused_when_read() -> None:
    at = blank(x=torch.ones(2))
    with at.before(at.step.output):
        node = at.call(operator.getitem, at.step.placeholders[0], slice(0, 1))
    text = to_text(end(at, out=node))
    assert "%x, <slice>" in text
    with pytest.raises(RewriteError, match=r"line 5 .* arguments: expected names, .* got '%x, <slice>'"):
        from_text(text)


def test_no_name_of_a_line_is_taken_by_one_that_has_none() -> None:
    at = blank(x=torch.ones(2))
    (x,) = at.step.placeholders
    with at.before(at.step.output):
        at.call(ops.release, [x])
        later = [at.call(aten.neg.default, x, name=f"release_{index}") for index in range(8)]
    check_round_trip(end(at, **{node.name: node for node in later}))


def test_colors_change_nothing_but_colors(capture) -> None:
    step = sharded(capture)
    colored = to_text(step, color=True)
    assert "\x1b[36mall_gather" in colored
    assert re.sub(r"\x1b\[\d*m", "", colored) == to_text(step)
    assert to_text(from_text(colored)) == to_text(step)


def test_some_phases_only(capture) -> None:
    step = sharded(capture)
    text = to_text(step, phases=("update", "results"))
    assert text.splitlines()[0].endswith(" | only update, results")
    assert [line for line in text.splitlines() if not line.startswith((" ", "#"))] == ["update", "results"]
    assert text[text.index("\nupdate\n") :] == to_text(step)[to_text(step).index("\nupdate\n") :]
    with pytest.raises(RewriteError, match="expected a whole text, got one marked 'only update, results'"):
        from_text(text)


def test_width_cuts_comments_only(capture) -> None:
    step = sharded(capture)
    text = to_text(step, width=120)
    whole = to_text(step).splitlines()
    for cut, line in zip(text.splitlines()[1:], whole[1:], strict=True):
        assert cut.partition(" # ")[0] == line.partition(" # ")[0]
        assert len(cut) <= max(120, line.rfind("# ") + 14, 0 if "# " in line else len(line))
    assert "..." in text
    with pytest.raises(RewriteError, match="got one marked 'cut at 120'"):
        from_text(text)


TEXT = """\
# by hand | mesh dp=4 | cpu | 3 inputs, 5 nodes, 2 results, 1 collective forward
inputs
  %w   f32[6/dp, 3]  parameter       a.w
  %lr  float         hyperparameter  groups.0.lr
  %x   f32[2, 8]     batch           args.0
forward
  %g    f32[8, 3]  all_gather  %w dp, 96 B      # a; for a.w
  %f    f32[8, 3]  wait        %g               # a; for a.w
  %mm   f32[2, 3]  mm          %x, %f           # a
                   release     %f               # a
update
  %neg  float      py.neg      %lr
results
  %mm  -> metric     out
  %w   -> parameter  a.w
"""


def test_the_text_by_hand_has_no_fault() -> None:
    text = to_text(from_text(TEXT))
    assert text.split() == TEXT.split()
    assert from_text(text).output.meta["results"] == (Result("metric", "out"), Result("parameter", "a.w"))


def test_counts_may_be_left_to_the_reader() -> None:
    text = re.sub(r" \| 3 inputs.*", "", TEXT)
    assert to_text(from_text(text)) == to_text(from_text(TEXT))


FAULTS = {
    "no header": (
        ("# by hand | mesh dp=4 | cpu | ", "# by hand, "),
        "line 1 .*: header: expected one such as '# captured",
    ),
    "empty": ((TEXT, ""), "end of text: expected a header, got the last line; give the whole text"),
    "cut off": ((TEXT[TEXT.index("results\n ") :], ""), "end of text: expected a section 'results'"),
    "a result lost": (("  %w   -> parameter  a.w\n", ""), "expected 2 results, as the header says, got 1; restore"),
    "a node lost": (("  %neg  float      py.neg      %lr\n", ""), "expected 5 nodes, as the header says, got 4"),
    "no heading": (("inputs\n", ""), "line 2 '%w f32.*': line: expected .*, got the heading ''; headings: inputs"),
    "inputs after calls": (
        ("update\n", "inputs\n"),
        "heading: expected the order inputs, .* got 'inputs' after 'forward'",
    ),
    "after results": (("  %w   -> parameter", "update\n  %w   -> parameter"), "got 'update' after 'results'"),
    "input form": (("parameter       a.w", "parameter"), "line 3 .*: input: expected '  %name  type  kind  name'"),
    "input kind": (("batch ", "bunch "), "line 5 '%x .*': input: .* got kind 'bunch'; kinds: parameter, buffer"),
    "input dtype": (("%w   f32", "%w   f31"), r"type: expected one such as f32\[62/dp, 16\], .* got 'f31\[6/dp, 3\]'"),
    "input size": (("f32[2, 8] ", "f32[2, n] "), r"type: expected one such as .*, got 'f32\[2, n\]'"),
    "input strides": (
        ("f32[2, 8] ", "f32[2, 8]{8} "),
        r"type: expected a tensor that torch can make, got 'f32\[2, 8\]\{8\}'",
    ),
    "input device": (
        ("f32[2, 8] ", "f32[2, 8]@gpu "),
        r"type: expected a tensor that torch can make, got 'f32\[2, 8\]@gpu'",
    ),
    "sharding axis": (("6/dp", "6/tp"), r"line 3 .*: mesh: expected an axis of the header's \(dp\), got 'tp'"),
    "collective axis": (("%w dp,", "%w tp,"), r"line 7 .*: mesh: expected an axis of the header's \(dp\), got 'tp'"),
    "collective form": (
        ("%w dp, 96 B", "%w, 96 B"),
        "line 7 .*: arguments: expected input group_name, bytes, got '%w, 96 B'",
    ),
    "name twice": (("%mm   f32", "%g   f32"), "line 9 .*: name: expected each name once, got %g again"),
    "name of Python's": (("%neg ", "%sum "), "name: expected a name that FX keeps, got %sum; write %sum_1"),
    "no name": (("%mm   f32[2, 3]", ""), "line 9 .*: line: expected a name and a type, got neither for 'mm'"),
    "no such node": (("%x, %f", "%x, %ff"), "line 9 .*: arguments: expected a node of a line above, got %ff"),
    "node below": (("mm          %x, %f", "mm          %x, %neg"), "expected a node of a line above, got %neg"),
    "no such op": (
        ("mm          ", "nm          "),
        "line 9 .*: op: expected an op that torch or fxzero knows, got 'nm'; did you",
    ),
    "no such overload": (("mm          ", "mm.Tensor   "), "op: expected an op .* got 'mm.Tensor'"),
    "open list": (("%x, %f ", "[%x, %f "), r"arguments: expected names, numbers, words and lists, got '\[%x, %f'"),
    "open quote": (("%x, %f ", "%x, 'f "), "line 9 .*: line: expected"),
    "two calls": (("%x, %f ", "%x) + g(%f "), "remove the . too many"),
    "an expression": (
        ("%x, %f ", "%x, 1 + 2 "),
        "expected names, numbers, words and lists, got '1 . 2'; write plain values",
    ),
    "a call": (("%x, %f ", "%x, exit() "), r"expected names, numbers, words and lists, got 'exit\(\)'"),
    "a word": (("%x, %f ", "%x, sum "), "expected a dtype, memory format, layout or device, got 'sum'; quote it"),
    "wrong type": (
        ("%mm   f32[2, 3]", "%mm   f32[2, 4]"),
        r"line 9 .*: type: expected f32\[2, 3\], which the line yields, got f32\[2, 4\]",
    ),
    "wrong dtype": (("%f    f32", "%f   bf16"), r"type: expected f32\[8, 3\], which the line yields, got bf16"),
    "tensor as number": (
        ("%mm   f32[2, 3]", "%mm   float"),
        r"type: expected f32\[2, 3\], which the line yields, got float",
    ),
    "wrong shapes": (("%x, %f ", "%f, %x "), "line 9 .*: arguments: expected what the op takes, got .*Error: "),
    "too few": (("%x, %f ", "%x "), "line 9 .*: arguments: expected what the op takes, got RuntimeError: .*missing"),
    "comment": (("# a; for a.w\n  %f", "# a; about a.w\n  %f"), "comment: expected a module, .* got 'about a.w'"),
    "result form": (
        ("%mm  -> metric     out", "%mm metric out"),
        "line 14 .*: result: expected '  %name  -> kind  name', got another form",
    ),
    "result of nothing": (("%mm  ->", "%nn  ->"), "result: .* got %nn, which no line defines"),
    "result twice": (("parameter  a.w\n", "metric  out\n"), "result: expected each result once, got metric out again"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_text_is_named_with_its_line(fault) -> None:
    (old, new), message = FAULTS[fault]
    assert TEXT.count(old) == 1
    with pytest.raises(RewriteError, match=message) as caught:
        from_text(TEXT.replace(old, new))
    assert "\n" not in str(caught.value)
    assert None not in (caught.value.expected, caught.value.got, caught.value.fix)


def test_a_golden_text_that_differs_fails_with_a_diff(golden, capture) -> None:
    strict = dataclasses.replace(golden, accept=False)
    text = to_text(sharded(capture))
    with pytest.raises(pytest.fail.Exception) as caught:
        strict("graph/sharded_step", text.replace("all_gather  ", "all_reduce  "))
    message = str(caught.value)
    assert "pytest --accept 'tests/graph/test_text.py::test_a_golden" in message
    assert message.count("\n-  ") == 1 and message.count("\n+  ") == 1 and "all_reduce" in message
    with pytest.raises(pytest.fail.Exception, match=r"\n\+\s+release"):
        strict("graph/sharded_step", text.replace("  release", "    release"))


def test_a_golden_text_that_does_not_exist_fails(golden, tmp_path) -> None:
    strict = dataclasses.replace(golden, folder=tmp_path, accept=False)
    with pytest.raises(pytest.fail.Exception, match="does not exist; to accept"):
        strict("a/new", "text\n")
    dataclasses.replace(strict, accept=True)("a/new", "text\n")
    strict("a/new", "text\n")
