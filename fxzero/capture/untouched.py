"""A trace leaves no trace: modules and random generators are afterwards as they were."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo what a forward leaves on modules (cached tables, counters), and restore the random state."""
    saved = [
        (module, {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    lists = [(v, list(v)) for module in model.modules() for v in vars(module).values() if isinstance(v, list)]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(enabled=True):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for kept, items in lists:
                kept[:] = items
            for module, attributes in saved:
                for name in set(vars(module)) - set(attributes):
                    vars(module).pop(name)
                vars(module).update(attributes)
