"""What ops that go through memory take: a few of each class, at several sizes, beside the op overhead of a program."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxzero import compat
from fxzero.calibrate.timing import Clock, Measured
from fxzero.cost.hardware import OpRate
from fxzero.graph import StepGraph
from fxzero.graph.step_graph import Result, StateEntry
from fxzero.runtime.program import Program

aten = torch.ops.aten

ROW = 256  # elements of a row, for ops that work on rows
WIDE_ROW = 2048  # of a row of logits
SMALLEST = 2**8  # elements of a call that is all overhead
SIZES = (2**14, 2**17, 2**20, 2**22)
FAST_SIZES = (2**14, 2**16)
TURNS_BYTES = 2**24  # calls take turns with inputs of this size together: a program does not repeat itself in a cache
FRESH_BYTES = 2**26
FRESH_ABOVE_BYTES = 2**25  # glibc takes no larger blocks from its heap but from the kernel (M_MMAP_THRESHOLD)


def _in_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.view(-1, min(width, x.numel()))


def _in_pairs(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2, min(16 * ROW, x.numel() // 2))


@functools.cache
def _mask(size: int, device: torch.device) -> torch.Tensor:
    """True in the first half, as masks are: in runs."""
    return torch.arange(size, device=device) < size // 2


def _rows(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.numel() // ROW, device=x.device).remainder_(ROW)


def _nll_loss_backward(x: torch.Tensor) -> Any:
    one = x.new_ones(())
    return aten.nll_loss_backward(one, x, x.new_zeros(len(x), dtype=torch.int64), None, 1, -100, one * len(x))


def _layer_norm_backward(x: torch.Tensor, y: torch.Tensor) -> Any:
    rows = x.shape[0]
    mean, rstd = y[:rows].view(rows, 1), y[:rows].view(rows, 1)
    return aten.native_layer_norm_backward(x, x, [ROW], mean, rstd, y[:ROW], y[:ROW], [True, True, True])


Call = Callable[[torch.Tensor, torch.Tensor], Any]
# class -> op -> (call on two tensors of n elements, elements that it reads and writes as a multiple of n)
OPS: dict[str, dict[str, tuple[Call, float]]] = {
    "pointwise": {
        "add": (lambda x, y: aten.add.Tensor(x, y), 3),
        "mul by a number": (lambda x, y: aten.mul.Tensor(x, 0.5), 2),
        "addcmul": (lambda x, y: aten.addcmul(x, x, y), 3),
    },
    "in_place": {
        "mul_": (lambda x, y: aten.mul_.Tensor(x, 1.0), 2),
        "add_": (lambda x, y: aten.add_.Tensor(x, y, alpha=1e-9), 3),
        "lerp_": (lambda x, y: aten.lerp_.Scalar(x, y, 0.1), 3),
        "addcdiv_": (lambda x, y: aten.addcdiv_(x, y, y, value=1e-9), 3),
    },
    "transcendental": {
        "gelu": (lambda x, y: aten.gelu(x), 2),
        "gelu_backward": (lambda x, y: aten.gelu_backward(x, y), 3),
        "silu": (lambda x, y: aten.silu(x), 2),
        "sqrt": (lambda x, y: aten.sqrt(y), 2),
    },
    "selection": {
        "masked_fill": (lambda x, y: aten.masked_fill.Scalar(x, _mask(x.numel(), x.device), 0.0), 2.25),
        "where": (lambda x, y: aten.where.self(_mask(x.numel(), x.device), x, y), 3.25),
        "threshold_backward": (lambda x, y: aten.threshold_backward(x, y, 0.5), 3),
    },
    "random": {
        "bernoulli": (lambda x, y: aten.bernoulli.p(x, 0.9), 2),
        "rand_like": (lambda x, y: aten.rand_like(x), 2),
    },
    "reduction": {
        "sum over columns": (lambda x, y: aten.sum.dim_IntList(_in_rows(x, ROW), [0]), 1),
        "mean over rows": (lambda x, y: aten.mean.dim(_in_rows(x, ROW), [1]), 1),
        "sum of pairs": (
            lambda x, y: aten.sum.dim_IntList(_in_rows(x, 2**13).view(-1, 2, min(2**12, x.numel() // 2)), [1]),
            1.5,
        ),
        "vector_norm": (lambda x, y: aten.linalg_vector_norm(x), 1),
    },
    "normalization": {
        "layer_norm": (lambda x, y: aten.native_layer_norm(_in_rows(x, ROW), [ROW], y[:ROW], y[:ROW], 1e-5), 2),
        "layer_norm_backward": (lambda x, y: _layer_norm_backward(_in_rows(x, ROW), y), 3),
    },
    "softmax": {
        "log_softmax": (lambda x, y: aten._log_softmax(_in_rows(x, WIDE_ROW), 1, False), 2),
        "log_softmax_backward": (
            lambda x, y: aten._log_softmax_backward_data(_in_rows(x, WIDE_ROW), _in_rows(y, WIDE_ROW), 1, x.dtype),
            3,
        ),
    },
    "index": {
        "embedding": (lambda x, y: aten.embedding(_in_rows(x, ROW), _rows(x)), 2),
        "embedding_backward": (
            lambda x, y: aten.embedding_dense_backward(_in_rows(x, ROW), _rows(x), ROW, -1, False),
            1,
        ),
        "nll_loss_backward": (lambda x, y: _nll_loss_backward(_in_rows(x, ROW)), 2),
    },
    "strided": {
        "transpose": (lambda x, y: aten.clone(_in_rows(x, ROW).t(), memory_format=torch.contiguous_format), 2),
        "cat of halves": (lambda x, y: aten.cat([*_in_rows(x, ROW).chunk(2, 1)], 1), 2),
    },
    "fill": {"full": (lambda x, y: aten.full_like(x, 1.0), 2)},
}


def op_rates(clock: Clock, *, fast: bool = False) -> tuple[dict[str, OpRate], list[Measured]]:
    """The rate of each class, and what it is made of: at each size the geometric mean over its ops."""
    rates: dict[str, OpRate] = {}
    rows: list[Measured] = []
    for name, ops in OPS.items():
        overhead_s = statistics.median(_seconds(clock, call, SMALLEST) for call, _ in ops.values())
        found: list[tuple[str, int, float, float]] = []
        traffic: list[float] = []
        speed: list[float] = []
        for size in FAST_SIZES if fast else SIZES:
            at_size = [(op, 4 * size * times, _seconds(clock, call, size)) for op, (call, times) in ops.items()]
            found += [(op, size, moved, seconds) for op, moved, seconds in at_size]
            traffic.append(_mean([moved for _, moved, _ in at_size]))
            speed.append(_mean([moved / max(s - overhead_s, 0.1 * s) for _, moved, s in at_size]))
        rates[name] = OpRate(overhead_s, tuple(traffic), tuple(speed))
        for op, size, moved, seconds in found:
            rows.append(Measured(f"ops.{name}", f"{op}, {size:,} elements", seconds, rates[name].seconds(moved)))
    return rates, rows


def fresh_rate(clock: Clock, *, fast: bool = False) -> float:
    """Bytes a second at which large new memory becomes usable; 0 where that cannot be told from the work itself."""
    if clock.device.type == "cuda" or fast:
        return 0.0
    x = torch.ones(FRESH_BYTES // 4)
    out = torch.empty_like(x)
    extra_s = clock.seconds(lambda _: aten.mul.Tensor(x, 0.5)) - clock.seconds(lambda _: torch.mul(x, 0.5, out=out))
    return FRESH_BYTES / extra_s if extra_s > 1e-3 else 0.0


def _seconds(clock: Clock, call: Call, size: int) -> float:
    turns = max(2, min(64, TURNS_BYTES // (8 * size)))
    inputs = [tuple(torch.rand(size, device=clock.device).add_(0.1) for _ in range(2)) for _ in range(turns)]
    kept = [None] * turns  # what calls make lives on for a while, so that the next one finds no warm memory

    def turn(number: int) -> None:
        kept[number % turns] = call(*inputs[number % turns])

    return clock.seconds(turn)


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def program_overheads(clock: Clock) -> tuple[float, float]:
    """Seconds of a small op, and of a view, in a program as the runtime writes it."""
    ops_s = _program_seconds(clock, aten.mul.Tensor, 0.5)
    views_s = _program_seconds(clock, aten.slice.Tensor, 0, 0, 2**40)
    return ops_s, views_s


def _program_seconds(clock: Clock, op: Any, *args: Any) -> float:
    calls = 200
    graph = fx.Graph()
    mode = compat.new_fake_mode()
    x = torch.ones(8, device=clock.device)
    val = compat.fake_like(mode, x)
    source = graph.placeholder("x")
    source.meta.update(val=val, entry=StateEntry("batch", "x", (8,)))
    last = source
    for _ in range(calls):
        last = graph.call_function(op, (last, *args))
        last.meta.update(val=val, phase="forward", module="")
    graph.output((last,)).meta["results"] = (Result("loss", "loss"),)
    program = Program(StepGraph(graph), groups={}, name="calibration")
    return clock.seconds(lambda _: program.run([x])) / calls
