"""Regions run from their canonical text by torch's own ops, one after the other: all of lowering but the compiler.

Numbers of the host are numbers again, so that nothing rounds in another order than in the plain loop: bit-equality can
be asked for. That an op takes them as tensors is tested by itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fxzero import compat
from fxzero.lower import lower_regions, region_text, symbolic_text
from fxzero.lower.store import Function

aten = torch.ops.aten


class Interpreted:
    """Stands for the store: what it gives out is the text, run as it stands.

    Args:
        edit: changes the module of a text, to plant a fault.
    """

    def __init__(self, edit: Callable[[torch.fx.GraphModule], None] = lambda module: None) -> None:
        self.edit = edit
        self.texts: list[str] = []

    def get(self, text: str, make: Callable[[], Any]) -> tuple[Function, bool]:
        self.texts.append(text)
        with mock.patch.object(region_text, "with_tensors", lambda node: node.target):
            names = symbolic_text.names_in(json.loads(text))
            module, _ = region_text.read_region(text, compat.new_fake_mode(), dict.fromkeys(names, 2))
        self.edit(module)
        module.recompile()
        written = region_text.written_inputs(text)
        is_number = [False] * len(names) + [device == "number" for *_, device in json.loads(text)["inputs"]]

        def function(values: list[Any]) -> tuple[Any, ...]:
            inputs = list(values)
            values.clear()
            taken = (v.item() if number else v for v, number in zip(inputs, is_number, strict=True))
            results = module(*taken)
            for index, value in zip(written, results[len(results) - len(written) :], strict=True):
                inputs[index].copy_(value)
            return results[: len(results) - len(written)]

        return function, False

    def holds(self, text: str) -> bool:
        return True

    def conditions(self, text: str) -> list[str]:
        return []

    def answers(self, name: str, questions: list[str], measure: Callable[[str], str]) -> dict[str, str]:
        return dict.fromkeys(questions, "blas")


@contextlib.contextmanager
def interpreted(edit: Callable[[torch.fx.GraphModule], None] = lambda module: None) -> Iterator[Interpreted]:
    """Within the block regions are interpreted, and no compiler is needed."""
    store = Interpreted(edit)
    with (
        mock.patch.object(lower_regions, "Store", lambda **_: store),
        mock.patch("fxzero.compile.check_compiler", lambda device: None),
    ):
        yield store
