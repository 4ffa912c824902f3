"""`fxzero.passes` and `fxzero.kernels` import from a bare checkout, a wheel and an editable install."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ["pyproject.toml", "README.md", "LICENSE", "fxzero", "passes", "kernels"]
TIMEOUT_S = 120

# Prints where the three came from; each fails to import where it is not there.
IMPORT_ALL = """
import fxzero, fxzero.passes, fxzero.kernels
from fxzero.cost.hardware import Hardware
Hardware.load("h100")
print(*fxzero.__path__, *fxzero.passes.__path__, *fxzero.kernels.__path__, sep="\\n")
"""


def copy_checkout(to: Path, *, symlinks: bool = True) -> Path:
    """A copy of what is shipped, with the two symlinks or, as on a system that has none, without."""
    to.mkdir(exist_ok=True)
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, to / name, symlinks=True, ignore=ignore)
        elif source.exists():
            shutil.copy(source, to / name)
    if not symlinks:
        (to / "fxzero/passes").unlink()
        (to / "fxzero/kernels").unlink()
    for folder in sorted(to.rglob("*"), reverse=True):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()  # git keeps no empty folder, so neither does a copy that stands for a clone
    return to


def run_python(
    *args: str, cwd: Path, path: list[Path] | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs this Python; `path` goes first in its search path. Its output is the failure's message."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or []))}
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=env,
        text=True,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def pip(*args: str, cwd: Path) -> None:
    """Runs pip with neither network nor dependencies: setuptools is the one of this environment."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run_python("-m", "pip", args[0], *options, *args[1:], cwd=cwd)


def build_wheel(checkout: Path, *, to: Path) -> zipfile.ZipFile:
    """The wheel of this checkout, open for reading."""
    pip("wheel", "-w", str(to), ".", cwd=checkout)
    (wheel,) = to.glob("fxzero-*.whl")
    return zipfile.ZipFile(wheel)


def expected_modules() -> set[str]:
    """Every Python file of the checkout, and every description of a machine, by its name in a wheel."""
    files = {
        f"fxzero/{path.relative_to(ROOT)}" for name in ("passes", "kernels") for path in (ROOT / name).rglob("*.py")
    }
    own = [path for path in (ROOT / "fxzero").rglob("*.py") if path.resolve() == path]
    own += (ROOT / "fxzero/cost/machines").glob("*.toml")
    return files | {str(path.relative_to(ROOT)) for path in own}


def wheel_faults(names: list[str], *, modules: set[str]) -> list[str]:
    """What a wheel with these file names lacks, or has too much."""
    faults = [f"{name} is not in the wheel" for name in sorted(modules - set(names))]
    if "fxzero/py.typed" not in names:
        faults.append("fxzero/py.typed is not in the wheel")
    for name in names:
        top = name.split("/")[0]
        if top != "fxzero" and not top.endswith(".dist-info"):
            faults.append(f"{name} is in the wheel, expected only fxzero/ and its dist-info")
    return faults


def test_checkout_that_is_not_installed(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    printed = run_python("-c", IMPORT_ALL, cwd=checkout).stdout.split()
    assert printed == [str(checkout / name) for name in ("fxzero", "fxzero/passes", "fxzero/kernels")]


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no-symlinks"])
def test_wheel_is_complete(tmp_path: Path, symlinks: bool) -> None:
    checkout = copy_checkout(tmp_path / "checkout", symlinks=symlinks)
    with build_wheel(checkout, to=tmp_path / "wheel") as wheel:
        assert wheel_faults(wheel.namelist(), modules=expected_modules()) == []
        wheel.extractall(tmp_path / "site")
    if symlinks:
        return  # the two wheels hold the same modules; importing one of them is enough
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = run_python("-c", IMPORT_ALL, cwd=elsewhere, path=[site]).stdout.split()
    assert printed == [str(site / name) for name in ("fxzero", "fxzero/passes", "fxzero/kernels")]


def test_editable_install(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--target", str(site), "-e", ".", cwd=checkout)
    # -S, and torch's folder on the path: the .pth files of `site` are read, those of this environment not.
    # They may name another editable fxzero.
    script = f"import site; site.addsitedir({str(site)!r})\n{IMPORT_ALL}"
    packages = Path(torch.__file__).parents[1]
    printed = run_python("-S", "-c", script, cwd=elsewhere, path=[site, packages]).stdout.split()
    assert {Path(place).resolve() for place in printed} == {checkout / name for name in ("fxzero", "passes", "kernels")}


def test_bare_passes_is_refused() -> None:
    done = run_python("-c", "import passes", cwd=ROOT, fails=True)
    assert "ImportError" in done.stderr
    assert "import fxzero.passes" in done.stderr


def test_kernels_cannot_shadow_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


def test_an_incomplete_or_untidy_wheel_is_found() -> None:
    machine = "fxzero/cost/machines/h100.toml"
    good = ["fxzero/passes/a.py", "fxzero/py.typed", "fxzero-0.1.0.dist-info/METADATA", machine]
    modules = {"fxzero/passes/a.py", machine}
    assert wheel_faults(good, modules=modules) == []
    for bad in (good[1:], [*good, "passes/a.py"], [*good, "kernels/b.py"], [good[0], *good[2:]], good[:3]):
        assert len(wheel_faults(bad, modules=modules)) == 1
