"""The README's example runs as it stands there."""

import re
from pathlib import Path

import pytest

from tests.numerics.worker import ROOT, torchrun


@pytest.mark.multirank
def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    output = torchrun("example.py", ranks=2, timeout_s=120, cwd=tmp_path)
    assert "all_gather" in output and "predicted peak" in output
    assert (tmp_path / "out" / "checkpoint" / ".metadata").exists()
