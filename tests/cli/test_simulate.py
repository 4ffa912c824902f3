"""fxzero simulate, called in this process: what it predicts, draws and writes, what it tries, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fxzero.cli import main
from fxzero.cli.advice import changes_of
from fxzero.plan import Plan
from tests.simulate.trace_format import trace_faults

ROOT = Path(__file__).resolve().parents[2]
TARGET = f"{ROOT / 'examples' / 'llama_meta.py'}:llama_tiny"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """`call(*argv)` is (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["simulate", *argv])
        return code, *capsys.readouterr()

    return run


def test_it_predicts_draws_and_traces(call: Any, tmp_path: Path) -> None:
    png, trace = tmp_path / "timeline.png", tmp_path / "trace.json"
    code, out, err = call(
        TARGET, "--world", "16", "--hardware", "h100", "--quiet", "--png", str(png), "--trace", str(trace)
    )
    assert (code, err) == (0, "")
    assert re.search(r"^zero 3 on dp=16\n\npredicted step [\d.,]+ ms on H100", out)
    assert re.search(r"tokens a second on all ranks \(1,024 a step\); matrix products .*\(MFU\)", out)
    assert "compute stands still for    phase" in out and "net:dp" in out and "predicted peak" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert list(trace_faults(json.loads(trace.read_text()))) == []


def test_as_json_the_parts_add_up(call: Any) -> None:
    code, out, _ = call(TARGET, "--world", "4", "--json", "--quiet", "--accumulate", "2")
    found = json.loads(out)
    assert code == 0 and found["hardware"] == "H100" and found["bound_seconds"] is None
    assert found["tokens"] == 4 * 2 * 64 and found["tried"] == []
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["step_seconds"])
    for lane in found["lanes"].values():
        assert lane["busy_seconds"] + lane["idle_seconds"] == pytest.approx(found["step_seconds"])
    assert sum(item["seconds"] for item in found["exposed"]) == pytest.approx(found["exposed_seconds"])
    assert 0 < found["mfu"] < 1


def test_slower_links_take_longer_and_a_larger_world_needs_no_process_group(call: Any) -> None:
    def seconds(*options: str) -> float:
        code, out, _ = call(TARGET, "--json", "--quiet", "--no-verify", *options)
        assert code == 0
        return float(json.loads(out)["step_seconds"])

    fast, slow = (seconds("--world", "1024", "--hardware", name) for name in ("h100", "h100_ethernet"))
    assert slow > fast


def test_what_was_tried_is_what_a_plan_with_it_gives(call: Any) -> None:
    options = (TARGET, "--world", "8", "--hardware", "h100_ethernet", "--json", "--quiet", "--no-verify")
    tried = json.loads(call(*options, "--advise")[1])["tried"]
    assert [item["changes"] for item in tried if item["changes"] == {"zero": 2}]
    by_key = {next(iter(item["changes"])): item for item in tried}
    other = json.loads(call(*options, "--zero", "2")[1])
    assert by_key["zero"]["step_seconds"] == pytest.approx(other["step_seconds"])
    assert by_key["zero"]["peak_bytes"] == other["peak_bytes"]
    assert [item["step_seconds"] for item in tried] == sorted(item["step_seconds"] for item in tried)


def test_advice_as_text_says_what_it_costs_in_memory(call: Any) -> None:
    code, out, err = call(TARGET, "--world", "8", "--advise", "--no-verify")
    assert code == 0 and "try changes of the plan" in err
    assert re.search(r"with +step +shorter by +peak GiB", out) and "recompute=blocks" in out


def test_changes_are_none_of_the_plan_itself() -> None:
    for keys in ({}, {"zero": 2}, {"recompute": "blocks", "offload_activations": "host"}, {"bucket_bytes": 0}):
        plan = Plan(**keys).resolve(8)
        changes = changes_of(plan)
        assert all(plan.replace(**change) != plan for change in changes) and len(changes) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hardware", "h1000"), "h1000"),
        (("--hardware", "/nowhere/machine.toml"), "/nowhere/machine.toml"),
        (("--png", "timeline.txt"), "expected the suffix of a picture"),
        (("--trace", "/nowhere/trace.json"), "in a folder that there is not"),
        ((), "expected the number of ranks"),
    ],
)
def test_it_refuses_before_it_captures(call: Any, options: tuple[str, ...], message: str) -> None:
    world = () if not options else ("--world", "2")
    code, out, err = call("no_file.py:step", *world, *options)
    assert (code, out) == (2, "") and message in err and "no_file" not in err
