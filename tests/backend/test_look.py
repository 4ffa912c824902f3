"""What was compiled can be read, as long as it is in use; torch finds the backend by its name."""

import gc
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from fxzero.backend import programs
from fxzero.errors import PlanError, VerifyError
from fxzero.graph.parse import from_text
from fxzero.graph.verify import verify
from tests.backend.models import Decoder, tokens
from tests.backend.reference import compiled
from tests.test_packaging import build_wheel, copy_checkout, run_python


def test_programs_can_be_read_and_read_back() -> None:
    compiled(Decoder(2, dropout=0.1), recompute="blocks")(*tokens(0)).backward()
    forward, backward = programs()[-2:]
    assert forward.title.startswith("forward of graph") and backward.title.startswith("backward of graph")
    assert re.search(r"-> output +0\n", str(forward)) and "-> gradient   layers.1.qkv.weight" in str(backward)
    assert "saved  " in str(backward) and "tangent  " in str(backward) and "d layers.0.qkv" in str(backward)
    for step in (forward, backward):
        again = from_text(str(step))
        assert str(again) == str(step)
        verify(again)


def test_a_pass_cannot_lose_a_gradient_or_a_result() -> None:
    compiled(nn.Linear(3, 3))(torch.ones(2, 3, requires_grad=True)).sum().backward()
    step = from_text(str(programs()[-1]))
    before = verify(step)
    results = step.results
    step.set_results({**results, ("gradient", "weight"): step.placeholders[0]})
    with pytest.raises(VerifyError, match=r"rule 'gradients', result of parameter 'weight'"):
        verify(step, before=before)
    step.set_results({key: node for key, node in results.items() if key != ("gradient", "bias")})
    with pytest.raises(VerifyError, match=r"rule 'state', result \('gradient', 'bias'\): expected returned"):
        verify(step, before=before)


def test_programs_are_gone_with_the_function_that_they_belong_to() -> None:
    called = compiled(nn.Linear(3, 3))
    called(torch.ones(2, 3)).sum().backward()
    titles = [step.title for step in programs()[-2:]]
    del called
    torch.compiler.reset()
    gc.collect()
    assert not {step.title for step in programs()} & set(titles)


def test_texts_are_written_to_a_folder(tmp_path: Path) -> None:
    compiled(nn.Linear(3, 3), dump=tmp_path / "texts")(torch.ones(2, 3)).sum().backward()
    written = sorted((tmp_path / "texts").iterdir())
    assert [path.name.split("_")[1] for path in written] == ["backward.txt", "forward.txt"]
    assert [path.read_text() for path in reversed(written)] == [f"{step}\n" for step in programs()[-2:]]
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"options\['dump'\]: expected a folder to write to"):
        torch.compiler.reset()
        compiled(nn.Linear(3, 3), dump=tmp_path / "file")(torch.ones(2, 3))


BY_NAME = """
import site; site.addsitedir({site!r})
import torch
assert "fxzero" in torch.compiler.list_backends(), torch.compiler.list_backends()
layer = torch.nn.Linear(3, 3)
torch.compile(layer, backend="fxzero", options={{"recompute": 0.5}})(torch.ones(2, 3)).sum().backward()
from fxzero.backend import programs
print(layer.weight.grad.sum().item(), [step.title for step in programs()])
"""


def test_torch_finds_an_installed_fxzero_by_its_name(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    with build_wheel(checkout, to=tmp_path / "wheel") as wheel:
        wheel.extractall(tmp_path / "site")
    script = textwrap.dedent(BY_NAME.format(site=str(tmp_path / "site")))
    done = run_python("-S", "-c", script, cwd=tmp_path, path=[tmp_path / "site", Path(torch.__file__).parents[1]])
    assert done.stdout.split()[0] == "18.0" and "backward of graph 0" in done.stdout, sys.version
