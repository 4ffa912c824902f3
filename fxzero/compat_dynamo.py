"""The private names of torch.compile's front end that fxzero uses; one function each, for torch 2.11 to 2.13.

Beside compat.py and compat_inductor.py: a thin door to TorchDynamo and AOTAutograd, no fxzero logic, no state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

Boxed = Callable[[list[Any]], Sequence[Any]]


def boxed(function: Boxed) -> Boxed:
    """A function that does the same, marked as one that takes its inputs in a list and empties it."""

    def call(values: list[Any]) -> Sequence[Any]:
        return function(values)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def aot_compiled(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    forward: Callable[[fx.GraphModule, Sequence[Any]], Boxed],
    backward: Callable[[fx.GraphModule, Sequence[Any]], Boxed],
    inference: Callable[[fx.GraphModule, Sequence[Any]], Boxed],
) -> Callable[..., Any]:
    """A module of Dynamo's as AOTAutograd runs it: it keeps the meaning of views, aliases and mutated inputs.

    Args:
        module: as Dynamo gives it.
        inputs: fake tensors of one mode.
        partition: (joint graph, its inputs, num_fwd_outputs=, ..) -> forward and backward.
        forward, backward, inference: (graph, its inputs) -> what runs it.
    """
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(
        fw_compiler=forward, bw_compiler=backward, inference_compiler=inference, partition_fn=partition
    )
    return compiler(module, inputs)


@contextlib.contextmanager
def apart(mode: Any) -> Iterator[None]:
    """Within the block a graph is compiled by itself, on fake tensors of `mode`, though programs run around it."""
    from torch._guards import TracingContext, tracing
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), tracing(TracingContext(mode)):
        yield


def static_mode() -> Any:
    """A fake tensor mode in which every size is a number."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The parameters that a module owns itself, by name; where Dynamo reads one, its source is as of an attribute."""
    return module._parameters


def source_of(placeholder: fx.Node) -> str:
    """Where an input of Dynamo's graph comes from: L['self']._modules['head']._parameters['weight']; "" if unknown."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def position_of(placeholder: fx.Node) -> int | str | None:
    """Which input of Dynamo's graph one of AOTAutograd's is.

    Returns:
        Its position, or the name of the module's own tensor; None where it stands for several, such as a common base.
    """
    from torch._functorch._aot_autograd import descriptors

    found = placeholder.meta.get("desc")
    if isinstance(found, (descriptors.ParamAOTInput, descriptors.BufferAOTInput)):
        return str(found.target)
    return int(found.idx) if isinstance(found, descriptors.PlainAOTInput) else None


def mutated(graph: fx.Graph) -> set[fx.Node]:
    """The inputs of AOTAutograd's graph whose next value is among its outputs: they are written to after it."""
    from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput

    found = graph.output_node().meta.get("desc") or ()
    written = [output.mutated_input for output in found if isinstance(output, InputMutationAOTOutput)]
    return {node for node in graph.find_nodes(op="placeholder") if node.meta.get("desc") in written}


def is_tangent(placeholder: fx.Node) -> bool:
    """Whether an input of a joint graph is the gradient of an output."""
    return "tangents" in str(placeholder.target)


def belongs_to_backward(node: fx.Node) -> bool:
    """Whether a node of a joint graph was traced while it was differentiated."""
    return node.meta.get("partitioner_tag") == "is_backward"


def is_checkpointed(node: fx.Node) -> bool:
    """Whether the model itself wants a node computed again in backward (`torch.utils.checkpoint`)."""
    from torch.utils.checkpoint import CheckpointPolicy

    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def module_of(node: fx.Node) -> str:
    """The innermost module whose forward made a node, or the node that it differentiates: L['self'].layers.0; or ""."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    innermost = next(reversed(stack.values()), ("",))
    return str(innermost[0])


def is_higher_order(target: Any) -> bool:
    """Whether a call takes graphs or functions: a condition, a loop, a call that writes to its arguments."""
    return isinstance(target, torch._ops.HigherOrderOperator)
