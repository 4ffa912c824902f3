"""What torch.compile calls.

[Note: the way of a graph]
Dynamo hands over what it has captured, from one graph break to the next; AOTAutograd traces forward and backward of it
(`joint`); the passes that a plan asks for rewrite both as one step graph (`programs`); that is split where backward
begins (`halves`), each half becomes a program, and AOTAutograd calls them (`calls`). Where Dynamo leaves sizes open,
this happens once for each set of sizes (`shapes`).

[Note: errors of a plan]
What a backend raises Dynamo wraps, or hides where errors are suppressed. A plan that cannot be honoured must be seen as
it is: such a graph gets a function that raises the error when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from fxzero.backend.joint import names_of
from fxzero.backend.options import read_options
from fxzero.backend.programs import Compilation
from fxzero.backend.shapes import ByShape, is_open, numbers_asked
from fxzero.errors import PlanError


def fxzero_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """A graph that Dynamo has captured becomes programs of fxzero; see [Note: the way of a graph].

    Args:
        module: the graph.
        example_inputs: fake tensors and numbers, one an input; sizes may be symbols.
        options: of torch.compile: "plan", or keys of a plan; and "dump".
        mode: of torch.compile; must be left out.

    Returns:
        What is called in the graph's place. It raises PlanError if the plan cannot be honoured.

    Raises:
        CaptureError: if the graph holds what fxzero has no form for. Dynamo wraps it in its `BackendCompilerFailed`.
        LoweringError: if a region cannot be compiled; wrapped, too.
    """
    try:
        chosen = read_options(options, mode=mode)
        names = names_of(module)

        def compiled(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            of_inputs = [name for name, kept in zip(names, example_inputs, strict=True) if not is_number(kept)]
            return Compilation(chosen, of_inputs).run(graph, inputs)

        if not any(map(is_open, example_inputs)) and not numbers_asked(module):
            return compiled(module, example_inputs)
        return torch.compiler.disable(ByShape(module, example_inputs, compiled).run)
    except PlanError as error:
        return _raising(error)


def is_number(value: Any) -> bool:
    """Whether an input is a number, not a tensor."""
    return not isinstance(value, torch.Tensor)


def _raising(error: PlanError) -> Callable[..., NoReturn]:
    def call(*_: Any) -> NoReturn:
        raise error

    return torch.compiler.disable(call)
