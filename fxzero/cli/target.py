"""FILE.py:FUNCTION: the user's model, optimizer and example batch, loaded to be looked at."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxzero.capture.signature import flatten_batch
from fxzero.cli.usage import UsageError, choose
from fxzero.errors import FxzeroError

RETURNS = "(model, optimizer, example batch[, loss])"


@dataclass(frozen=True)
class Target:
    """What a step is captured from.

    Args:
        model, optimizer: as the function returned them.
        args, kwargs: the example batch; tensors of the meta device stand on the CPU.
        loss: `loss(model, *args, **kwargs)`, if the function returned one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[..., Any] | None


def load_target(text: str, **keywords: Any) -> Target:
    """Run FUNCTION of FILE.py and take what it returns.

    Args:
        text: "FILE.py:FUNCTION". Neighbours of the file can be imported by it.
        keywords: for the function.

    Raises:
        UsageError: if there is no such function, it raises, or it returns something else.
    """
    path, name = _split(text)
    try:
        with _importable(path.parent):
            function = _function(text, _load(path), name, keywords)
            returned = function(**keywords)
    except FxzeroError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError.of(
            where=text,
            expected=f"a function that returns {RETURNS}",
            got=f"{type(error).__name__}{_place(error, path)}: {_first_line(error)}",
            fix="correct the file; --traceback shows the whole way",
        ) from error
    return _checked(text, returned)


def keywords_of(text: str) -> dict[str, inspect.Parameter]:
    """The parameters of FUNCTION of FILE.py that can be given by name.

    Raises:
        UsageError: if there is no such function.
    """
    path, name = _split(text)
    try:
        with _importable(path.parent):
            found = getattr(_load(path), name, None)
    except Exception:  # load_target says what is wrong with the file
        found = None
    if not callable(found):
        load_target(text)
        return {}
    parameters = inspect.signature(found).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: parameter for key, parameter in parameters.items() if parameter.kind in by_name}


def _split(text: str) -> tuple[Path, str]:
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        fix = "write it as examples/llama_meta.py:llama_8b"
        raise UsageError.of("FILE.py:FUNCTION", expected="a Python file and a function in it", got=repr(text), fix=fix)
    path = Path(file)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no file of that name"
        raise UsageError.of(file, expected="a Python file", got=got, fix="correct the path")
    return path.resolve(), name


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _load(path: Path) -> ModuleType:
    # A name of its own: random.py must not become the module `random`.
    name = f"fxzero_target_{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _function(text: str, module: ModuleType, name: str, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if function is None:
        own = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        fix = choose(name, own) if own else "define it there"
        raise UsageError.of(text, expected=f"a function that returns {RETURNS}", got="none of that name", fix=fix)
    if not callable(function):
        fix = f"name a function that returns {RETURNS}"
        raise UsageError.of(text, expected="a function", got=type(function).__name__, fix=fix)
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError as error:
        fix = "give its parameters defaults, or write a function that calls it with them"
        expected = f"a function that takes {', '.join(keywords) or 'no arguments'}"
        raise UsageError.of(text, expected=expected, got=str(error), fix=fix) from error
    return function


def _checked(text: str, returned: Any) -> Target:
    def refuse(where: str, expected: str, value: Any) -> UsageError:
        got = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
        return UsageError.of(f"{text}{where}", expected=expected, got=got, fix=f"return {RETURNS}")

    if not isinstance(returned, tuple) or len(returned) not in (3, 4):
        raise refuse("", "a tuple of 3 or 4", returned)
    model, optimizer, batch, *rest = returned
    if not isinstance(model, nn.Module):
        raise refuse(", value 0", "the model, a torch.nn.Module", model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise refuse(", value 1", "the optimizer, a torch.optim.Optimizer", optimizer)
    loss = rest[0] if rest else None
    if loss is not None and not callable(loss):
        raise refuse(", value 3", "the loss, a function or None", loss)
    args, kwargs = _arguments(batch)
    return Target(model, optimizer, args, kwargs, loss)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as (args, kwargs) of the call that it is an example for, on a device that can be traced for."""
    given: tuple[tuple[Any, ...], dict[str, Any]] = ((batch,), {})
    if isinstance(batch, tuple):
        given = (batch, {})
    elif isinstance(batch, Mapping):
        given = ((), {str(key): value for key, value in batch.items()})
    leaves, structure = flatten_batch(*given)
    args, kwargs = structure.unflatten([_off_meta(leaf) for _, leaf in leaves])
    return tuple(args), kwargs


def _off_meta(leaf: Any) -> Any:
    """A tensor of the meta device as one on the CPU, as capture treats the parameters; its memory is never touched."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_meta:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).requires_grad_(leaf.requires_grad)


def _place(error: BaseException, path: Path) -> str:
    """Where in the user's file an exception comes from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    return f" at line {frames[-1].lineno}" if frames else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
