"""Every error class has its entry in docs/errors.md; an error made by `of` is one line with its parts."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

import fxzero.errors as errors
from fxzero.backend.options import check_shard_plan
from fxzero.plan import Plan

DOC = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == "fxzero.errors"]


def entries() -> dict[str, str]:
    """Heading of each section of docs/errors.md -> its text."""
    parts = re.split(r"^## (.+)$", DOC.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def examples(entry: str) -> list[str]:
    return re.findall(r"^ {4}(\S.*)$", entry, flags=re.MULTILINE)


def test_the_doc_has_exactly_the_classes() -> None:
    assert {c.__name__ for c in CLASSES} == {
        "FxzeroError",
        "PlanError",
        "CaptureError",
        "PipelineError",
        "RewriteError",
        "VerifyError",
        "LoweringError",
        "GradientOverflowError",
        "OffloadError",
        "HardwareError",
        "RankMismatchError",
    }
    assert set(entries()) == {c.__name__ for c in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_each_entry_says_when_shows_an_example_and_says_what_to_do(cls: type[Exception]) -> None:
    entry = entries()[cls.__name__]
    for part in ("**When:** ", "**Example:**", "**What to do:** "):
        assert part in entry
    assert examples(entry)
    for line in examples(entry):
        assert re.fullmatch(r".+: expected .+, got .+; .+", line) or "did you mean" in line


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_each_class_is_an_fxzero_error_and_says_when_it_is_raised(cls: type[Exception]) -> None:
    assert issubclass(cls, errors.FxzeroError)
    assert "raise" in (cls.__doc__ or "").lower()


def test_the_documented_plan_errors_are_the_ones_raised() -> None:
    def message(make: object) -> str:
        with pytest.raises(errors.PlanError) as info:
            make()  # type: ignore[operator]
        return str(info.value)

    documented = examples(entries()["FxzeroError"]) + examples(entries()["PlanError"])
    assert documented == [
        message(lambda: Plan(zero=4)),
        message(lambda: Plan(zeros=3)),  # type: ignore[call-arg]
        message(lambda: Plan(mesh={"dp": 4}).resolve(8)),
        message(lambda: Plan(offload_dir="/scratch")),
        message(lambda: check_shard_plan(Plan(zero=1))),
    ]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_of_gives_one_line_and_keeps_the_parts(cls: type[errors.FxzeroError]) -> None:
    error = cls.of("a\nb", expected="x", got="y\r\nz", fix="do")
    assert type(error) is cls
    assert str(error) == "a b: expected x, got y z; do"
    assert (error.where, error.expected, error.got, error.fix) == ("a b", "x", "y z", "do")


def test_of_takes_where_by_name_too() -> None:
    assert str(errors.VerifyError.of(where="w", expected="x", got="y", fix="f")) == "w: expected x, got y; f"


def test_at_puts_the_outer_place_first() -> None:
    error = errors.PlanError.of("Plan.zero", expected="x", got="y", fix="f").at("plan.toml")
    assert type(error) is errors.PlanError
    assert str(error) == "plan.toml: Plan.zero: expected x, got y; f"
    assert (error.where, error.expected, error.got, error.fix) == ("plan.toml: Plan.zero", "x", "y", "f")


def test_a_bare_message_has_no_parts() -> None:
    error = errors.CaptureError("as it is")
    assert (str(error), error.where, error.expected, error.got, error.fix) == (
        "as it is",
        None,
        None,
        None,
        None,
    )
    assert (str(error.at("m")), error.at("m").where) == ("m: as it is", "m")


def test_an_error_survives_pickling_between_processes() -> None:
    error = errors.RankMismatchError.of("line 3", expected="a", got="b", fix="c")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
