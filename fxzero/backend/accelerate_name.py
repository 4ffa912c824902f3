"""The name of the backend for accelerate, whose list of backends is closed."""

from __future__ import annotations

import importlib
from typing import Any

from fxzero.errors import PlanError

_NAME = "FXZERO"


def allow_in_accelerate() -> None:
    """From now on accelerate, and so transformers' Trainer, takes "fxzero" for the name of a backend.

    accelerate (1.15) looks a backend up in an enumeration of its own before torch is asked, so that no backend that an
    installed package registers can be named there. This adds the one name, for this process. Without it, compile the
    model before it goes to the Trainer: `model.compile(backend="fxzero")`.

    Raises:
        PlanError: if accelerate is not installed.
    """
    try:
        known: Any = importlib.import_module("accelerate.utils").DynamoBackend
    except ModuleNotFoundError as error:
        fix = "pip install accelerate, or leave this call out"
        raise PlanError.of("allow_in_accelerate()", expected="accelerate", got="no such package", fix=fix) from error
    before = known._missing_

    def missing(cls: Any, value: object) -> Any:
        if value != _NAME:
            return before(value)
        member = str.__new__(cls, _NAME)
        member._name_ = member._value_ = _NAME
        return member

    known._missing_ = classmethod(missing)
