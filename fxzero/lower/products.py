"""Matrix products by the library that is faster here, as measured once a shape.

[Note: two libraries]
On the CPU torch multiplies float32 matrices by the BLAS that it was built with (MKL, where it is), and has oneDNN
beside it. Which is faster depends on processor, shape and layout: on an AMD EPYC with AVX-512, one thread, a head of
512 x 8192 ran forward at 97 GFLOP/s by oneDNN and at 70 by MKL, the gradient of a 512 x 512 weight at 75 by both. So
each distinct product is tried both ways, in turns, when a program with it is first lowered, and the answers are kept
on disk for this machine. They are no part of the program that ranks agree on: each may multiply as is best where it
runs. The two round differently, as two versions of one library do.

A step does not multiply the same matrices again and again: factors come from memory, and results go to memory that
was something else before. So each round takes other factors, and keeps some results: 512 x 512 matrices ran at 102 and
109 GFLOP/s where they were in the cache, at 86 and 102 where not.

A first factor that stands column after column, as in the gradient of a weight, is left to torch's own: oneDNN takes a
copy of it, as large as the logits in the gradient of a head, and gains nothing (91 and 94 GFLOP/s there).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero import compat_inductor
from fxzero.lower.store import Store

aten = torch.ops.aten

_LEAST_FLOPS = 2**23  # below, calling takes as long as computing
_ROUNDS = 12
_MOST_COPIES = 7  # of the factors, taken in turns, and of the results that are there at a time
_COPIES_BYTES = 2**26  # of all of them, unless one is larger: more than caches hold
_GAIN = 0.97  # of the time of torch's own, at most, for the other to be taken


class Products:
    """Which op computes the matrix products of a program, on this machine.

    Args:
        store: where answers are kept.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, str] = {}

    def choose(self, nodes: list[fx.Node]) -> dict[fx.Node, Any]:
        """The products among these calls that another op than their own computes faster -> that op."""
        signatures = {node: _signature(node) for node in nodes if _may_be_chosen(node)}
        missing = set(signatures.values()) - self._known.keys()
        if missing:
            self._known |= self._store.answers("matrix_products", sorted(missing), _measure)
        return {
            node: compat_inductor.mm_by_onednn()
            for node, signature in signatures.items()
            if self._known[signature] == "onednn"
        }


def _may_be_chosen(node: fx.Node) -> bool:
    if node.target is not aten.mm.default or not compat_inductor.has_onednn():
        return False
    a, b = (source.meta["val"] for source in node.args)  # type: ignore[union-attr]
    if a.device.type != "cpu" or a.dtype != torch.float32 or not a.is_contiguous() or not _is_dense(b):
        return False
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] >= _LEAST_FLOPS


def _is_dense(val: torch.Tensor) -> bool:
    """Whether a matrix stands row after row, or column after column."""
    return val.is_contiguous() or val.t().is_contiguous()


def _signature(node: fx.Node) -> str:
    """Shapes and layouts of a product: `512x1408 * 1408x512t`, t where a factor stands column after column."""
    factors = (source.meta["val"] for source in node.args)  # type: ignore[union-attr]
    return " * ".join(f"{v.shape[0]}x{v.shape[1]}{'' if v.is_contiguous() else 't'}" for v in factors)


def _measure(signature: str) -> str:
    """The library that is faster for a product: "onednn" or "blas"."""
    generator = torch.Generator().manual_seed(0)  # a model's random numbers must not depend on what was measured before
    factors = [[_random(factor, generator) for factor in signature.split(" * ")]]
    copies = min(_MOST_COPIES, max(1, _COPIES_BYTES // sum(factor.nbytes for factor in factors[0])))
    factors += [[factor.clone() for factor in factors[0]] for _ in range(copies - 1)]
    seconds: dict[str, list[float]] = {"blas": [], "onednn": []}
    ops: dict[str, Callable[..., Any]] = {"blas": aten.mm.default, "onednn": compat_inductor.mm_by_onednn()}
    results: deque[torch.Tensor] = deque(maxlen=copies)
    for round_ in range(_ROUNDS + 1):
        for turn, (name, op) in enumerate(ops.items()):
            a, b = factors[(2 * round_ + turn) % copies]
            start = time.perf_counter()
            result = op(a, b)
            if round_:  # the first makes what a library keeps for a shape
                seconds[name].append(time.perf_counter() - start)
            results.append(result)
    blas, onednn = (statistics.median(seconds[name]) for name in ("blas", "onednn"))
    return "onednn" if onednn < _GAIN * blas else "blas"


def _random(factor: str, generator: torch.Generator) -> torch.Tensor:
    rows, columns = map(int, factor.rstrip("t").split("x"))
    shape, turned = (columns, rows) if factor.endswith("t") else (rows, columns), factor.endswith("t")
    values = torch.rand(shape, generator=generator)
    return values.t() if turned else values
