"""What torch.compile calls.

[Note: the way of a graph]
Dynamo hands over what it has captured, from one graph break to the next. Sharded parameters among its inputs become
rows (`rows`). AOTAutograd traces forward and backward of it (`joint`); what that says of sharding is taken out
(`one_device`), the passes that a plan asks for rewrite both as one step graph (`programs`), and it is split where
backward begins (`halves`). Each half becomes a program, and AOTAutograd calls them (`calls`). Where Dynamo leaves sizes
open, this happens once for each set of sizes (`shapes`).

[Note: errors of a plan]
What a backend raises Dynamo wraps, or hides where errors are suppressed. A plan that cannot be honoured must be seen as
it is: such a graph gets a function that raises the error when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from fxzero.backend.joint import Name, names_of
from fxzero.backend.open_sizes import OpenSizes
from fxzero.backend.options import Options, read_options
from fxzero.backend.programs import Compilation
from fxzero.backend.rows import read_rows, sharded_in
from fxzero.backend.shapes import ByShape, is_open, numbers_asked
from fxzero.backend.sharded import Sharded, tell
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
        example_inputs: tensors, fake ones or real, and numbers, one an input; sizes may be symbols.
        options: of torch.compile: "plan", or keys of a plan; and "dump".
        mode: of torch.compile; must be left out.

    Returns:
        What is called in the graph's place. It raises PlanError if the plan cannot be honoured.

    Raises:
        CaptureError: if the graph holds what fxzero has no form for. Dynamo wraps it in its `BackendCompilerFailed`.
        LoweringError: if a region cannot be compiled; wrapped, too.
    """
    sharded: Sharded | None = None
    try:
        sharded, names = sharded_in(module), names_of(module)
        reads = any(name.kind == "parameter" for name in names)
        chosen = read_options(options, mode=mode, sharded=sharded, reads_parameters=reads)
        with _telling(sharded, but=PlanError):  # that comes at the call, and is told there
            return _compiled(module, example_inputs, names, chosen)
    except PlanError as error:
        return _raising(error, sharded)


def _compiled(
    module: fx.GraphModule, example_inputs: Sequence[Any], names: Sequence[Name], options: Options
) -> Callable[..., Any]:
    """What runs a graph: made here, or at its first call where sizes are open."""
    given = read_rows(module, example_inputs)

    def compiled(graph: fx.GraphModule, inputs: Sequence[Any], sizes: OpenSizes | None = None) -> Callable[..., Any]:
        of_inputs = [name for name, kept in zip(names, given.examples, strict=True) if not is_number(kept)]
        return Compilation(options, of_inputs, sizes).run(graph, inputs)  # type: ignore[no-any-return]

    def compiled_later(graph: fx.GraphModule, inputs: Sequence[Any], sizes: OpenSizes) -> Callable[..., Any]:
        with _telling(options.sharded):
            return compiled(graph, inputs, sizes)

    if not any(map(is_open, given.examples)) and not numbers_asked(module):
        return given.around(compiled(module, given.examples))
    return given.around(torch.compiler.disable(ByShape(module, given.examples, compiled_later).run))


@contextlib.contextmanager
def _telling(sharded: Sharded | None, but: tuple[type[Exception], ...] | type[Exception] = ()) -> Iterator[None]:
    """If this rank cannot compile a graph of a sharded model, the others learn of it."""
    try:
        yield
    except Exception as error:
        if sharded is not None and not isinstance(error, but):
            tell(sharded.agreement, error)
        raise


def is_number(value: Any) -> bool:
    """Whether an input is a number, not a tensor."""
    return not isinstance(value, torch.Tensor)


def _raising(error: PlanError, sharded: Sharded | None) -> Callable[..., NoReturn]:
    def call(*_: Any) -> NoReturn:
        if sharded is not None:
            tell(sharded.agreement, error)
        raise error

    return torch.compiler.disable(call)
