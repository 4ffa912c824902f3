"""Further processes compile regions into the store, where the process that needs them finds them."""

import json
import time
from pathlib import Path

import pytest

from fxzero import compat_inductor
from fxzero.errors import PlanError
from fxzero.lower.store import Store
from fxzero.lower.workers import VARIABLE, num_processes, working_on

pytestmark = pytest.mark.skipif(compat_inductor.find_cpp_compiler() is None, reason="no C++ compiler")


def text_of(factor: float) -> str:
    call = {"op": "aten::mul.Tensor", "args": [{"node": "i0"}, factor]}
    return json.dumps({"inputs": [["float32", [4], [1], "cpu"]], "calls": [call], "outputs": ["c0"], "written": {}})


def test_another_process_compiles_what_is_missing(tmp_path: Path) -> None:
    texts, store = [text_of(factor) for factor in (2.0, 3.0, 4.0)], Store(tmp_path)
    with working_on(texts, store, processes=2):
        deadline = time.monotonic() + 120
        while not store.holds(texts[-1]) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert store.holds(texts[-1]), "the last region comes first"


def test_a_few_regions_are_not_worth_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    with working_on([text_of(2.0), text_of(3.0)], Store(tmp_path), processes=8):
        pass


def test_ranks_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert [num_processes(ranks) for ranks in (1, 4, 32)] == [16, 4, 1]
    monkeypatch.setenv(VARIABLE, "3")
    assert num_processes(4) == 3


def test_a_number_of_processes_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "many")
    with pytest.raises(PlanError, match="FXZERO_COMPILE_PROCESSES: expected a whole number of at least 1, got 'many'"):
        num_processes(1)
