"""What a step's source files say of its program and regions; tests/lower has those that a compiler has written."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fxzero
from fxzero.errors import LoweringError
from fxzero.lower import lower_regions
from fxzero.lower.shared_functions import region_lines, shared_functions
from tests.lower.interpreted import Interpreted, interpreted
from tests.lower.models import Decoder, tokens
from tests.runtime.graph_stand_in import graphs_on_the_cpu


class Kept:
    """Stands for the store of compiled regions: a file a text, with that text in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def path(self, text: str) -> Path:
        path = self._folder / f"{abs(hash(text))}.py"
        path.write_text(f"source = {text!r}\n")
        return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    store = Kept(tmp_path / "kept")
    monkeypatch.setattr("fxzero.step_source.Store", lambda lowering: store)
    return store


@functools.cache
def trained(layers: int = 2, **keys: Any) -> fxzero.TrainStep:
    """A step that has run once, its regions interpreted."""
    torch.manual_seed(0)
    model = Decoder(layers)
    with interpreted(), graphs_on_the_cpu():
        plan = fxzero.Plan(**{"lowering": "inductor", **keys})
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), plan)
        step(*tokens(0, rows=4))
    return step


def rows_of(index: str) -> list[list[str]]:
    """The cells of the index's table."""
    lines = [line for line in index.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def source_in(path: Path) -> str:
    """The canonical text that `Kept` has put into a module."""
    (assignment,) = ast.parse(path.read_text()).body
    return ast.literal_eval(assignment.value)  # type: ignore[attr-defined]


@pytest.fixture
def _products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products run by another op than the graph's, as far as torch has it."""
    monkeypatch.setattr("fxzero.lower.products._LEAST_FLOPS", 0)
    monkeypatch.setattr(
        Interpreted, "answers", lambda self, name, questions, measure: dict.fromkeys(questions, "onednn")
    )


@pytest.mark.usefixtures("_products_by_onednn")
@pytest.mark.parametrize("keys", [{}, {"cuda_graph": True}], ids=str)
def test_each_function_has_its_own_module_and_its_regions_call_it(keys: Any, kept: Kept, tmp_path: Path) -> None:
    step = trained.__wrapped__(1, **keys)
    files = step.write_source(tmp_path / "source")
    rows = rows_of((tmp_path / "source" / "index.md").read_text())
    assert {f.name for f in files} == {"index.md", "program.py", *(row[-1] for row in rows)}
    assert all(f.parent == tmp_path / "source" and f.is_file() for f in files)
    program = (tmp_path / "source" / "program.py").read_text()
    called = Counter(re.findall(r"(region_\d+)\(values\)", program))
    assert called == {row[0]: int(row[1]) for row in rows} and max(called.values()) > 1
    compiled = step._last[-1].program
    texts = {number: region.form.text for number, region in compiled.lowered.regions.items()}
    for function in shared_functions(compiled.body, lowered=compiled.lowered):
        source = source_in(tmp_path / "source" / f"{function.name}.py")
        assert all(texts[region.number] == source for region in function.regions), function.name
    assert sum(int(row[1]) for row in rows) == len(texts)


def test_functions_for_all_sizes_have_the_names_and_modules_that_run(kept: Kept, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(1)
    with interpreted():
        plan = fxzero.Plan(lowering="inductor")
        step = fxzero.compile(model, torch.optim.AdamW(model.parameters()), plan)
        for rows in (4, 6):
            step(*tokens(0, rows=rows))
    step.write_source(tmp_path / "source")
    regions = step._last[-1].program.lowered.regions.values()
    assert any(region.sizes for region in regions) and not all(region.sizes for region in regions)
    for region in regions:
        assert source_in(tmp_path / "source" / f"{region.name}.py") == region.text
    called = Counter(region.name for region in regions)
    rows_shown = rows_of((tmp_path / "source" / "index.md").read_text())
    assert called == {row[0]: int(row[1]) for row in rows_shown}


def test_a_module_has_its_calls_and_where_they_stand_above_it(kept: Kept, tmp_path: Path) -> None:
    step = trained()
    step.write_source(tmp_path / "source")
    function = next(f for f in shared_functions(step.graph) if len(f.regions) > 1)
    head = (tmp_path / "source" / f"{function.name}.py").read_text().partition("source = ")[0]
    assert f"# {function.name}: regions {function.numbers}, {function.where}\n" in head
    assert all(f"# %{node.name} = " in head for node in function.regions[0].calls)
    row = next(r for r in rows_of((tmp_path / "source" / "index.md").read_text()) if r[0] == function.name)
    assert row[2] == function.where and int(row[3]) == len(function.regions[0].calls)
    assert f"# inputs   {row[4]}\n" in head and f"# outputs  {row[5] or 'none'}\n" in head


def test_places_of_a_function_have_stars_for_numbers() -> None:
    lines = region_lines(trained().graph)
    assert re.fullmatch(r"\d+ regions of \d+ functions; a call's region is in its comment", lines[0])
    shown = "\n".join(lines)
    assert "backward of layers.*" in shown and not re.search(r"layers\.\d", shown)
    assert "update of layers.*.qkv.weight, " in shown


def test_a_step_without_regions_has_its_program_and_an_index_that_says_so(tmp_path: Path) -> None:
    files = trained(1, lowering="eager").write_source(str(tmp_path / "source"))
    assert sorted(f.name for f in files) == ["index.md", "program.py"]
    assert "No regions: lowering eager runs each call by itself, see program.py" in files[-1].read_text()
    assert "aten_addmm(" in (tmp_path / "source" / "program.py").read_text()


def test_each_program_of_a_step_has_a_folder(kept: Kept, tmp_path: Path) -> None:
    step = trained(1, accumulate=4)
    step.write_source(tmp_path / "source")
    folders = sorted(path.name for path in (tmp_path / "source").iterdir())
    assert folders == ["program_0", "program_1", "program_2"], "the two in the middle are one"
    texts = [(tmp_path / "source" / name / "program.py").read_text() for name in folders]
    assert [text.partition("\n\n")[2] for text in texts] == [step._last[i].program.source for i in (0, 1, 3)]


def test_a_region_that_runs_call_by_call_has_no_module(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trained()
    program = step._last[-1].program
    first = shared_functions(step.graph)[0]
    error = LoweringError("no")
    refused = dict.fromkeys((region.number for region in first.regions), error)
    left = {number: region for number, region in program.lowered.regions.items() if number not in refused}
    monkeypatch.setattr(program, "lowered", lower_regions.Lowered(left, {}, 1, 0, refused))
    step.write_source(tmp_path / "source")
    row = rows_of((tmp_path / "source" / "index.md").read_text())[0]
    assert row[0] == first.name and row[-1] == "none: it runs call by call"
    assert not (tmp_path / "source" / f"{first.name}.py").exists()


def test_folders_with_contents_and_modules_that_are_gone_are_errors(tmp_path: Path) -> None:
    step = trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    with pytest.raises(LoweringError, match=r"step.write_source\(...\): expected a folder that is new .* has contents"):
        step.write_source(tmp_path / "full")
    with pytest.raises(LoweringError, match=r"in a folder that there is not; give another path"):
        step.write_source(tmp_path / "none" / "source")
    with pytest.raises(LoweringError, match=r"expected the module of region_0, got .*No such file.*; compile the step"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FXZERO_CACHE_DIR", str(tmp_path / "elsewhere"))
            step.write_source(tmp_path / "source")
