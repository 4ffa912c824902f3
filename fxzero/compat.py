"""Where private names of torch are used, one function each, for torch 2.11 to 2.13.

Those of its distributed part are in `compat_distributed.py`, those of its compiler in `compat_dynamo.py` and
`compat_inductor.py`; no other module has any. Everything there is a thin door: no fxzero logic, no state. When a torch
release moves something, these are the files to change.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import sympy
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def is_op(target: object) -> TypeGuard[torch._ops.OpOverload]:
    """Whether the target of a call is an op overload (and not a Python function)."""
    return isinstance(target, torch._ops.OpOverload)


def versions_of(owned: torch.Tensor) -> tuple[int, ...]:
    """How often a tensor was written, and the local one of a DTensor, as far as torch counts.

    A DTensor counts writes to itself, not to its local tensor; what is written through `.data` nobody counts.
    """
    local = getattr(owned, "_local_tensor", None)
    return (owned._version,) if local is None else (owned._version, local._version)


def new_shape_env() -> ShapeEnv:
    """A fresh symbol environment for the scalars of one capture."""
    return ShapeEnv()


def new_fake_mode(shape_env: ShapeEnv | None = None) -> Any:
    """A fake tensor mode that also takes real tensors that a model keeps outside parameters and buffers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=shape_env or ShapeEnv())


def fake_like(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The fake twin of `tensor`, with static shape."""
    return mode.from_tensor(tensor, static_shapes=True)


def is_fake(value: object) -> bool:
    """Whether `value` is a fake tensor."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def is_data_dependent(error: BaseException) -> bool:
    """Whether a trace failed because Python asked for a value that only real data has."""
    from torch._subclasses import fake_tensor
    from torch.fx.experimental import symbolic_shapes

    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        symbolic_shapes.GuardOnDataDependentSymNode,
    )
    return isinstance(error, kinds)


def lacks_fake_kernel(error: BaseException) -> bool:
    """Whether a trace failed because an op cannot run on fake tensors."""
    from torch._subclasses import fake_tensor

    return isinstance(error, (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException))


def fake_mode_of(value: torch.Tensor) -> Any:
    """The mode that a fake tensor belongs to."""
    return value.fake_mode  # type: ignore[attr-defined]


def symbolic_float(env: ShapeEnv, value: float, *, name: str) -> Any:
    """A symbolic float with a hint: arithmetic on it is traced, comparisons become recorded guards.

    Returns:
        The SymFloat, or the plain float where torch makes none of this value (nan, inf).
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = env.create_unspecified_symbol(float(value), source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symfloatnode(symbol, hint=float(value), source=source)


def symbol_of(value: Any) -> Any:
    """The sympy symbol behind a SymFloat made by `symbolic_float`."""
    return value.node.expr


def tracer() -> Any:
    """What makes the trace in progress: its `graph`, with nodes that will be dropped, and its constants in `root`."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    assert mode is not None, "only while tracing"
    return mode.tracer


def rebind_scalar(recorded: Any, replacement: Any) -> torch.fx.Node:
    """`replacement` (symbolic, with a hint) stands for the same traced scalar as `recorded` (without one).

    Returns:
        The node that yields the scalar.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_slot, set_proxy_slot

    proxy = get_proxy_slot(recorded, tracer())
    set_proxy_slot(replacement, tracer(), proxy)
    return proxy.force().node  # type: ignore[union-attr]


def node_of(recorded: Any) -> torch.fx.Node | None:
    """The node of the trace in progress that yields a symbolic scalar; None for plain numbers."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    if mode is None or not isinstance(recorded, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    proxy = get_proxy_slot(recorded, mode.tracer, None)
    return None if proxy is None else proxy.force().node


def no_function_modes() -> Any:
    """Run the block outside of all torch function modes: each costs some microseconds at each look at a tensor."""
    return torch._C.DisableTorchFunction()


def has_global_step_hooks() -> bool:
    """Whether there are hooks around the step of every optimizer."""
    from torch.optim import optimizer

    return bool(optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks)


@contextlib.contextmanager
def compiling(enabled: bool) -> Iterator[None]:
    """Let `torch.compiler.is_compiling()` be true within the block, if `enabled`."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = before or enabled
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def random_devices() -> list[torch.device]:
    """One device for each default random generator that a step may draw from."""
    return [torch.device("cpu")] + ([torch.device("cuda", torch.cuda.current_device())] if has_cuda() else [])


def has_cuda() -> bool:
    """Whether there is a GPU whose generator can be asked."""
    return torch.cuda.is_available()


def random_state(device: torch.device) -> bytes:
    """The state of the default random generator of `device`."""
    with no_modes():
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" and has_cuda() else torch.get_rng_state()
        return state.numpy().tobytes()


def move_random_state(device: torch.device) -> None:
    """Draw one number from the default random generator of `device`."""
    with no_modes():
        torch.rand((), device=device if device.type == "cuda" and has_cuda() else "cpu")


@contextlib.contextmanager
def quiet_fake_kernels() -> Iterator[None]:
    """Let torch not log that a fake kernel failed: the block reports it itself."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def traced_nodes() -> int:
    """How many nodes the trace in progress holds; 0 outside of one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return 0 if mode is None else len(mode.tracer.graph.nodes)


def value_range(env: ShapeEnv, symbol: Any) -> tuple[Any, Any]:
    """The least and the greatest value that a symbol may have, as sympy numbers."""
    known = env.var_to_range[symbol]
    return known.lower, known.upper


def hints_of(env: ShapeEnv) -> dict[Any, Any]:
    """Symbol -> the number that it had while the trace in `env` was made."""
    known = getattr(env, "backed_var_to_val", None)  # before 2.12: var_to_val
    return dict(env.var_to_val if known is None else known)  # type: ignore[attr-defined]


def functional_mode() -> Any:
    """The mode under which in-place ops and views are traced as functional ones."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    return FunctionalTensorMode()


def to_functional(tensor: torch.Tensor) -> torch.Tensor:
    """Wrap a tensor for `functional_mode`."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return FunctionalTensor.to_functional(tensor)


def from_functional(tensor: torch.Tensor, *, sync: bool = True) -> torch.Tensor:
    """The current value of a tensor wrapped by `to_functional`; without `sync`, before writes to what it views."""
    if sync:
        torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)  # type: ignore[attr-defined]


@contextlib.contextmanager
def reparametrized(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Run the block with `module`'s parameters and buffers replaced, tied names together."""
    from torch.nn.utils.stateless import _reparametrize_module

    with _reparametrize_module(module, dict(tensors), tie_weights=True):
        yield


@contextlib.contextmanager
def tracing_context(fake_mode: Any) -> Iterator[None]:
    """Make `fake_mode` the one that nested tracing tools find."""
    from torch._guards import TracingContext, tracing

    with tracing(TracingContext(fake_mode)):
        yield


def tag_backward_nodes(loss: torch.Tensor) -> None:
    """Let nodes traced while `loss` is differentiated carry the sequence number of their forward node."""
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    if loss.grad_fn is not None:
        setup_stacktrace_preservation_hooks([loss.grad_fn])


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell LR schedulers that the optimizer has stepped (they warn otherwise)."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def optimizer_hooks(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the step hooks that a user registered on `optimizer`."""
    found = []
    for attribute in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        found += [getattr(hook, "__name__", repr(hook)) for hook in getattr(optimizer, attribute, {}).values()]
    return found


def symbolic_int(env: ShapeEnv, value: int, *, name: str) -> Any:
    """A symbolic int with a hint, not specialized on 0 or 1; see `symbolic_float`."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = env.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=value, source=source)


def symbolic_size(env: ShapeEnv, value: int, *, name: str) -> Any:
    """A symbolic size of a tensor from 2 to 2**31 - 1, with a hint: 0 and 1 are taken to be other programs."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = env.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    # with an upper bound, a slice to the end is known to take all, and is left out as it is for numbers
    env.constrain_symbol_range(symbol, compiler_min=2, compiler_max=2**31 - 1)
    return env.create_symintnode(symbol, hint=value, source=source)


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal at all sizes of the batch: numbers, symbols, or sympy expressions of these."""
    one, other = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (one, other))
    return bool(one == other) or bool(sympy.expand(one - other) == 0)


def pinned(env: ShapeEnv, symbol: Any) -> bool:
    """Whether a trace in `env` has taken one number for a symbol."""
    least, most = value_range(env, symbol)
    return not env.replacements.get(symbol, symbol).free_symbols or bool(least == most)


def kernels_for_symbols() -> contextlib.AbstractContextManager[None]:
    """Within the block, ops whose kernels want plain sizes run by others that take symbols."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def dispatch_mode() -> Any:
    """The base class of modes that see every op before it is traced."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def flatten_with_path(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """((path, leaf) list, structure) of a pytree."""
    from torch.utils import _pytree as pytree

    return pytree.tree_flatten_with_path(tree)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The pytree with `function` applied to each leaf."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map(function, tree)


def unflatten(leaves: list[Any], structure: Any) -> Any:
    """The pytree that `flatten_with_path` took apart."""
    from torch.utils import _pytree as pytree

    return pytree.tree_unflatten(leaves, structure)


def no_modes() -> Any:
    """Run the block on real tensors, outside of every tracing and fake mode."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def is_profiled() -> bool:
    """Whether torch's profiler records this thread."""
    return torch.autograd._profiler_enabled()
