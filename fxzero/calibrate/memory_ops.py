"""What ops that go through memory take: a few of each class, at several sizes; and views, which go through none."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxzero.calibrate.timing import IN_A_ROW, Clock, Measured
from fxzero.cost.hardware import OpRate

aten = torch.ops.aten

ROW = 256  # elements of a row, for ops that work on rows
HEAD = 64  # of a head of attention
WIDE_ROW = 2048  # of a row of logits
SMALLEST = 2**8  # elements of a call that is all overhead
SIZES = (2**14, 2**17, 2**20, 2**22)
FAST_SIZES = (2**14, 2**16)
TURNS_BYTES = 2**24  # of the inputs of one size that calls take turns with
FRESH_BYTES = 2**26
FRESH_ABOVE_BYTES = 2**25  # glibc takes no larger blocks from its heap but from the kernel (M_MMAP_THRESHOLD)


def _in_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.view(-1, min(width, x.numel()))


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 4, HEAD)


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
        "heads to the front": (
            lambda x, y: aten.clone(_heads(x).transpose(0, 1), memory_format=torch.contiguous_format),
            2,
        ),
        "cat of halves": (lambda x, y: aten.cat([*_in_rows(x, ROW).chunk(2, 1)], 1), 2),
    },
    "fill": {"full": (lambda x, y: aten.full_like(x, 1.0), 2)},
}


VIEWS: dict[str, Call] = {
    "view": lambda x, y: aten.view.default(x, [2, -1]),
    "t": lambda x, y: aten.t.default(_in_rows(x, ROW)),
    "slice": lambda x, y: aten.slice.Tensor(x, 0, 0, 8),
    "unsqueeze": lambda x, y: aten.unsqueeze.default(x, 0),
}


@dataclass(frozen=True)
class MemoryCase:
    """One op at one size.

    Args:
        name: of its class; "" of a view.
        op: words for it.
        size: elements of each tensor that it reads.
        moved: bytes that it reads and writes.
        call: runs it.
    """

    name: str
    op: str
    size: int
    moved: float
    call: Callable[[int], object]


def memory_cases(device: torch.device, *, fast: bool = False) -> list[MemoryCase]:
    """What is timed: ops of all classes at all sizes, and views."""
    found = []
    for size in (SMALLEST, *(FAST_SIZES if fast else SIZES)):
        inputs = _inputs(size, device)
        for name, ops in OPS.items():
            for op, (call, times) in ops.items():
                found.append(MemoryCase(name, op, size, 4 * size * times, _on_each(call, inputs)))
        found += [MemoryCase("", op, size, 0, _on_each(call, inputs)) for op, call in VIEWS.items()]
    return found


def _inputs(size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of tensors that calls take turns with: a program does not repeat itself in a cache."""
    turns = max(IN_A_ROW + 1, min(64, TURNS_BYTES // (8 * size)))
    return [(_random(size, device), _random(size, device)) for _ in range(turns)]


def _random(size: int, device: torch.device) -> torch.Tensor:
    return torch.rand(size, device=device).add_(0.1)


def _on_each(call: Call, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[int], object]:
    return lambda number: call(*inputs[number % len(inputs)])


def op_rates(timed: Mapping[MemoryCase, float]) -> tuple[dict[str, OpRate], list[Measured]]:
    """The rate of each class, and what it is made of: at each size the geometric mean over its ops."""
    rates: dict[str, OpRate] = {}
    rows: list[Measured] = []
    for name in OPS:
        of_class = {case: seconds for case, seconds in timed.items() if case.name == name}
        overhead_s = statistics.median(seconds for case, seconds in of_class.items() if case.size == SMALLEST)
        traffic: list[float] = []
        speed: list[float] = []
        for size in sorted({case.size for case in of_class} - {SMALLEST}):
            at_size = [(case.moved, seconds) for case, seconds in of_class.items() if case.size == size]
            traffic.append(_mean([moved for moved, _ in at_size]))
            speed.append(_mean([moved / max(s - overhead_s, 0.1 * s) for moved, s in at_size]))
        rates[name] = OpRate(overhead_s, tuple(traffic), tuple(speed))
        for case, seconds in of_class.items():
            if case.size != SMALLEST:
                predicted_s = rates[name].seconds(case.moved)
                rows.append(Measured(f"ops.{name}", f"{case.op}, {case.size:,} elements", seconds, predicted_s))
    return rates, rows


def overheads(timed: Mapping[MemoryCase, float]) -> tuple[float, float]:
    """Seconds of a small op, and of a view."""
    small = statistics.median(seconds for case, seconds in timed.items() if case.name and case.size == SMALLEST)
    return small, statistics.fmean(seconds for case, seconds in timed.items() if not case.name)


def fresh_rate(clock: Clock, *, fast: bool = False) -> float:
    """Bytes a second at which large new memory becomes usable; 0 where that cannot be told from the work itself."""
    if clock.device.type == "cuda" or fast:
        return 0.0
    x = torch.ones(FRESH_BYTES // 4)
    out = torch.empty_like(x)
    extra_s = clock.seconds(lambda _: aten.mul.Tensor(x, 0.5)) - clock.seconds(lambda _: torch.mul(x, 0.5, out=out))
    return FRESH_BYTES / extra_s if extra_s > 1e-3 else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
