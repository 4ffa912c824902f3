"""Numbers that change from step to step: symbolic while tracing, guarded where they steer control flow.

[Note: scalars]
Learning rates, betas and step counts are Python numbers in eager mode, and their arithmetic is done in doubles on
the host. To be bit-equal the captured graph does the same: a float hyperparameter is a symbolic float, so that
`1 - beta1 ** step` becomes nodes that compute with Python floats, and `.item()` of a 0-dim host tensor (Adam's
`step`) is a node that reads it. Where an optimizer branches on such a number (`if weight_decay != 0`, RAdam's
`rho > 5`), the symbol's current value decides and the condition is recorded as a guard. A graph is used again only
while all its guards hold; a scheduler that merely changes values never recaptures.

A number that follows from no input at all is no variable: it is computed on the spot, as in eager mode. (The models
of transformers ask thus whether their own `arange` of positions holds several packed sequences; only with the answer
do they leave the causal mask to the attention kernel.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxzero import compat
from fxzero.graph.randomness import is_random

aten = torch.ops.aten


@dataclass(frozen=True)
class DerivedNumber:
    """A number that a step computed from sizes of the batch alone and then took for a constant.

    Args:
        program: function of the sizes that yields it.
        sizes: their expressions in the symbols of the batch.
        value: what it was at the sizes of the trace.
    """

    program: Callable[..., Any]
    sizes: tuple[Any, ...]
    value: Any


@dataclass(frozen=True)
class Read:
    """A number that was read from a 0-dim host tensor.

    Args:
        symbol: that stands for it.
        node: that yields it.
        value: what it is at present.
    """

    symbol: Any
    node: fx.Node
    value: float


class ScalarReader:
    """While tracing, gives every host scalar that is read by `.item()` its present value as a hint.

    It keeps a real twin of each 0-dim host tensor among the state (and of what is computed from twins alone).

    Args:
        env: the symbol environment of the capture.

    Attributes:
        reads: each number with a hint.
        sizes: the symbols of sizes of the batch, where those are symbolic.
        derived: the numbers that follow from these.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.sizes: set[Any] = set()
        self.derived: list[DerivedNumber] = []
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reads: list[Read] = []
        self.last_op: Any = None

    def follow(self, traced: torch.Tensor, real: torch.Tensor) -> None:
        """`traced` stands for `real` (a 0-dim host tensor)."""
        with compat.no_modes():
            self.twins[id(traced)] = (traced, real.detach().clone())

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace an op; returns what it yields, numbers with their hint."""
        self.last_op = func
        if self.sizes:
            with compat.kernels_for_symbols():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        known = bool(tensors) and all(id(t) in self.twins for t in tensors)
        if func is aten._local_scalar_dense.default:
            return self._hinted(out, self.twins[id(args[0])][1]) if known else self._constant(out)
        if not known:
            return out
        self._run_twin(func, args, kwargs, out)
        return out

    def _run_twin(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        def real(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self.twins[id(value)][1]
            if isinstance(value, (torch.SymFloat, torch.SymInt)):
                return value.node.hint
            return value

        if not isinstance(out, torch.Tensor) or out.dim() != 0:
            return
        with compat.no_modes():
            result = func(*map(real, args), **{k: real(v) for k, v in kwargs.items()})
        if isinstance(result, torch.Tensor):
            self.twins[id(out)] = (out, result)

    def _hinted(self, recorded: Any, real: torch.Tensor) -> Any:
        if not isinstance(recorded, torch.SymFloat):
            return recorded
        with compat.no_modes():
            value = float(real)
        hinted = self._symbolic(value)
        if not isinstance(hinted, torch.SymFloat):
            return recorded
        self.reads.append(Read(compat.symbol_of(hinted), compat.rebind_scalar(recorded, hinted), value))
        return hinted

    def read_again(self, read: Read, node: fx.Node) -> Any:
        """`node` yields a number too, which is at present the one of `read`; returns its symbol."""
        symbol = compat.symbol_of(self._symbolic(read.value))
        self.reads.append(Read(symbol, node, read.value))
        return symbol

    def present(self, traced: torch.Tensor) -> str | None:
        """The present value of a tensor that is followed, to the last bit; None for others."""
        if id(traced) not in self.twins:
            return None
        with compat.no_modes():
            return repr(self.twins[id(traced)][1].item())

    def _symbolic(self, value: float) -> Any:
        return compat.symbolic_float(self.env, value, name=f"read{len(self.reads)}")

    def _constant(self, recorded: Any) -> Any:
        """The value of a number that was read from a tensor, where that follows from no input and no random draw."""
        node = compat.node_of(recorded)
        if node is None:
            return recorded
        needed, sizes = self._origins(node)
        if any(n.op == "placeholder" or is_random(n) or (n.op == "get_attr" and not is_literal(n)) for n in needed):
            return recorded
        order = [n for n in node.graph.nodes if n in needed]
        program = _program(node, order, list(sizes))
        with compat.no_modes(), torch.no_grad():
            value = program(*(size.node.hint for size in sizes.values()))
        if sizes:
            self.derived.append(DerivedNumber(program, tuple(size.node.expr for size in sizes.values()), value))
        return value

    def _origins(self, node: fx.Node) -> tuple[set[fx.Node], dict[fx.Node, torch.SymInt]]:
        """What a node is computed from, down to sizes of the batch; and those, with their symbols."""
        needed: set[fx.Node] = set()
        sizes: dict[fx.Node, torch.SymInt] = {}
        stack = [node]
        while stack:
            n = stack.pop()
            val = n.meta.get("val")
            if isinstance(val, torch.SymInt) and val.node.expr.free_symbols <= self.sizes:
                sizes[n] = val
            elif n not in needed:
                needed.add(n)
                stack.extend(n.all_input_nodes)
        return needed, sizes


def _program(node: fx.Node, order: list[fx.Node], sizes: list[fx.Node]) -> Callable[..., Any]:
    """The few ops that lead to one number, cut from the trace in progress, as a function of `sizes`."""
    graph = fx.Graph()
    mapping = {n: graph.placeholder(n.name) for n in sizes}
    for n in order:
        mapping[n] = graph.node_copy(n, lambda n: mapping[n])
    graph.output(mapping[node])
    root = compat.tracer().root
    constants = {str(n.target): getattr(root, str(n.target)) for n in order if n.op == "get_attr"}
    return fx.GraphModule(constants, graph).forward


def is_literal(constant: torch.fx.Node) -> bool:
    """Whether a real tensor in a trace comes from `torch.tensor(...)`: other ones belong to somebody."""
    return all(user.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default) for user in constant.users)


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


class SymbolicTensors(TorchFunctionMode):
    """While tracing, numbers that become tensors stay symbolic; torch would freeze their present value.

    That is `torch.tensor(number)`, and `x[mask] = number`, which is traced as the pointwise op that it means.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], (torch.SymFloat, torch.SymInt)):
            dtype = torch.get_default_dtype() if isinstance(args[0], torch.SymFloat) else torch.int64
            return torch.scalar_tensor(args[0], **{"dtype": dtype, **kwargs})  # type: ignore[arg-type]
        if func is torch.Tensor.__setitem__ and isinstance(args[2], _NUMBERS) and _is_mask_of(args[0], args[1]):
            args[0].masked_fill_(args[1], args[2])
            return None
        return func(*args, **kwargs)


def _is_mask_of(tensor: torch.Tensor, index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool and index.shape == tensor.shape
