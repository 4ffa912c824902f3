"""Compiled regions on disk: found again, compiled once by several processes, refused where others could write."""

from pathlib import Path

import pytest
import torch

from fxzero.errors import LoweringError
from fxzero.lower.inductor import Compiled
from fxzero.lower.store import VARIABLE, Store, default_folder

ONE, TWO = '{"calls": [1], "written": {}}', '{"calls": [2], "written": {}}'  # texts of two regions
SOURCE = "def call(values):\n    values.clear()\n    return ({},)\n"


def compiled(number: int) -> Compiled:
    return Compiled(SOURCE.format(number), ())


def test_what_was_compiled_is_found_again(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        function, new = Store(tmp_path / "kept").get(ONE, lambda: made.append(1) or compiled(3))
        values = ["input"]
        assert function(values) == (3,) and not values
        assert new is (len(made) == 1 and _ == 0)
    assert len(made) == 1


def test_another_text_is_another_region(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(ONE, lambda: compiled(1))[0]([]) == (1,)
    assert store.get(TWO, lambda: compiled(2))[0]([]) == (2,)


@pytest.mark.parametrize("left", ["", '{"region": "another"}', '{"reg'])
def test_what_was_written_half_is_compiled_anew(tmp_path: Path, left: str) -> None:
    store = Store(tmp_path)
    store.get(ONE, lambda: compiled(1))
    store.path(ONE).with_suffix(".json").write_text(left)
    function, new = store.get(ONE, lambda: compiled(2))
    assert new and function([]) == (2,)


def test_nothing_is_left_of_a_region_that_fails(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail() -> Compiled:
        raise LoweringError("no")

    with pytest.raises(LoweringError):
        store.get(ONE, fail)
    assert not store.path(ONE).exists()
    assert store.get(ONE, lambda: compiled(1))[1]


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(LoweringError, match=r"nobody else can write to, got owner .*, mode drwxrwxrwx; chmod 700"):
        Store(folder)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoweringError, match=f"Not a directory.*set {VARIABLE} to another"):
        Store(tmp_path / "file" / "below")


def test_the_folder_is_the_user_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "fxzero"


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    asked = []

    def measure(question: str) -> str:
        asked.append(question)
        return question.upper()

    assert Store(tmp_path).answers("products", ["a", "b"], measure) == {"a": "A", "b": "B"}
    assert Store(tmp_path).answers("products", ["b", "c"], measure) == {"b": "B", "c": "C"}
    assert asked == ["a", "b", "c"]


def test_inputs_that_are_taken_for_aligned_may_start_anywhere(tmp_path: Path) -> None:
    source = """
def call(values):
    first, second = values
    values.clear()
    assert first.data_ptr() % 16 == second.data_ptr() % 16 == 0
    second += first
    return (first * 2,)
"""
    text = '{"calls": [3], "written": {"i1": "c0"}}'
    for make in (lambda: Compiled(source, (0, 1)), None):  # as it is made, and as it is found
        function, _ = Store(tmp_path).get(text, make)  # type: ignore[arg-type]
        memory = torch.ones(20)
        first, second = memory[1:9], memory[10:18]
        assert first.data_ptr() % 16 and second.data_ptr() % 16
        values = [first, second]
        (doubled,) = function(values)
        assert not values
        assert doubled.tolist() == [2.0] * 8 and second.tolist() == [2.0] * 8
        assert memory.sum() == 28.0
