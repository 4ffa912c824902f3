"""Which module a node comes from: its path, noted on every node that is traced while the module runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx.traceback import annotate
from torch.nn.modules import module as nn_module

from fxzero.capture.checks import check_host_random
from fxzero.capture.draws import host_random_state


@contextlib.contextmanager
def module_paths(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Within the block, nodes bear the path of the module whose forward runs; draws on the host are refused.

    Args:
        model: the one whose modules have paths.
        path: kept up to date: the paths of the modules that run, outermost first.
    """
    names = {module: name for name, module in model.named_modules(remove_duplicate=True)}
    entered: list[contextlib.ExitStack] = []
    before = host_random_state()

    def drew() -> None:
        check_host_random(before, where=f"module {(path or [''])[-1]!r}")

    def enter(module: nn.Module, _: Any) -> None:
        drew()
        if module in names:
            path.append(names[module])
            scope = contextlib.ExitStack()
            scope.enter_context(annotate({"module": names[module]}))
            entered.append(scope)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        drew()
        if module in names:
            path.pop()
            entered.pop().close()

    handles = [
        nn_module.register_module_forward_pre_hook(enter),
        nn_module.register_module_forward_hook(leave),
    ]
    try:
        with annotate({"module": ""}):
            yield
        check_host_random(before, where="loss, backward")
    finally:
        while entered:
            entered.pop().close()
        for handle in handles:
            handle.remove()
