"""The command line, called in this process: what each command prints, and what it refuses in which words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fxzero
from fxzero import pass_manager
from fxzero.cli import main
from fxzero.cli.diff import changed_lines, op_table
from fxzero.cli.target import load_target
from fxzero.cli.usage import UsageError
from fxzero.graph.parse import from_text
from fxzero.graph.text import to_text
from fxzero.recipe import ALL_PASSES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "llama_meta.py"

TINY = '''
"""Steps to look at."""
import torch
from torch import nn

from neighbour import WIDTH


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x, scale=1.0):
        return self.lin(x).square().mean() * scale


def step(batch=None, device="meta", width=WIDTH, **options):
    with torch.device(device):
        model = Model(width)
        x = torch.zeros(2, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    return model, optimizer, (x,) if batch is None else batch(x)


def real():
    return step(device="cpu")


def single():
    return step(batch=lambda x: x)


def named():
    return step(batch=lambda x: {"x": x})


def scaled():
    return step(batch=lambda x: (x, 0.5))


def huge():
    return step(width=2**20)


def first_step():
    return step(dampening=0.5)


def with_loss():
    model, optimizer, (x,) = step()
    return model, optimizer, (x,), lambda model, x: model.lin(x).abs().mean()


def raises():
    raise ValueError("no such\\ndata")


def leaves():
    raise SystemExit("usage: train.py")


def needs(width):
    return step(width=width)


def two():
    return step()[:2]


def list_of_three():
    return list(step())


def model_class():
    return Model, *step()[1:]


def swapped():
    model, optimizer, batch = step()
    return model, batch, optimizer


def number_as_loss():
    return *step(), 3


def no_scalar():
    model, optimizer, batch = step()
    return model, optimizer, batch, lambda model, x: model.lin(x)


CONSTANT = 3
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of targets; "file:function" names one."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "tiny.py").write_text(TINY)
    (folder / "neighbour.py").write_text("WIDTH = 16\n")
    (folder / "broken.py").write_text("def step(:\n")
    return str(folder / "tiny.py")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`call(*argv)` is (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def printed(call: Call) -> Callable[..., str]:
    """`printed(*argv)` is what a command that succeeds in silence prints."""

    def run(*argv: str) -> str:
        code, out, err = call(*argv)
        assert (code, err) == (0, "")
        return out

    return run


# ---- dump


def test_dump_is_the_readable_program(printed, golden, tiny) -> None:
    out = printed("dump", f"{tiny}:step", "--world", "4", "--zero", "3", "--quiet")
    golden("cli/dump", out)
    assert to_text(from_text(out)) == out


def test_dump_in_low_precision_with_clipping(printed, golden, tiny) -> None:
    keys = ("--precision", "bf16", "--keep-fp32", "head,*.norm", "--clip-grad-norm", "0.5", "--clip-grad-norm-p", "inf")
    out = printed("dump", f"{tiny}:step", "--world", "4", *keys, "--quiet")
    golden("cli/dump_bf16_clipped", out)
    assert to_text(from_text(out)) == out
    assert "bf16[16/dp, 16]" in out and "%grad_norm_local max dp, 4 B" in out


def test_dump_says_which_calls_are_compiled_together(printed, tiny) -> None:
    text = printed("dump", f"{tiny}:step", "--world", "2", "--lowering", "inductor", "--quiet")
    numbers = [int(number) for number in re.findall(r"; region (\d+)$", text, flags=re.MULTILINE)]
    assert numbers == sorted(numbers) and set(numbers) == set(range(max(numbers) + 1))
    assert "region" not in printed("dump", f"{tiny}:step", "--world", "2", "--quiet")


def test_dump_with_a_loss_scale(printed, golden, tiny) -> None:
    keys = ("--precision", "fp16", "--loss-scale", "dynamic", "--accumulate", "2")
    out = printed("dump", f"{tiny}:step", "--world", "4", *keys, "--quiet")
    golden("cli/dump_fp16_scaled", out)
    assert to_text(from_text(out)) == out
    assert re.search("auxiliary +scaler.scale", out) and re.search("-> auxiliary +scaler.scale", out)
    assert re.search(r"%overflow_reduce +f32\[2\] +all_reduce +%stack max dp, 8 B", out)


def test_dump_shows_each_program_of_a_step_of_microbatches(printed, call, tiny) -> None:
    keys = ("dump", f"{tiny}:step", "--world", "4", "--accumulate", "3", "--quiet")
    first, middle, last = (printed(*keys, "--microbatch", index) for index in ("0", "1", "2"))
    assert printed(*keys) == last
    assert "-> accumulated" in first and "-> parameter" not in first and "  accumulated  " not in first
    assert "-> accumulated" in middle and "  accumulated  " in middle and "-> parameter" not in middle
    assert "-> accumulated" not in last and "  accumulated  " in last and "-> parameter" in last
    assert [to_text(from_text(out)) for out in (first, middle, last)] == [first, middle, last]
    code, _, err = call(*keys, "--microbatch", "3")
    assert code == 2 and "--microbatch: expected one of the step's 3 microbatches, got 3; choose from 0 to 2" in err


def test_dump_says_on_stderr_what_it_does(call, tiny) -> None:
    code, out, err = call("dump", f"{tiny}:step", "--world", "4")
    assert code == 0 and out.startswith("# after place_updates | mesh dp=4")
    lines = err.splitlines()
    for words in ("tiny.py:step", "optimizer state of 272 parameters", "capture forward", "pass shard_parameters"):
        assert sum(words in line for line in lines) == 1
    assert all(re.search(r" \d+\.\d\d s, peak [\d,]+ MiB$", line) for line in lines)


def test_dump_before_any_pass_needs_no_world(printed, tiny) -> None:
    out = printed("dump", f"{tiny}:step", "--after", "capture", "--quiet")
    assert out.startswith("# captured | mesh dp=1 | cpu |") and "no collectives" in out


def test_dump_after_a_pass_runs_none_behind_it(call, tiny) -> None:
    code, out, err = call("dump", f"{tiny}:step", "--world", "4", "--after", "shard_gradients")
    assert code == 0 and out.startswith("# after shard_gradients |")
    assert "pass shard_gradients" in err and "pass shard_parameters" not in err


def test_dump_of_one_phase(printed, tiny) -> None:
    target = ("dump", f"{tiny}:step", "--world", "4", "--quiet")
    headings = [line for line in printed(*target, "--phase", "backward").splitlines() if line[0] not in "# fbu"]
    assert headings == []
    out = printed(*target, "--after", "shard_parameters", "--phase", "forward", "--phase", "update")
    assert [line for line in out.splitlines() if line in ("inputs", "forward", "backward", "update", "results")] == [
        "forward",
        "update",
    ]


def test_dump_as_json_parses(printed, tiny) -> None:
    found = json.loads(printed("dump", f"{tiny}:step", "--world", "4", "--format", "json", "--quiet"))
    text = printed("dump", f"{tiny}:step", "--world", "4", "--quiet")
    assert found["title"] == "after place_updates" and found["mesh"] == {"dp": 4}
    assert all(f"%{node['name']} " in text for node in found["nodes"] if node["kind"] != "release")
    assert {node["kind"] for node in found["nodes"]} == {"state", "compute", "collective", "wait", "release"}


def test_dump_as_dot_is_balanced_and_draws_every_edge_between_nodes(printed, tiny) -> None:
    out = printed("dump", f"{tiny}:step", "--world", "4", "--format", "dot", "--quiet")
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", out)
    assert '"' not in bare
    for opening, closing in ("{}", "[]"):
        assert bare.count(opening) == bare.count(closing) > 0
    drawn = set(re.findall(r'^ {4}("[^"]+") \[', out, flags=re.MULTILINE))
    edges = re.findall(r'^ {2}("[^"]+") -> ("[^"]+");$', out, flags=re.MULTILINE)
    assert edges and {end for edge in edges for end in edge} <= drawn


def test_dump_as_report(printed, tiny) -> None:
    out = printed("dump", f"{tiny}:step", "--world", "4", "--format", "report", "--quiet")
    for words in ("zero 3 on dp=4", "predicted peak", "all_gather", "shard_parameters", "compiled in"):
        assert words in out
    assert "zero 3 on dp=4" in printed(
        "dump", f"{tiny}:step", "--world", "4", "--format", "report", "--after", "capture", "--quiet"
    )


def test_dump_into_a_file(printed, tiny, tmp_path) -> None:
    path = tmp_path / "step.txt"
    assert printed("dump", f"{tiny}:step", "--world", "4", "--quiet", "--out", str(path)) == ""
    assert path.read_text() == printed("dump", f"{tiny}:step", "--world", "4", "--quiet")


def test_dump_verifies_unless_told_not_to(printed, tiny, monkeypatch) -> None:
    calls = []
    verify = pass_manager.verify
    monkeypatch.setattr(pass_manager, "verify", lambda *args, **keys: calls.append(1) or verify(*args, **keys))
    printed("dump", f"{tiny}:step", "--world", "4", "--quiet", "--no-verify")
    assert not calls
    printed("dump", f"{tiny}:step", "--world", "4", "--quiet")
    assert calls


def test_a_broken_pass_is_an_error_in_one_line(call, tiny, monkeypatch) -> None:
    def break_it(step):
        step.graph.erase_node(next(n for n in reversed(step.calls()) if not n.users))
        raise RuntimeError("out of\nluck")

    (place,) = (p for p in ALL_PASSES if p.name == "remove_dead_nodes")
    monkeypatch.setitem(place.__dict__, "run", break_it)
    code, out, err = call("dump", f"{tiny}:step", "--world", "4", "--quiet")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("fxzero: pass 'remove_dead_nodes': expected a graph that it can rewrite, got")


# ---- targets


@pytest.mark.parametrize("name", ["real", "single"])
def test_other_ways_to_give_the_same_step(printed, tiny, name) -> None:
    same = printed("dump", f"{tiny}:step", "--world", "4", "--quiet")
    assert printed("dump", f"{tiny}:{name}", "--world", "4", "--quiet") == same


def test_a_batch_by_name_and_one_with_a_number(printed, tiny) -> None:
    assert re.search(r"batch +kwargs\.x\n", printed("dump", f"{tiny}:named", "--world", "4", "--quiet"))
    assert re.search(r"mul\.Tensor +%\w+, 0\.5\n", printed("dump", f"{tiny}:scaled", "--world", "4", "--quiet"))


def test_a_loss_of_its_own(printed, tiny) -> None:
    out = printed("dump", f"{tiny}:with_loss", "--after", "capture", "--quiet")
    assert " abs " in out and " pow.Tensor_Scalar " not in out


def test_a_first_step_that_is_special_is_shown(printed, tiny) -> None:
    usual = printed("dump", f"{tiny}:step", "--after", "capture", "--quiet")
    special = printed("dump", f"{tiny}:first_step", "--after", "capture", "--quiet")
    # Named where it is an input, and again where it is read: the first step only writes it.
    assert [out.count("%lin_weight_momentum_buffer ") for out in (usual, special)] == [1, 1]
    assert [out.count("%lin_weight_momentum_buffer,") for out in (usual, special)] == [1, 0]
    assert "-> optimizer  lin.weight:momentum_buffer" in special


def test_terabytes_of_parameters_take_no_memory(printed, tiny) -> None:
    out = printed("dump", f"{tiny}:huge", "--world", "64", "--quiet")
    assert "f32[1048576/dp, 1048576]" in out


def test_loading_leaves_the_import_path_as_it_was(tiny) -> None:
    before = list(sys.path)
    target = load_target(f"{tiny}:step")
    assert sys.path == before
    assert target.args[0].device.type == "cpu" and next(target.model.parameters()).is_meta


def test_a_batch_off_the_meta_device_keeps_its_layout(tmp_path) -> None:
    path = tmp_path / "strided.py"
    path.write_text(
        "import torch\n"
        "def step():\n"
        "    model = torch.nn.Linear(4, 4)\n"
        "    x = torch.empty(4, 3, device='meta', dtype=torch.float16).t().requires_grad_()\n"
        "    return model, torch.optim.SGD(model.parameters(), lr=0.1), {'x': [x, None, 'word']}\n"
    )
    x, *rest = load_target(f"{path}:step").kwargs["x"]
    assert (x.shape, x.stride(), x.dtype, x.requires_grad) == ((3, 4), (1, 3), torch.float16, True)
    assert rest == [None, "word"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stepp", r"none of that name; did you mean 'step'\? choose from: step, real, .*"),
        ("CONSTANT", r"tiny\.py:CONSTANT: expected a function, got int; name a function that returns \(model, .*"),
        ("needs", r"a function that takes no arguments, got missing a required argument: 'width'; give .*"),
        ("raises", r"got ValueError at line \d+: no such; correct the file; --traceback shows .*"),
        ("leaves", r"got SystemExit at line \d+: usage: train\.py; .*"),
        ("two", r"expected a tuple of 3 or 4, got a tuple of 2; return \(model, optimizer, example batch\[, loss\]\)"),
        ("list_of_three", r"expected a tuple of 3 or 4, got list; .*"),
        ("model_class", r"model_class, value 0: expected the model, a torch\.nn\.Module, got type; .*"),
        ("swapped", r"swapped, value 1: expected the optimizer, a torch\.optim\.Optimizer, got a tuple of 1; .*"),
        ("number_as_loss", r"number_as_loss, value 3: expected the loss, a function or None, got int; .*"),
    ],
)
def test_a_target_that_is_none_is_refused(call, tiny, name, message) -> None:
    code, out, err = call("dump", f"{tiny}:{name}", "--world", "4")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"fxzero: .*{message}\n", err), err


def test_a_file_that_does_not_load_is_refused(call, tiny) -> None:
    for text, message in (
        (tiny.replace("tiny", "broken") + ":step", r"got SyntaxError: .*line 1.*; correct the file; .*"),
        (tiny.replace("tiny", "absent") + ":step", r"absent\.py: expected a Python file, got no file of that name; .*"),
        (str(Path(tiny).parent) + ".py:step", r"expected a Python file, got no file of that name; .*"),
        (tiny, r"FILE\.py:FUNCTION: expected a Python file and a function in it, got '.*tiny\.py'; write it as .*"),
        (f"{tiny}:", r"FILE\.py:FUNCTION: expected .*"),
    ):
        code, _, err = call("dump", text, "--world", "4")
        assert code == 2 and re.fullmatch(rf"fxzero: .*{message}\n", err), err


def test_what_cannot_be_captured_is_an_error_in_one_line(call, tiny) -> None:
    code, out, err = call("dump", f"{tiny}:no_scalar", "--world", "4", "--quiet")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"fxzero: loss: expected a differentiable scalar tensor, got .*shape \(2, 16\); .*\n", err)


def test_the_traceback_is_there_for_those_who_ask(call, tiny) -> None:
    _, _, err = call("dump", f"{tiny}:raises", "--world", "4", "--traceback")
    assert "Traceback" in err and 'raise ValueError("no such' in err and "UsageError" in err


# ---- plans and options


def test_options_replace_keys_of_the_plan_file(printed, tiny, tmp_path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("zero = 1\nprefetch = 2\n[mesh]\ndp_replicate = 2\ndp = 4\n")
    from_file = printed("passes", "--plan", str(path))
    assert from_file.startswith("zero 1 | mesh dp_replicate=2 dp=4 | nccl\n")
    replaced = printed("passes", "--plan", str(path), "--zero", "3", "--mesh", "dp=8", "--world", "8")
    assert replaced.startswith("zero 3 | mesh dp=8 | nccl\n") and "distance=2" in replaced
    out = printed("dump", f"{tiny}:step", "--plan", str(path), "--zero", "3", "--quiet")
    assert "| mesh dp_replicate=2 dp=4 |" in out.splitlines()[0]


def test_what_a_plan_leaves_open_follows_the_backend(printed) -> None:
    assert "reduce_scatter='native'" in printed("passes", "--world", "4")
    assert "reduce_scatter='native'" not in printed("passes", "--world", "4", "--backend", "gloo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"--world: expected the number of ranks, got none, and a plan without mesh; add --world 64, .*"),
        (("--world", "x"), r"argument --world: invalid int value: 'x'; `fxzero dump --help` lists .*"),
        (("--world", "0"), r"Plan\.resolve\(world_size\): expected an integer of at least 1, got 0; .*"),
        (("--world", "8", "--mesh", "dp=4"), r"Plan\.mesh: .*8, got dp=4 = 4; .* or set dp=8"),
        (("--mesh", "dp:4"), r"--mesh: expected axes with their sizes, got 'dp:4'; write each axis once, .*"),
        (("--mesh", "dp=4,dp=2"), r"--mesh: expected axes with their sizes, got 'dp=4,dp=2'; .*"),
        (("--mesh", "dpp=4"), r"Plan\.mesh: expected a mesh axis, got 'dpp'; did you mean 'dp'\?"),
        (("--mesh", "dp=four"), r"Plan\.mesh\['dp'\]: expected an integer of at least 1, got 'four'; .*"),
        (("--world", "4", "--zero", "5"), r"Plan\.zero: expected an integer from 0 to 3, got 5; .*"),
        (("--world", "4", "--zero", "three"), r"Plan\.zero: expected an integer from 0 to 3, got 'three'; .*"),
        (("--world", "4", "--bucket-bytes", "4 miles"), r"Plan\.bucket_bytes: .*got '4 miles'; .*"),
        (("--world", "4", "--disable", "shard_everything"), r"disable: .*'shard_everything'; choose from: .*"),
        (("--world", "4", "--disable", "reduce_gradients"), r"pass 2 'shard_optimizer_state': .*"),
        (("--world", "4", "--plan", "absent.toml"), r"absent\.toml: expected a plan in TOML, got .*No such file.*"),
        (("--world", "4", "--plan", "plan.yaml"), r"Plan\.load: expected \.toml or \.json, got plan\.yaml; .*"),
        (("--world", "4", "--frobnicate"), r"unrecognized arguments: --frobnicate; .*"),
        (("--world", "4", "--format", "png"), r"argument --format: invalid choice: 'png' .*"),
        (("--world", "4", "--format", "json", "--phase", "update"), r"--phase: expected --format text, got json; .*"),
        (("--world", "4", "--out", "absent/step.txt"), r"--out: expected a file to write, got absent/step\.txt, .*"),
        (("--world", "4", "--out", "."), r"--out: expected a file to write, got the folder \.; .*"),
        (
            ("--world", "4", "--regions", "new", "--after", "place_updates"),
            r"--regions: expected no --after with it, got --after place_updates; leave one of them out: .*",
        ),
        (
            ("--world", "4", "--regions", "absent/new"),
            r"--regions: expected a folder that is new or empty, got absent/new, in a folder that there is not; .*",
        ),
        (("--world", "4", "--regions", "."), r"--regions: expected a folder .*, got \., which has contents; .*"),
        (
            ("--world", "4", "--after", "shard-params"),
            r"--after: expected a pass of this plan's recipe, got 'shard-params'; did you mean 'shard_parameters'\? "
            r"choose from: capture, recompute_pointwise, .*place_updates",
        ),
        (
            ("--world", "4", "--zero", "1", "--after", "shard_parameters"),
            r"--after: .*got 'shard_parameters'; change the plan, or choose from: capture, .*",
        ),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_at_once(call, tiny, options, message) -> None:
    code, out, err = call("dump", f"{tiny}:raises", *options)  # would raise, were it loaded
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"fxzero: {message}\n", err), err


def test_a_command_that_is_none_is_refused(call) -> None:
    code, _, err = call("dmup")
    assert code == 2 and err.count("\n") == 1
    assert re.search(r"'dmup' .*dump.*passes.*diff.*memory.*env", err)
    code, _, err = call()
    assert code == 2 and "COMMAND" in err


@pytest.mark.parametrize("command", ["dump", "passes", "diff", "memory", "calibrate", "env"])
def test_help_shows_an_example_that_the_parser_takes(printed, command) -> None:
    out = printed(command, "--help")
    examples = re.findall(rf"^  fxzero ({command}\b.*)$", out, flags=re.MULTILINE)
    assert examples
    assert command in printed("--help")
    for example in examples:
        assert "usage: " in printed(*example.split(), "--help")


def test_version(printed) -> None:
    assert printed("--version") == f"fxzero {fxzero.__version__}\n"


# ---- regions


def test_dump_of_a_plan_that_compiles_says_which_regions_share_a_function(printed, tiny) -> None:
    out = printed("dump", f"{tiny}:step", "--world", "1", "--lowering", "inductor", "--quiet")
    head = [line for line in out.splitlines() if line.startswith("# ")]
    assert re.fullmatch(r"# \d+ regions of \d+ functions; a call's region is in its comment", head[1])
    named = re.search(r"^# (region_\d+): region (\d+): update of lin.weight, (\d+) calls$", out, flags=re.MULTILINE)
    assert named is not None
    assert len(re.findall(rf"; region {named[2]}$", out, flags=re.MULTILINE)) == int(named[3])
    assert str(from_text(out)) == "\n".join(line for line in out.splitlines() if line not in head[1:-1]) + "\n"


def test_dump_without_regions_writes_the_program(call, tiny, tmp_path) -> None:
    folder = tmp_path / "source"
    code, _, err = call("dump", f"{tiny}:step", "--world", "4", "--lowering", "eager", "--regions", str(folder))
    assert code == 0 and "write program.py: lowering eager has no regions" in err
    assert sorted(path.name for path in folder.iterdir()) == ["index.md", "program.py"]
    program = (folder / "program.py").read_text()
    assert re.search(r"all_gather\w*\(.*, 4, 'dp'\)", program) and "return (" in program
    assert "No regions" in (folder / "index.md").read_text()


# ---- passes


def test_passes_lists_all(printed) -> None:
    out = printed("passes")
    for item in ALL_PASSES:
        assert re.search(rf"^{item.name} ", out, flags=re.MULTILINE)
    for words in ("requires", "provides", "numerics", "summary", "bitwise", "parameters-sharded"):
        assert words in out


def test_passes_of_a_plan_come_in_order_with_options(printed) -> None:
    out = printed("passes", "--world", "64", "--zero", "2", "--disable", "recompute_pointwise,place_updates")
    names = re.findall(r"^ *\d+  (\w+)", out, flags=re.MULTILINE)
    assert names[:2] == ["reduce_gradients", "shard_optimizer_state"]
    assert not {"recompute_pointwise", "place_updates", "shard_parameters"} & set(names)
    assert re.search(r"^ 1  reduce_gradients .* axes=\('dp',\)$", out, flags=re.MULTILINE)


# ---- diff


def test_diff_shows_what_a_pass_changes(printed, golden, tiny) -> None:
    out = printed("diff", f"{tiny}:step", "--world", "4", "--after", "shard_parameters", "--quiet")
    golden("cli/diff", out)
    assert printed("diff", f"{tiny}:step", "--world", "4", "--before", "shard_parameters", "--quiet") == out
    table, _, lines = out.partition("\n\n")
    assert lines.startswith("--- before shard_parameters\n+++ after shard_parameters\n@@ ")
    assert re.search(r"^release +0 +2 +\+2$", table, flags=re.MULTILINE)
    assert printed("diff", f"{tiny}:step", "--world", "4", "--after", "shard_parameters", "--stat", "--quiet") == (
        table + "\n"
    )


def test_diff_over_several_passes(printed, tiny) -> None:
    span = ("--before", "shard_gradients", "--after", "shard_parameters")
    out = printed("diff", f"{tiny}:step", "--world", "4", *span, "--quiet", "--context", "0")
    assert "\n--- before shard_gradients\n+++ after shard_parameters\n@@ " in out
    assert not [line for line in out.partition("\n@@ ")[2].splitlines() if line[:1] == " "]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"fxzero diff: expected --before PASS or --after PASS, got neither; choose from: recompute_pointwise, .*"),
        (("--after", "capture"), r"--after: expected a pass of this plan's recipe, got 'capture'; choose from: .*"),
        (
            ("--before", "place_updates", "--after", "shard_gradients"),
            r"--before, --after: expected the first and the last .*, got 'place_updates' after 'shard_gradients'; .*",
        ),
    ],
)
def test_a_diff_between_nothing_is_refused(call, tiny, options, message) -> None:
    code, out, err = call("diff", f"{tiny}:raises", "--world", "4", *options)
    assert (code, out) == (2, "") and re.fullmatch(rf"fxzero: {message}\n", err), err


def test_lines_that_only_moved_sideways_are_no_change() -> None:
    before = "forward\n  %a  f32[4]  mm  %x\n  %b  f32[4]  add  %a\n"
    after = "forward\n  %a       f32[4]  mm   %x\n  %longer  f32[4]  addmm  %a\n"
    assert list(changed_lines(before, before.replace("f32[4]  ", "f32[4]     "), context=3)) == []
    assert list(changed_lines(before, after, context=0)) == [
        "@@ -3,1 +3,1 @@",
        "-  %b  f32[4]  add  %a",
        "+  %longer  f32[4]  addmm  %a",
    ]
    assert list(changed_lines("  %a\n", "    %a\n", context=0))  # what leads a line is no alignment


def test_ops_are_listed_by_how_much_they_change() -> None:
    table = op_table(Counter({"mm": 3, "add": 1, "wait": 5}), Counter({"mm": 3, "all_gather": 4, "wait": 6}))
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["all_gather", "0", "4", "+4"],
        ["add", "1", "0", "-1"],
        ["wait", "5", "6", "+1"],
        ["all", "9", "13", "+4"],
    ]


# ---- env, and the program itself


def test_env_names_what_a_report_needs(printed) -> None:
    found = json.loads(printed("env", "--json"))
    assert found["fxzero"] == fxzero.__version__ and found["torch"] == str(torch.__version__)
    assert found["cpus"] >= 1 and isinstance(found["backends"], list) and isinstance(found["devices"], list)
    table = printed("env")
    assert [line.split()[0] for line in table.splitlines()] == list(found)
    assert "/" not in re.sub(r"\S+/s\b", "", table)  # no path of this machine


def test_the_module_runs_and_bears_a_reader_that_leaves() -> None:
    command = [sys.executable, "-m", "fxzero.cli"]
    done = subprocess.run([*command, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"fxzero {fxzero.__version__}\n"
    with subprocess.Popen([*command, "passes"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_the_example_is_the_model_that_it_says(printed) -> None:
    target = load_target(f"{EXAMPLE}:llama_8b")
    assert sum(p.numel() for p in target.model.parameters()) == 8_030_261_248
    assert all(p.is_meta for p in target.model.parameters())
    assert len(load_target(f"{EXAMPLE}:llama_8b_64_layers").model.layers) == 64
    out = printed("dump", f"{EXAMPLE}:llama_tiny", "--world", "4", "--zero", "3", "--quiet")
    assert "layers.1.feed_forward.w3" in out and "_scaled_dot_product" in out


def test_usage_errors_are_fxzero_errors() -> None:
    assert issubclass(UsageError, fxzero.FxzeroError) and "raise" in (UsageError.__doc__ or "").lower()


# ---- memory


def test_memory_says_what_stands_at_the_peak(printed, golden, tiny) -> None:
    example = ("memory", f"{EXAMPLE}:llama_tiny", "--world", "4", "--zero", "3", "--quiet", "--no-verify")
    golden("cli/memory", printed(*example, "--backend", "gloo", "--budget", "1 MiB"))
    assert "the rules of cuda's allocator" in printed("memory", f"{tiny}:step", "--world", "4", "--quiet")


def test_memory_as_json_adds_up(printed, tiny) -> None:
    target = ("memory", f"{tiny}:step", "--world", "4", "--quiet", "--json", "--budget", "1 MiB")
    found = json.loads(printed(*target))
    assert sum(found["by_kind"].values()) == sum(item["num_bytes"] for item in found["standing"]) == found["peak_bytes"]
    assert (found["allocator"], found["budget_bytes"], found["microbatch"]) == ("cuda", 2**20, 0)
    assert found["peak_bytes"] % 512 == 0 and found["reserved_bytes"] == 2 * 2**20
    assert found["state_bytes"] > json.loads(printed(*target, "--backend", "gloo"))["state_bytes"], "blocks of 512"


def test_memory_of_microbatches_counts_what_rests_beside_each(printed, tiny) -> None:
    target = ("memory", f"{tiny}:step", "--world", "2", "--quiet", "--json", "--backend", "gloo")
    one, three = (json.loads(printed(*target, "--accumulate", str(count))) for count in (1, 3))
    assert one["by_kind"]["optimizer state"] == three["by_kind"]["optimizer state"] > 0
    assert three["by_kind"]["buffers and inputs"] == 3 * one["by_kind"]["buffers and inputs"]


OFFLOAD = ("--offload-optimizer", "host", "--offload-parameters", "nvme", "--offload-below", "0")


def test_memory_and_reports_say_what_is_swapped(printed, tiny) -> None:
    target = (f"{tiny}:step", "--world", "4", "--quiet", "--backend", "gloo")
    found = json.loads(printed("memory", *target, *OFFLOAD, "--json"))
    rows = (16 * 16 + 16) * 4 // 4  # bytes of a quarter of the parameters, and of their momentum
    assert (found["host_bytes"], found["nvme_bytes"]) == (rows, rows)
    moved = found["swapped_bytes"]
    assert moved["host in"] == moved["host out"] == rows
    assert 0 < moved["nvme out"] < moved["nvme in"] and not any(moved[key] % 4096 for key in ("nvme in", "nvme out"))
    for command in (("memory",), ("dump", "--format", "report")):
        out = printed(command[0], *target, *OFFLOAD, *command[1:])
        assert re.search(r"swapped in a step +out MiB +in MiB\n.*\nhost .*\nnvme ", out)
        assert "swapped" not in printed(command[0], *target, *command[1:])
    assert json.loads(printed("memory", *target, "--json"))["swapped_bytes"] == {}


def test_every_key_of_offload_is_an_option(printed, call, tmp_path) -> None:
    keys = ("--offload-activations", "nvme", "--offload-dir", str(tmp_path), "--offload-io", "buffered")
    keys += ("--offload-buffer-bytes", "8 MiB", "--update-on-host", "0.5", "--offload-optimizer", "host")
    out = printed("passes", "--world", "4", *keys)
    assert "on_host=0.5" in out and "tier='nvme'" in out
    code, _, err = call("passes", "--world", "4", "--offload-io", "buffered")
    assert code == 2 and "Plan.offload_io: expected one of them 'nvme', or 'auto' and offload_dir with it" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--png", "memory.tiff0"), "memory.tiff0: expected the suffix of a picture, got '.tiff0'; name it memory.png"),
        (("--png", "nowhere/memory.png"), "expected a file to write"),
        (("--budget", "much"), "--budget: expected"),
    ],
)
def test_memory_refuses_before_it_captures(call, options, message) -> None:
    code, out, err = call("memory", "no_file.py:step", "--world", "2", *options)
    assert (code, out) == (2, "") and message in err and "no_file" not in err


def test_memory_is_drawn(call, tiny, tmp_path) -> None:
    path = tmp_path / "memory.svg"
    code, _, err = call("memory", f"{tiny}:step", "--world", "4", "--png", str(path), "--budget", "4 KiB")
    assert code == 0 and f"draw {path}" in err
    assert path.read_text().startswith("<?xml")


def test_what_a_budget_decides_is_said_in_dumps_and_reports(printed) -> None:
    plan = ("--world", "4", "--quiet", "--recompute", "auto", "--memory-budget", "1400000")
    out = printed("dump", f"{EXAMPLE}:llama_tiny", *plan)
    header, first, second, *_ = out.splitlines()
    assert header.startswith("# after place_updates | ")
    assert re.match(
        r"# budget 1.3 MiB: predicted peak 1.3 MiB, [\d.]+ MiB with everything kept; [\d.]+ (ms|us) beside a", first
    )
    assert re.match(r"#   layers\.\*.* activations: recomputed in \d of 2 blocks, .* for .* (ms|us)", second)
    assert to_text(from_text(out)) == "".join(
        line for line in out.splitlines(keepends=True) if not line.startswith(("# budget", "#   "))
    )
    assert first.removeprefix("# ") in printed("dump", f"{EXAMPLE}:llama_tiny", *plan, "--format", "report")
    assert "recompute_chosen" in printed("passes", *plan[:2], *plan[3:])
    assert first.removeprefix("# ") in printed("memory", f"{EXAMPLE}:llama_tiny", *plan, "--backend", "nccl")


def test_where_state_rests_is_decided_for_a_budget(printed, call) -> None:
    plan = ("--world", "4", "--quiet", "--offload-optimizer", "auto", "--offload-below", "0", "--accumulate", "3")
    plan += ("--memory-budget", "1300000", "--bucket-bytes", "0")
    found = json.loads(printed("memory", f"{EXAMPLE}:llama_tiny", *plan, "--json"))
    assert "optimizer state: offloaded to host" in found["decision"] and found["host_bytes"]
    assert "swap_in" in printed("dump", f"{EXAMPLE}:llama_tiny", *plan)
    code, _, err = call("dump", f"{EXAMPLE}:llama_tiny", *plan, "--microbatch", "0")
    assert code == 2 and "--microbatch: expected the last one, which decides where state rests, got 0" in err


def test_a_budget_that_cannot_be_met_is_an_error(call) -> None:
    plan = ("--world", "4", "--quiet", "--recompute", "auto", "--memory-budget", "1 MB")
    code, out, err = call("dump", f"{EXAMPLE}:llama_tiny", *plan)
    assert code and not out and "Plan.memory_budget: expected at least 1." in err
