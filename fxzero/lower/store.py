"""Compiled regions on disk: text files that a person can read, in a folder that only the user can write.

[Note: what is stored]
`<key>.json` holds a region's canonical text, `<key>.py` the Python module that was made of it; `key` is the digest of
that text, of the lowering, of the version of torch and of the machine's instructions and threads; of a Triton kernel's
text, of what wrote it instead of the machine. Inductor's C++ or Triton kernels are in its own files below the same
folder, and are built again where one is gone. Nothing is pickled. Running what others wrote would be as bad as
unpickling it, so a folder that others could write to is refused. Several ranks of a host share it: a lock file per key
makes one of them compile and the others read.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fxzero import compat_inductor
from fxzero.errors import LoweringError
from fxzero.lower import triton
from fxzero.lower.alignment import Function, taking_any_alignment
from fxzero.lower.inductor import OPTIONS, Compiled, PinnedError
from fxzero.lower.region_text import written_inputs

VARIABLE = "FXZERO_CACHE_DIR"


def default_folder() -> Path:
    """Where compiled regions are kept: $FXZERO_CACHE_DIR, else fxzero in the user's folder for caches."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxzero"


class Store:
    """Compiled regions in a folder.

    Args:
        folder: made where it is not there yet.
        lowering: what makes the modules: "inductor" or "triton".

    Raises:
        LoweringError: others may write to the folder, or it cannot be made.
    """

    def __init__(self, folder: Path | None = None, *, lowering: str = "inductor") -> None:
        self._lowering = lowering
        self.folder = (folder or default_folder()).absolute()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
        except OSError as error:
            raise self._refused(str(error)) from error
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise self._refused(f"owner {status.st_uid}, mode {stat.filemode(status.st_mode)}")
        self._regions = self.folder / "regions"
        self._regions.mkdir(mode=0o700, exist_ok=True)

    def _refused(self, got: str) -> LoweringError:
        return LoweringError.of(
            where=f"the folder of compiled regions, {self.folder}",
            expected="one that this user owns and nobody else can write to",
            got=got,
            fix=f"chmod 700 it, or set {VARIABLE} to another one",
        )

    def path(self, text: str) -> Path:
        """The file that the module of a region's text is in, if there."""
        made_by = triton.generator() if self._lowering == "triton" else f"{self._machine}{sorted(OPTIONS.items())}"
        return self._regions / f"{_digest(f'{made_by}{text}')}.py"

    def get(self, text: str, make: Callable[[], Compiled]) -> tuple[Function, bool]:
        """The function of a region, and whether it had to be made.

        Args:
            text: the region's canonical text.
            make: compiles it, where it is not there.

        Raises:
            PinnedError: it cannot be compiled for all sizes, as was found now or before.
        """
        path = self.path(text)
        with self._locked(path), self._caching():
            kept = self._kept(path, text)
            made = kept is None
            if kept is not None and "refused" in kept:
                raise PinnedError(kept["refused"])
            if kept is None:
                compiled = self._made(path, text, make)
                kept = {"region": text, "aligned": compiled.aligned, "conditions": compiled.conditions}
                self._write(path.with_suffix(".json"), json.dumps(kept))
                self._write(path, compiled.source)
            with self._loading():
                function = _load(path)
            return taking_any_alignment(function, aligned=kept["aligned"], written=written_inputs(text)), made

    def _made(self, path: Path, text: str, make: Callable[[], Compiled]) -> Compiled:
        try:
            return make()
        except PinnedError as error:
            self._write(path.with_suffix(".json"), json.dumps({"region": text, "refused": str(error)}))
            raise

    def conditions(self, text: str) -> list[str]:
        """What must be true of the sizes that the text of a region leaves open; it must be there."""
        kept = self._kept(self.path(text), text)
        return [] if kept is None else kept.get("conditions", [])

    def _caching(self) -> contextlib.AbstractContextManager[None]:
        if self._lowering == "triton":
            return contextlib.nullcontext()
        return compat_inductor.inductor_cache(str(self.folder / "inductor"))

    def _loading(self) -> contextlib.AbstractContextManager[Any]:
        if self._lowering == "triton":
            return contextlib.nullcontext()
        return compat_inductor.inductor_options({**OPTIONS, "compile_threads": 1})

    def answers(self, name: str, questions: list[str], measure: Callable[[str], str]) -> dict[str, str]:
        """What was measured on this machine; what nobody has asked yet is measured now, by one process at a time.

        Args:
            name: of the file.
            questions: to answer.
            measure: answers one.
        """
        path = self._regions / f"{name}-{_digest(self._machine)}.json"
        with self._locked(path):
            try:
                known = json.loads(path.read_text())
            except (OSError, ValueError):
                known = {}
            missing = [question for question in questions if question not in known]
            known |= {question: measure(question) for question in missing}
            if missing:
                self._write(path, json.dumps(known, indent=1, sort_keys=True))
        return {question: known[question] for question in questions}

    @functools.cached_property
    def _machine(self) -> str:
        """What compiled code and measured answers hold for."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        return f"{torch.__version__} {compat_inductor.vector_instructions()} {torch.get_num_threads()} threads, {gpu}"

    def holds(self, text: str) -> bool:
        """Whether the region of a text is there, whole."""
        return self._kept(self.path(text), text) is not None

    @staticmethod
    def _kept(path: Path, text: str) -> dict[str, Any] | None:
        """What stands beside a region's module; None where one of the two is missing or not of this region."""
        try:
            kept = json.loads(path.with_suffix(".json").read_text())
            there = path.exists() or "refused" in kept
            return kept if there and kept["region"] == text else None
        except (OSError, ValueError, KeyError):
            return None  # written half, by a process that was ended

    @staticmethod
    def _write(path: Path, content: str) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(content)
        partial.rename(path)

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _load(path: Path) -> Function:
    """The function of a module on disk."""
    spec = importlib.util.spec_from_file_location(f"fxzero_region_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.call
